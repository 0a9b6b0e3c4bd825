# SPDX-License-Identifier: Apache-2.0
"""Rectified flow: noise levels of diffusers and of papers, and the targets of training scripts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3

from fastdistill.diffusion.flow import FlowSchedule, dynamic_mu, resolution_shift, schedule_of
from fastdistill.diffusion.matching import loss_weights
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.distill import RandomConditioning, Weights
from fastdistill.errors import InputError
from tests import tiny
from tests.models import tiny_families as small

ROUNDING = 4 * torch.finfo(torch.float32).eps  # of diffusers' tables, which are float32 throughout


@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_the_noise_is_that_of_the_scheduler(kind: Any) -> None:
    scheduler = kind(shift=3.0)
    schedule: Any = schedule_of(scheduler)
    sigmas = schedule.sigmas.flip(0)
    assert (sigmas - FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas).abs().max() <= ROUNDING
    times = FlowMatchEulerDiscreteScheduler(shift=3.0).timesteps
    assert (schedule.times.flip(0) - times).abs().max() <= 1000 * ROUNDING
    x, noise = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    times = times[[0, 20, 500, 990, 999]]
    rows = 999 - torch.tensor([0, 20, 500, 990, 999])
    a, b, p, q = schedule.coefficients()[rows].T[..., None, None]
    noised = FlowMatchEulerDiscreteScheduler(shift=3.0).scale_noise(x, times, noise)
    assert (a * x + b * noise - noised).abs().max() <= ROUNDING * 4
    assert torch.equal(p * x + q * noise, noise - x)


def test_a_dynamic_shift_goes_by_the_tokens_of_the_image() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    assert dynamic_mu(256) == 0.5 and dynamic_mu(4096) == pytest.approx(1.15)
    schedule: Any = schedule_of(scheduler, 1024)
    scheduler.set_timesteps(1000, sigmas=[1 - i / 1000 for i in range(1000)], mu=dynamic_mu(1024))
    assert (schedule.sigmas.flip(0) - scheduler.sigmas[:-1]).abs().max() <= ROUNDING
    assert resolution_shift(4096, 1024, 1.5) == 3.0
    with pytest.raises(InputError, match=r"tokens: expected the tokens of an image"):
        schedule_of(scheduler)
    run = tiny.trainer(small.model("flux"), small.model("flux", 1), RandomConditioning(weights=Weights(1, 0, 0)),
                       latents=small.cache("flux"), prompts=small.bank("flux"), schedule=scheduler)  # fmt: skip
    assert run._setting.schedule.to_config()["shift"] == math.exp(dynamic_mu(16))


def test_schedulers_with_flow_sigmas_and_others() -> None:
    sana = DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    assert schedule_of(sana) == FlowSchedule(shift=3.0)
    assert isinstance(schedule_of(DPMSolverMultistepScheduler()), NoiseSchedule)
    with pytest.raises(InputError, match=r"scheduler: expected a scheduler of rectified flow.*with invert_sigmas"):
        schedule_of(FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    assert FlowSchedule.from_config(FlowSchedule(9, 2.0, "mode").to_config()) == FlowSchedule(9, 2.0, "mode")


def logit_normal(sigma: float) -> float:
    """Its cumulative distribution function."""
    return 0.5 * math.erfc(-(math.log(sigma / (1 - sigma)) - 0.5) / 2 / math.sqrt(2))


@pytest.mark.parametrize(("schedule", "distribution"), [
    (FlowSchedule(200, density="logit_normal", mean=0.5, std=2.0), logit_normal),
    (FlowSchedule(200, shift=4.0), lambda s: s / (4 - 3 * s) - 0.0025),
])  # fmt: skip
def test_the_table_holds_quantiles(schedule: FlowSchedule, distribution: Callable[[float], float]) -> None:
    """At each row's value, the distribution function equals the midpoint of the row (closed form in float64)."""
    found = torch.tensor([distribution(s) for s in schedule.sigmas.tolist()], dtype=torch.float64)
    wanted = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    assert (found - wanted).abs().max() <= 64 * torch.finfo(torch.float64).eps


def test_the_mode_density_is_that_of_the_paper() -> None:
    u = 1 - (torch.arange(50, dtype=torch.float64) + 0.5) / 50
    wanted = 1 - u - 0.8 * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    sigmas = FlowSchedule(50, density="mode", scale=0.8).sigmas
    assert (sigmas - wanted).abs().max() <= 8 * torch.finfo(torch.float64).eps
    assert bool((sigmas.diff() > 0).all()) and torch.allclose(FlowSchedule(50, density="mode", scale=0.0).sigmas, 1 - u)


@pytest.mark.parametrize("name", ["sigma_sqrt", "cosmap"])
def test_weights_are_those_of_the_training_scripts(name: Any) -> None:
    schedule = FlowSchedule(100, 3.0)
    weights = loss_weights(schedule.coefficients(), name)
    wanted = compute_loss_weighting_for_sd3(name, schedule.coefficients()[:, 1].double())
    assert ((weights - wanted) / wanted).abs().max() <= ROUNDING  # theirs are float32
    with pytest.raises(InputError, match=f"weighting: expected flow_prediction of a FlowSchedule for {name}"):
        loss_weights(NoiseSchedule.linear(9).coefficients(), name)


def test_a_flow_model_is_trained_on_velocities_at_its_own_times() -> None:
    """The task loss is that of training scripts: noise - x compared with the output at time 1000 sigma."""
    seen: list[torch.Tensor] = []

    def call(model: Any, x_t: torch.Tensor, timestep: torch.Tensor, rows: Any) -> Any:
        seen.append(timestep)
        return model(x_t, timestep=timestep, **rows)

    schedule = FlowSchedule(50, 3.0, "logit_normal")
    student = small.model("sd3", 1)
    objective = RandomConditioning(weights=Weights(0, 0, 1), loss_weighting="cosmap")
    run = tiny.trainer(small.model("sd3"), student, objective, schedule=schedule, call=call,
                       latents=small.cache("sd3"), prompts=small.bank("sd3"))  # fmt: skip
    bound: Any = run.step.objective
    draw = bound._batches(run.step.counter)
    loss = bound(run.step.counter)[0]
    sigma = schedule.sigmas.float()[draw.timestep]
    assert torch.equal(seen[-1], schedule.times.float()[draw.timestep])
    x = small.cache("sd3").latents[draw.latent_index]
    noise = (draw.x_t - (1 - sigma).view(-1, 1, 1, 1) * x) / sigma.view(-1, 1, 1, 1)
    output = student(draw.x_t, timestep=sigma * 1000, **draw.prompt).sample
    errors = (output - (noise - x)).double().square().flatten(1).mean(1) * (draw.choice == 0)  # only paired prompts
    errors = errors * compute_loss_weighting_for_sd3("cosmap", sigma)
    magnitude = errors.abs().mean() / sigma.min()  # the noise was recovered by a division by sigma
    assert (loss - errors.mean()).abs() <= 8 * torch.finfo(torch.float32).eps * magnitude
    assert run.fit().history[0]["task"] > 0


def test_arguments() -> None:
    for arguments, message in (
        ({"T": 0}, "T: expected at least 1 timestep, got 0"),
        ({"density": "normal"}, "density: expected one of uniform, logit_normal, mode, got"),
        ({"scale": 2.0}, "scale: expected -1 to 1.75"),
        ({"std": 0.0}, "std: expected a number > 0"),
        ({"shift": "3"}, "shift: expected a finite number, got '3'"),
        ({"std": 2.0}, "std: expected its default 1.0 where density is not logit_normal but uniform, got 2.0"),
        ({"density": "logit_normal", "scale": 1.0}, "scale: expected its default 1.29 where density is not mode"),
    ):
        with pytest.raises(InputError, match=message):
            FlowSchedule(**arguments)  # type: ignore[arg-type]
    with pytest.raises(
        InputError, match="target: expected one of flow_prediction, epsilon, sample, got 'v_prediction'"
    ):
        FlowSchedule().coefficients("v_prediction")
