# SPDX-License-Identifier: Apache-2.0
"""Noise schedules compared with diffusers' float32 tables, and identities of the coefficients."""

import inspect
import json
import re
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdistill.diffusion.conditioning import replacement_probability, thresholds
from fastdistill.diffusion.flow import flow_coefficients
from fastdistill.diffusion.matching import match_table
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.errors import InputError
from tests.harness import EPS, EPS64

CASES = {
    "cosine": (NoiseSchedule.cosine, {"beta_schedule": "squaredcos_cap_v2"}),
    "linear": (NoiseSchedule.linear, {"beta_schedule": "linear"}),
    "scaled_linear": (
        NoiseSchedule.scaled_linear,
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
}


def float32_bound(schedule: NoiseSchedule) -> torch.Tensor:
    """Relative error that float32 may put into abar_t = prod (1 - beta_s); u = 2^-24 is half a unit in the last place.

    beta carries at most 4 u of its own size (a linspace in float32, its root, its square), 1 - beta is rounded once
    (u/2 absolutely, as its value is in [1/2, 1), or less), which divides by 1 - beta; each product is rounded by u.
    """
    u = 2.0**-24
    abar = schedule.alphas_cumprod
    alpha = abar / torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    return ((4 * u * (1 - alpha) + u / 2) / alpha + u).cumsum(0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("T", [1, 10, 1000])
def test_tables_are_those_of_diffusers(name, scheduler, T):
    maker, config = CASES[name]
    ours, theirs = maker(T), scheduler(num_train_timesteps=T, **config).alphas_cumprod
    assert ours.alphas_cumprod.dtype == torch.float64 and len(ours) == T
    error = (ours.alphas_cumprod / theirs.double() - 1).abs()
    assert bool((error <= float32_bound(ours)).all()), (error / float32_bound(ours)).max()


def test_the_bound_is_tight_enough_to_fail():
    """Another schedule, or the same one shifted by one timestep, is far outside of the bound."""
    cosine = NoiseSchedule.cosine()
    shifted = cosine.alphas_cumprod[1:] / cosine.alphas_cumprod[:-1] - 1
    assert bool((shifted.abs() > 10 * float32_bound(cosine)[:-1]).all())


def test_cosine_ends_at_the_cap_and_known_values():
    abar = NoiseSchedule.cosine(1000).alphas_cumprod
    assert float(abar[999] / abar[998]) == pytest.approx(1e-3, rel=1000 * EPS64)  # beta is capped at .999
    # Before the cap, the product telescopes: abar_t = f((t+1)/T) / f(0), f(u) = cos^2((u+.008)/1.008 pi/2).
    u = torch.tensor([0.0, 0.5], dtype=torch.float64)
    f = torch.cos((u + 0.008) / 1.008 * torch.pi / 2) ** 2
    assert float(abar[499]) == pytest.approx(float(f[1] / f[0]), rel=1000 * EPS64)  # products of 500


@pytest.mark.parametrize("target", ["epsilon", "sample", "v_prediction"])
def test_coefficients_rotate(target):
    schedule = NoiseSchedule.scaled_linear()
    c = schedule.coefficients(target)
    assert c.dtype == torch.float32 and c.shape == (1000, 4)
    signal, noise, x, e = schedule.alphas_cumprod.sqrt(), (1 - schedule.alphas_cumprod).sqrt(), *c[:, 2:].double().T
    exact = {
        "epsilon": (0 * signal, 0 * noise + 1),
        "sample": (0 * signal + 1, 0 * noise),
        "v_prediction": (-noise, signal),
    }
    for found, wanted in zip((*c[:, :2].double().T, x, e), (signal, noise, *exact[target]), strict=True):
        assert bool(((found - wanted).abs() <= 2.0**-24 * wanted.abs()).all())  # rounded once


def test_velocity_is_that_of_diffusers():
    scheduler = DDPMScheduler()
    x, noise = torch.randn(2, 1000, 3, generator=torch.Generator().manual_seed(0)).unbind()
    t = torch.arange(1000)
    c = NoiseSchedule.from_diffusers(scheduler).coefficients("v_prediction")
    # Two products and a sum of numbers up to ~4 in float32, on both sides.
    torch.testing.assert_close(c[:, 2:3] * x + c[:, 3:] * noise, scheduler.get_velocity(x, noise, t), rtol=0, atol=2e-6)
    torch.testing.assert_close(c[:, :1] * x + c[:, 1:2] * noise, scheduler.add_noise(x, noise, t), rtol=0, atol=2e-6)


def scheduler_classes():
    """All schedulers of diffusers except those with a missing optional dependency."""
    found = (getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler"))
    return {c.__name__: c for c in found if not c.__module__.startswith("diffusers.utils.dummy")}


SCHEDULERS = scheduler_classes()
FLOW = {
    "FlowMapEulerDiscrete",
    "FlowMatchEulerDiscrete",
    "FlowMatchHeunDiscrete",
    "FlowMatchLCM",
    "Helios",
    "HeliosDMD",
}
FLOW |= {"LTXEulerAncestralRF", "MiniMaxH3", "Piflow", "RFD4Proteina"}
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid", "exp")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers' use of NumPy
@pytest.mark.parametrize(
    "name", [n for n, c in SCHEDULERS.items() if "beta_schedule" in inspect.signature(c).parameters]
)
def test_from_diffusers_is_exact_for_every_scheduler_of_betas(name):
    maker, read = SCHEDULERS[name], 0
    for betas in BETAS:
        for zero in (False, True) if "rescale_betas_zero_snr" in inspect.signature(maker).parameters else (False,):
            try:
                scheduler = maker(beta_schedule=betas, **({"rescale_betas_zero_snr": True} if zero else {}))
            except (NotImplementedError, ValueError):  # this class does not have such a schedule
                continue
            found, theirs = NoiseSchedule.from_diffusers(scheduler).alphas_cumprod, scheduler.alphas_cumprod.double()
            assert torch.equal(found[:-1], theirs[:-1])
            assert float(found[-1]) == (0 if zero else float(theirs[-1]))
            read += 1
    assert read


def test_a_terminal_value_that_stands_for_zero_is_read_as_zero_only_there():
    scheduler = EulerDiscreteScheduler(rescale_betas_zero_snr=True)
    assert float(scheduler.alphas_cumprod[-1]) == 2.0**-24 > float(scheduler.alphas_cumprod[-2])
    reference = DDPMScheduler(rescale_betas_zero_snr=True)
    assert torch.equal(
        NoiseSchedule.from_diffusers(scheduler).alphas_cumprod, NoiseSchedule.from_diffusers(reference).alphas_cumprod
    )
    betas = torch.tensor([0.5, 1 - 2.0**-23], dtype=torch.float64)
    trained = DDPMScheduler(trained_betas=betas.tolist(), num_train_timesteps=2)  # ends with 2**-24 on purpose
    assert NoiseSchedule.from_diffusers(trained).alphas_cumprod.tolist() == [0.5, 2.0**-24]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers' use of NumPy
@pytest.mark.parametrize(
    "name", [n for n, c in SCHEDULERS.items() if "beta_schedule" not in inspect.signature(c).parameters]
)
def test_a_scheduler_of_other_noise_is_refused(name):
    maker = SCHEDULERS[name]
    needed = [
        p for p in inspect.signature(maker).parameters.values() if p.default is p.empty and p.kind < p.VAR_POSITIONAL
    ]
    scheduler = maker.__new__(maker) if needed else maker()
    reason = f"{name} for flow matching" if name.removesuffix("Scheduler") in FLOW else name
    with pytest.raises(
        InputError, match=f"^scheduler: expected a diffusers scheduler with alphas_cumprod, got {reason}"
    ):
        NoiseSchedule.from_diffusers(scheduler)


@pytest.mark.parametrize(
    ("scheduler", "got"),
    [
        (
            diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
            "for flow match",
        ),
        (
            diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"),
            "UniPCMultistepScheduler for flow match",
        ),
        (
            EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
            "take the noise level",
        ),
        ("runs/model/scheduler", "a str; load it first, by from_pretrained or from_config"),
        (Path("scheduler"), "Path; load it first"),
        (DDPMScheduler().config, "a FrozenDict; load it first"),
        (3, "got int"),
    ],
)
def test_what_has_no_table_to_read_is_refused(scheduler, got):
    with pytest.raises(InputError, match=rf"^scheduler: expected a diffusers scheduler with alphas_cumprod, .*{got}"):
        NoiseSchedule.from_diffusers(scheduler)


def test_tables_are_made_on_the_cpu_whatever_the_default_device():
    scheduler, p = DDPMScheduler(), torch.tensor([0.0, 0.25])

    def tables():
        schedule = NoiseSchedule.scaled_linear(20)
        again = [NoiseSchedule.from_config(s.to_config()) for s in (schedule, NoiseSchedule([0.9, 0.1]))]
        schedules = [schedule, *again, NoiseSchedule.cosine(9), NoiseSchedule.linear(9)]
        coefficients = schedule.coefficients()
        return [
            *(s.alphas_cumprod for s in (*schedules, NoiseSchedule.from_diffusers(scheduler))),
            *(match_table(coefficients, guidance=w, weights="min_snr") for w in (2.0, lambda u: u)),
            *(coefficients, flow_coefficients(9), thresholds(p), thresholds(0.5), replacement_probability("exp", 9)),
        ]

    wanted = tables()
    with torch.device("meta"):
        found = tables()
        with pytest.raises(InputError, match="alphas_cumprod: expected values, got a tensor on the meta device"):
            NoiseSchedule.from_diffusers(DDPMScheduler())
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@settings(max_examples=25, deadline=None)
@given(
    st.one_of(
        st.builds(NoiseSchedule.cosine, st.integers(1, 60), st.floats(0.1, 0.999)),
        st.builds(NoiseSchedule.linear, st.integers(1, 60), st.floats(0, 0.01), st.floats(0.01, 0.9)),
        st.builds(NoiseSchedule.scaled_linear, st.integers(1, 60)),
        st.lists(st.floats(1e-9, 1), min_size=1, max_size=9).map(
            lambda v: NoiseSchedule(torch.tensor(sorted(v, reverse=True), dtype=torch.float64))
        ),
    )
)
def test_a_config_makes_the_same_schedule_again(schedule):
    again = NoiseSchedule.from_config(json.loads(json.dumps(schedule.to_config())))
    assert torch.equal(again.alphas_cumprod, schedule.alphas_cumprod)
    assert again.to_config() == schedule.to_config()


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flow_is_that_of_diffusers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=50, shift=shift)
    table = flow_coefficients(50, shift)
    torch.testing.assert_close(table[:, 1], scheduler.sigmas.flip(0)[-50:], rtol=4 * EPS, atol=0)
    x, z = torch.randn(2, 50, dtype=torch.float64)
    signal, noise, target_signal, target_noise = table.double().T
    assert torch.equal(target_signal * x + target_noise * z, z - x)
    step = 1e-3  # the target is the velocity d x_t / d s; differences of numbers up to 4 lose 1 / step
    moved = (signal - step) * x + (noise + step) * z
    torch.testing.assert_close((moved - (signal * x + noise * z)) / step, z - x, rtol=0, atol=16 * EPS64 / step)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: flow_coefficients(shift=0), "shift: expected a number > 0, got 0"),
        (lambda: flow_coefficients(0), "T: expected at least 1 timestep, got 0"),
        (lambda: NoiseSchedule(torch.tensor([0.5, 0.6])), "alphas_cumprod: expected values in [0, 1]"),
        (lambda: NoiseSchedule(torch.tensor([0.5, float("nan")])), "alphas_cumprod: expected values in [0, 1]"),
        (lambda: NoiseSchedule(torch.tensor([1.5, 0.5])), "alphas_cumprod: expected values in [0, 1]"),
        (lambda: NoiseSchedule(torch.tensor([0.0])), "values in [0, 1] that never increase, the first above 0, got 0"),
        (lambda: NoiseSchedule(torch.ones(2, 2)), "one value per timestep, [T], got (2, 2)"),
        (lambda: NoiseSchedule.cosine(0), "T: expected at least 1 timestep, got 0"),
        (lambda: NoiseSchedule.cosine().coefficients("eps"), "target: expected one of epsilon, sample, v_prediction"),
        (lambda: NoiseSchedule.from_config({"name": "cosin"}), "schedule name: expected one of cosine, linear"),
        (lambda: NoiseSchedule.from_config({"name": "cosine", "S": 1}), "schedule cosine: "),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=re.escape(message)):
        make()
