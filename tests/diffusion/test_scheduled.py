# SPDX-License-Identifier: Apache-2.0
"""Sampling with diffusers' schedulers: as in their pipelines, and independent of the other samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler

from fastdistill.diffusion.flow import dynamic_mu
from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Guidance
from fastdistill.diffusion.sampler import ddim
from fastdistill.diffusion.scheduled import sample_with
from fastdistill.errors import InputError
from fastdistill.models.families import family_of
from tests.models import tiny_families as small

TEXT = "encoder_hidden_states"


def parts(name: str) -> tuple[Any, torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    model = small.model(name).eval()
    x, rows = small.cache(name).latents[:3], small.banks(model)
    return model, x, {k: v[:3] for k, v in rows.items()}, {k: v[3] for k, v in rows.items()}


def test_flow_models_by_their_own_scheduler() -> None:
    model, x, rows, _ = parts("flux")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    found = sample_with(scheduler, model, x, rows, steps=3)
    scheduler.set_timesteps(3, sigmas=[1.0, 2 / 3, 1 / 3], mu=dynamic_mu(16))
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = family_of(model).call(model, x, t.expand(3), rows)
            x = scheduler.step(output, t, x, return_dict=False)[0]
    assert torch.equal(found, x)


def test_guided_ddim_is_that_of_the_own_sampler() -> None:
    model, x, rows, null = parts("sd")
    text, none = rows["encoder_hidden_states"], null["encoder_hidden_states"]
    scheduler = DDIMScheduler(clip_sample=False)
    wanted = ddim(model, x, text, none, scheduler, steps=4, guidance_scale=3.0)
    found = sample_with(scheduler, model, x, text, none, steps=4, guidance_scale=3.0)
    # the same operations in another order: a few roundings per step of states that are at most as large as the largest
    assert (found - wanted).abs().max() <= 4 * 32 * torch.finfo(torch.float32).eps * max(
        wanted.abs().max(), x.abs().max()
    )


@pytest.mark.parametrize("name", ["sdxl", "dit", "pixart_alpha"])
@pytest.mark.parametrize("g", [1.0, 3.0, 0.0])
def test_ddim_takes_all_banks_of_a_model(name: str, g: float) -> None:
    """As diffusers' scheduler with the model's outputs; for models with a learned variance only the prediction."""
    model, x, rows, null = parts(name)
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    found = ddim(model, x, rows, null, scheduler, steps=3, guidance_scale=g)
    wanted = sample_with(scheduler, model, x, rows, null, steps=3, guidance_scale=g)
    bound = 4 * 32 * torch.finfo(torch.float32).eps * max(wanted.abs().max(), x.abs().max())
    assert (found - wanted).abs().max() <= bound * max(1, abs(g)) and found.shape == x.shape
    if g != 0:
        others = {bank: values.flip(0) for bank, values in rows.items()}
        assert not torch.equal(found, ddim(model, x, others, null, scheduler, steps=3, guidance_scale=g))


@pytest.mark.parametrize("kind", [PNDMScheduler, HeunDiscreteScheduler, EulerDiscreteScheduler])
def test_a_schedule_has_a_weight_for_each_evaluation(kind: Any) -> None:
    """The weight of the timestep that the model gets, also if a scheduler evaluates it twice at one."""
    scheduler, window, seen = kind(beta_schedule="scaled_linear"), Guidance.parse("5@3,-1@0.5,0"), []
    model, x, rows, null = parts("sd")
    call = family_of(model).call

    def counted(model: Any, x: torch.Tensor, t: torch.Tensor, banks: Any) -> torch.Tensor:
        seen.append((float(t[0]), len(x)))
        return call(model, x, t, banks)

    found = sample_with(scheduler, model, x, rows, null, steps=5, guidance=window, call=counted)
    scheduler.set_timesteps(5)
    grid = Grid.visited(scheduler)
    assert [time for time, _ in seen] == pytest.approx(grid.times.tolist())
    assert [size for _, size in seen] == (3 * window.passes(grid)).tolist()
    x = x * scheduler.init_noise_sigma
    nulls = {name: row.expand(3, *row.shape) for name, row in null.items()}
    for t, w in zip(scheduler.timesteps, window.weights(grid).tolist(), strict=True):
        given = scheduler.scale_model_input(x, t)
        banks = {0: rows, -1: nulls}.get(w, {name: torch.cat([nulls[name], rows[name]]) for name in rows})
        output = call(model, given if w in (0, -1) else torch.cat([given, given]), t.expand(len(banks[TEXT])), banks)
        if w not in (0, -1):
            unconditional, conditional = output.sample.chunk(2)
            output = (unconditional + (1 + w) * (conditional - unconditional),)
        x = scheduler.step(output[0], t, x, return_dict=False)[0]
    assert found.equal(x)


def test_levels_that_a_scheduler_visits() -> None:
    table = EulerDiscreteScheduler(beta_schedule="scaled_linear", use_karras_sigmas=True)
    with pytest.raises(InputError, match="a scheduler of diffusers whose timesteps are set, got"):
        Grid.visited(table)
    table.set_timesteps(9)
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow.set_timesteps(9)
    for scheduler, grid in ((table, Grid.of(table, 9)), (flow, Grid.of(flow, 9))):
        visited = Grid.visited(scheduler)
        assert visited.times.equal(grid.times) and torch.allclose(visited.clock, grid.clock, rtol=1e-6, atol=0)
        # timesteps are float32: at t their rounding changes log sigma by its slope, below 0.02 a timestep at 1000
        rounding = 16 * torch.finfo(torch.float32).eps * 0.02 * 1000
        assert ((visited.sigma - grid.sigma)[1:].abs() <= rounding * grid.sigma[1:]).all()


@pytest.mark.parametrize("kind", [DDPMScheduler, EulerAncestralDiscreteScheduler])
def test_a_sample_depends_on_its_row_and_the_seed_alone(kind: Any) -> None:
    model, x, rows, _ = parts("dit")
    model.double()

    def sample(samples: list[int], seed: int = 7) -> torch.Tensor:
        number = torch.tensor([5 + i for i in samples])
        given = {name: bank[samples] for name, bank in rows.items()}
        return sample_with(kind(), model, x[samples].double(), given, steps=3, rows=number, seed=seed)

    together = sample([0, 1, 0])
    assert torch.equal(together[0], together[2]) and not torch.equal(together[0], together[1])
    alone = sample([0])
    assert (alone[0] - together[0]).abs().max() <= 1e-9 * together.abs().max()  # matmuls of another size, in float64
    assert (alone - sample([0], seed=8)).abs().max() > 1e-3


def test_arguments() -> None:
    model, x, rows, _ = parts("dit")
    with pytest.raises(InputError, match="scheduler: expected a scheduler of diffusers, got str"):
        sample_with("ddim", model, x, rows, steps=2)
    with pytest.raises(InputError, match="scheduler: expected one with a fixed variance, got learned_range"):
        sample_with(DDPMScheduler(variance_type="learned_range"), model, x, rows, steps=2)
    with pytest.raises(InputError, match="steps: expected at least 1, got 0"):
        sample_with(DDPMScheduler(), model, x, rows, steps=0)
    with pytest.raises(InputError, match="guidance_scale: expected a finite number, got nan"):
        sample_with(DDPMScheduler(), model, x, rows, steps=2, guidance_scale=float("nan"))
    with pytest.raises(InputError, match=r"guidance_scale \(g = 1 \+ w\), got both"):
        sample_with(DDPMScheduler(), model, x, rows, steps=2, guidance_scale=2, guidance="2")
    with pytest.raises(InputError, match="null_prompt: expected a row, for a guidance_scale of 3"):
        sample_with(DDPMScheduler(), model, x, rows, steps=2, guidance="2@3,0")
    with pytest.raises(InputError, match="null_prompt: expected a row, for a guidance_scale of 2"):
        sample_with(DDPMScheduler(), model, x, rows, steps=2, guidance_scale=2)
    with pytest.raises(
        InputError, match=r"prompts\['class_labels'\]: expected rows \[2 \(batch of x_T\), ...\], got \(3,\)"
    ):
        sample_with(DDPMScheduler(), model, x[:2], rows, steps=2)
