# SPDX-License-Identifier: Apache-2.0
"""Grids of noise levels compared with the schedulers of diffusers and with their equations."""

import math
import re

import diffusers
import pytest
import torch

from fastdistill.diffusion.flow import FlowSchedule
from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.sampler import ddim
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.errors import InputError
from tests.harness import EPS, EPS64

STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULE = NoiseSchedule.scaled_linear(1000)


def near(got, wanted, eps=EPS64):
    """Infinities are in the same places; otherwise the relative error is a few roundings."""
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    return torch.allclose(got, wanted, rtol=16 * eps, atol=0)


@pytest.mark.parametrize("steps", [1, 7, 30])
def test_trailing_has_the_levels_of_training(steps):
    for schedule in (SCHEDULE, FlowSchedule(1000, shift=3.0)):
        grid = Grid.trailing(schedule, steps)
        rows = [round(1000 - i * 1000 / steps) - 1 for i in range(steps)]
        assert len(grid) == steps and grid.signal[-1] == 1 and grid.noise[-1] == 0 == grid.sigma[-1]
        assert grid.sigma[:-1].equal((schedule.noise / schedule.signal)[rows])
        assert grid.times.equal((torch.arange(1000.0) if schedule.times is None else schedule.times)[rows].double())
        assert grid.clock.equal(schedule.clock[rows])
    assert (
        NoiseSchedule([0.5, 0.0]).signal[-1] == 0 and Grid.trailing(NoiseSchedule([0.5, 0.0]), 2).sigma[0] == math.inf
    )


@pytest.mark.parametrize("ends", [{}, {"sigma_max": 10.0, "sigma_min": 0.09}])
@pytest.mark.parametrize("rho", [7.0, 3.0])
def test_karras_takes_the_nearest_timesteps_of_diffusers_levels(ends, rho):
    theirs = diffusers.EulerDiscreteScheduler(**STABLE)
    levels = ((1 - theirs.alphas_cumprod) / theirs.alphas_cumprod).sqrt().double()
    bounds = [ends.get("sigma_max", levels.max()), ends.get("sigma_min", levels.min())]
    first, last = (float(bound) ** (1 / rho) for bound in bounds)
    sigmas = (first + torch.linspace(0, 1, 25, dtype=torch.float64) * (last - first)) ** rho
    times = [round(float(theirs._sigma_to_t(s.numpy(), levels.log().numpy()))) for s in sigmas]
    grid = Grid.karras(SCHEDULE, 25, **ends, rho=rho)
    assert grid.times.tolist() == list(dict.fromkeys(times)) and len(grid) <= 25
    if not ends and rho == 7:
        theirs = diffusers.EulerDiscreteScheduler(**STABLE, use_karras_sigmas=True)
        theirs.set_timesteps(25)
        assert grid.times.tolist() == list(dict.fromkeys(theirs.timesteps.round().tolist()))


def test_karras_says_how_many_steps_it_has():
    grid = Grid.karras(NoiseSchedule.cosine(20), 40)
    assert len(grid) == len(grid.times) == len(set(grid.times.tolist())) <= 20
    assert Grid.karras(SCHEDULE, 1).times.tolist() == [999]
    zero = NoiseSchedule(torch.tensor([1.0, 0.9, 0.5, 0.0]))  # no noise in the first row, no signal in the last
    assert Grid.karras(zero, 2).times.tolist() == [2, 1]


def test_flow_is_that_of_pipelines():
    for shift in (1.0, 3.0):
        theirs = diffusers.FlowMatchEulerDiscreteScheduler(1000, shift)
        theirs.set_timesteps(sigmas=[1 - i / 28 for i in range(28)])
        ours = Grid.flow(28, shift)
        assert near(ours.noise, theirs.sigmas, EPS) and near(ours.times, theirs.timesteps, EPS)
        assert ours.sigma[0] == math.inf and ours.clock.equal(ours.noise[:-1])
        assert near(ours.signal[1:], 1 - ours.noise[1:])


@pytest.mark.parametrize(
    ("kind", "settings", "steps"),
    [
        ("EulerDiscreteScheduler", {}, 30),
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}, 30),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}, 12),
        ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, 12),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, 12),
        ("UniPCMultistepScheduler", {}, 12),
    ],
)
def test_schedulers_of_variance_preserving_noise(kind, settings, steps):
    scheduler = getattr(diffusers, kind)(**STABLE, **settings)
    grid = Grid.of(scheduler, steps)
    assert scheduler.num_inference_steps is None  # a copy was used
    scheduler.set_timesteps(steps)
    assert near(grid.sigma, scheduler.sigmas) and grid.times.tolist() == scheduler.timesteps.tolist()
    assert near(grid.signal**2 + grid.noise**2, torch.ones(steps + 1))
    assert near(grid.clock, scheduler.timesteps.double() / 1000)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "shift_terminal": 0.1}),
        (
            "DPMSolverMultistepScheduler",
            {"use_flow_sigmas": True, "flow_shift": 2.0, "prediction_type": "flow_prediction"},
        ),
    ],
)
def test_schedulers_of_rectified_flow(kind, settings):
    scheduler = getattr(diffusers, kind)(**settings)
    dynamic = "use_dynamic_shifting" in settings
    grid = Grid.of(scheduler, 12, tokens=1024 if dynamic else None)
    scheduler.set_timesteps(12, **({"mu": 0.5 + 0.65 * (1024 - 256) / (4096 - 256)} if dynamic else {}))
    assert near(grid.noise, scheduler.sigmas, EPS) and near(grid.signal, 1 - scheduler.sigmas.double(), EPS)
    assert grid.times.tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize(("spacing", "offset"), [("trailing", 0), ("leading", 0), ("leading", 1)])
def test_ddim_ends_where_the_scheduler_does(final, spacing, offset):
    scheduler = diffusers.DDIMScheduler(
        **STABLE, timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=final, clip_sample=False
    )
    grid = Grid.of(scheduler, 20)
    visited = []
    x = torch.zeros(1, 1)
    ddim(lambda x, t, **_: x, x, torch.zeros(1, 1), None, scheduler, steps=20, guidance_scale=1.0,
         callback=lambda index, t, state: visited.append(t))  # fmt: skip
    assert grid.times.tolist() == visited
    assert grid.signal[:-1].equal(scheduler.alphas_cumprod.double()[visited].sqrt())
    assert grid.signal[-1] ** 2 == pytest.approx(float(scheduler.final_alpha_cumprod), rel=4 * EPS64)
    if spacing == "trailing":
        assert grid.times.equal(Grid.trailing(SCHEDULE, 20).times)
        assert Grid.of(diffusers.DDPMScheduler(**STABLE, timestep_spacing=spacing), 20).times.equal(grid.times)


def test_texts():
    for text in ("trailing:20", "karras:30", "karras:30@10.0..0.09"):
        grid = Grid.parse(text, SCHEDULE)
        assert str(grid) == text and Grid.parse(str(grid), SCHEDULE).times.equal(grid.times)
    assert Grid.parse("karras:30@10..0.09", SCHEDULE).times.equal(Grid.karras(SCHEDULE, 30, 10, 0.09).times)
    assert str(Grid.parse("flow:28")) == "flow:28" and str(Grid.parse("flow:28@3")) == "flow:28@3.0"
    assert Grid.parse("flow:28@3").noise.equal(Grid.flow(28, 3).noise)
    assert str(Grid.of(diffusers.DDIMScheduler(), 10)).startswith("10 steps from sigma ")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grid.trailing(SCHEDULE, 0), "steps: expected 1 to 1000, the timesteps of the schedule, got 0"),
        (
            lambda: Grid.trailing(diffusers.DDIMScheduler(), 4),
            "schedule: expected a NoiseSchedule or a FlowSchedule, got",
        ),
        (lambda: Grid.karras(SCHEDULE, 4, sigma_max=30), "sigma_max: expected a sigma of the schedule, 0.0291"),
        (lambda: Grid.karras(SCHEDULE, 4, 1, 2), "sigma_min: expected less than sigma_max (1), got 2"),
        (lambda: Grid.karras(SCHEDULE, 4, rho=0), "rho: expected a finite number > 0, got 0"),
        (lambda: Grid.karras(SCHEDULE, True), "steps: expected at least 1 step, got True"),
        (lambda: Grid.flow(4, shift=math.nan), "shift: expected a finite number > 0, got nan"),
        (lambda: Grid.flow(4.0), "steps: expected at least 1 step, got 4.0"),
        (lambda: Grid.of(SCHEDULE, 4), "scheduler: expected a scheduler of diffusers, got NoiseSchedule"),
        (
            lambda: Grid.of(diffusers.HeunDiscreteScheduler(), 4),
            "evaluates the model once per step, from noise to data, got Heun",
        ),
        (
            lambda: Grid.of(diffusers.PNDMScheduler(), 4),
            "scheduler: expected one of DDIM, DDPM, LCM, or with sigmas, got PNDM",
        ),
        (
            lambda: Grid.of(diffusers.DDIMScheduler(timestep_spacing="trailing"), 30),
            "Grid.trailing does at any, got 30",
        ),
        (
            lambda: Grid.of(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 4),
            "tokens: expected the tokens",
        ),
        (
            lambda: Grid.of(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), 4),
            "from noise to data, got FlowMatch",
        ),
        (
            lambda: Grid.of(diffusers.EDMEulerScheduler(), 4),
            "scheduler: expected a diffusers scheduler with alphas_cumprod",
        ),
        (
            lambda: Grid.parse("karras:30@5", SCHEDULE),
            "grid: expected trailing:20, karras:30, karras:30@30..0.09, flow:28",
        ),
        (lambda: Grid.parse("kerras:30", SCHEDULE), "got 'kerras:30'"),
        (lambda: Grid.parse("trailing:30@5", SCHEDULE), "got 'trailing:30@5'"),
        (lambda: Grid.parse("flow:0"), "steps: expected at least 1 step, got 0"),
        (
            lambda: Grid.parse("karras:30"),
            "schedule: expected the schedule whose timesteps 'karras:30' takes, got None",
        ),
        (lambda: Grid.parse(30), "grid: expected a text such as trailing:20"),
        (
            lambda: Grid(torch.ones(3), torch.tensor([1.0, 2, 0]), torch.ones(2), torch.ones(2)),
            "noise: expected noise / signal",
        ),
        (
            lambda: Grid(torch.ones(2), torch.ones(2), torch.ones(2), torch.ones(2)),
            "signal: expected one value per level, [3], got (2,)",
        ),
        (lambda: Grid(torch.zeros(2), torch.ones(2), torch.ones(1), torch.ones(1)), "signal: expected values > 0"),
        (
            lambda: Grid(torch.ones(2), torch.tensor([math.nan, 0]), torch.ones(1), torch.ones(1)),
            "noise: expected finite values",
        ),
        (lambda: Grid([1.0], torch.ones(2), torch.ones(1), torch.ones(1)), "signal: expected a tensor, got list"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=re.escape(message)):
        make()
