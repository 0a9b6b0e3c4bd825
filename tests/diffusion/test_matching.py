# SPDX-License-Identifier: Apache-2.0
"""The table of output_match: conversions against their definition and diffusers, weights against diffusers' SNR."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from fastdistill.diffusion.flow import flow_coefficients
from fastdistill.diffusion.guidance import Guidance
from fastdistill.diffusion.matching import conversion, loss_weights, match_table
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.errors import InputError
from tests.harness import EPS

T = 1000
KINDS = ["epsilon", "sample", "v_prediction"]


def scheduler() -> Any:
    return DDIMScheduler(T, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def coefficients(kind: str) -> Tensor:
    return NoiseSchedule.from_diffusers(scheduler()).coefficients(kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("student", KINDS)
@pytest.mark.parametrize("teacher", KINDS)
def test_conversions(student: str, teacher: str) -> None:
    """For any x_0 and noise, the teacher's prediction is converted to the student's type at every timestep."""
    own, theirs = coefficients(student).double(), coefficients(teacher).double()
    x, noise = torch.randn(2, T, 1, dtype=torch.float64).unbind()
    x_t = own[:, :1] * x + own[:, 1:2] * noise
    prediction, wanted = (c[:, 2:3] * x + c[:, 3:] * noise for c in (theirs, own))
    c = conversion(coefficients(student), coefficients(teacher))
    # Exact in these coefficients, but for float64's rounding, which a division by the noise at t = 0 magnifies.
    bound = 64 * torch.finfo(torch.float64).eps / float(own[:, 1].min())
    torch.testing.assert_close(c[:, :1] * x_t + c[:, 1:] * prediction, wanted, rtol=0, atol=bound)
    if student == teacher:
        assert torch.equal(c, torch.tensor([0.0, 1.0], dtype=torch.float64).expand(T, 2))


def test_v_to_epsilon_as_diffusers_does_it() -> None:
    x, noise, time = torch.randn(1, 4), torch.randn(1, 4), torch.tensor([700])
    plan = scheduler()
    x_t, v = plan.add_noise(x, noise, time), plan.get_velocity(x, noise, time)
    c = conversion(coefficients("epsilon"), coefficients("v_prediction"))[700].float()
    terms = (c[0] * x_t).abs() + (c[1] * v).abs()  # x_t and v are sums of two products themselves
    torch.testing.assert_close(c[0] * x_t + c[1] * v, noise, rtol=0, atol=8 * EPS * float(terms.max()))


def test_tables_of_one_schedule_may_be_rounded_in_two_ways() -> None:
    """diffusers multiplies in float32, ours in float64; a different schedule is refused."""
    ours = NoiseSchedule.scaled_linear(T).coefficients("epsilon")
    torch.testing.assert_close(conversion(ours, coefficients("epsilon"))[:, 1], torch.ones(T, dtype=torch.float64))
    with pytest.raises(InputError, match="teacher: expected the same signal and noise"):
        conversion(NoiseSchedule.linear(T).coefficients("epsilon"), coefficients("epsilon"))


def test_flow_to_flow_is_the_identity() -> None:
    assert torch.equal(conversion(flow_coefficients(T), flow_coefficients(T))[:, 1], torch.ones(T, dtype=torch.float64))


def test_weights_against_diffusers_snr() -> None:
    snr = compute_snr(scheduler(), torch.arange(T)).double()
    five = torch.full_like(snr, 5.0)
    expected = {
        ("epsilon", "snr"): torch.ones_like(snr),
        ("sample", "snr"): snr,
        ("epsilon", "min_snr"): torch.minimum(snr, five) / snr,
        ("v_prediction", "min_snr"): torch.minimum(snr, five) / (snr + 1),
        ("sample", "min_snr"): torch.minimum(snr, five),
        ("sample", "truncated_snr"): snr.clamp(min=1),
        ("epsilon", "truncated_snr"): snr.clamp(min=1) / snr,
        ("v_prediction", "uniform"): torch.ones_like(snr),
    }
    # 1 - abar is taken in float32 by diffusers, and rounded to float32 here: of abar's digits 1 / (1 - abar) are lost.
    bound = 8 * EPS / (1 - scheduler().alphas_cumprod.double())
    for (kind, weighting), weights in expected.items():
        error = (loss_weights(coefficients(kind), weighting) / weights - 1).abs()  # type: ignore[arg-type]
        assert bool((error <= bound).all()), (kind, weighting, float((error / bound).max()))


def test_table() -> None:
    own = coefficients("epsilon")
    table = match_table(own, guidance=lambda u: 3 * u, weights=torch.arange(T) / T, task_weights="uniform")
    assert table.dtype == torch.float32 and table.shape == (T, 5)
    assert table[500].tolist() == pytest.approx([1.5, 0.0, 1.0, 0.5, 1.0], rel=4 * EPS)
    assert match_table(own, guidance=2.0)[:, 0].eq(2).all() and match_table(own, weights="min_snr")[0, 4] < 0.1
    window = Guidance.window(4, -1, 3.0, 0.5)
    assert torch.equal(match_table(own, guidance=window)[:, 0].double(), window.table(own))
    assert match_table(own, guidance=window)[[999, 400, 10], 0].tolist() == [4, -1, 0]
    mixed = match_table(own, weights="uniform", task_weights="min_snr", gamma=3.0)
    assert torch.equal(mixed[:, 4], loss_weights(own, "min_snr", 3.0).float())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"weights": "snr2"},
            "weights: expected one of uniform, snr, truncated_snr, min_snr, sigma_sqrt, cosmap, or.*got 'snr2'",
        ),
        ({"weights": torch.ones(3)}, r"weights: expected one number per timestep, \(1000,\), got \(3,\)"),
        ({"guidance": torch.full((T,), float("nan"))}, r"guidance\[0\]: expected a finite number, got nan"),
        ({"guidance": Guidance.window(2, -1, 0.5, by="step")}, "guidance: expected thresholds as sigma or t"),
        ({"gamma": 0.0, "weights": "min_snr"}, "gamma: expected a finite number > 0, got 0.0"),
        (
            {"gamma": 3.0, "task_weights": torch.ones(T)},
            "gamma: expected its default 5.0 where the weighting is not min_snr but uniform, got 3.0",
        ),
        ({"teacher": flow_coefficients(T)}, "teacher: expected the same signal and noise"),
        ({"teacher": torch.ones(T, 3)}, r"teacher: expected coefficients \[T, 4\], got \(1000, 3\)"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        match_table(coefficients("epsilon"), **arguments)


def test_a_prediction_from_which_nothing_follows() -> None:
    """At zero terminal SNR x_t is the noise itself, so an epsilon prediction does not determine x_0."""
    schedule = NoiseSchedule(torch.tensor([0.5, 0.0], dtype=torch.float64))
    with pytest.raises(InputError, match=r"teacher: expected predictions that determine x_0 \(at timestep 1 "):
        conversion(schedule.coefficients("v_prediction"), schedule.coefficients("epsilon"))
