# SPDX-License-Identifier: Apache-2.0
"""Schedules in diffusers' pipelines: a constant as in the stock pipeline, a window as in our samplers."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from fastdistill.diffusion.flow import FlowSchedule
from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Guidance
from fastdistill.diffusion.guided import sample
from fastdistill.diffusion.guiders import ScheduledGuidance, scheduled_guidance
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.diffusion.scheduled import sample_with
from fastdistill.errors import InputError
from tests.models import tiny_families as small
from tests.models.tiny_pipelines import autoencoder, noisy

STEPS, WINDOW = 5, "3@4,-1@0.5,0"
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

NAMES = {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"}


def pipeline_of(name: str, scheduler: Any = None) -> Any:
    """Without text encoders."""
    model, vae = noisy(small.model(name)), autoencoder(name)
    if name == "sd3":
        empty = dict.fromkeys(
            ["text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"]
        )
        scheduler = scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        made: Any = diffusers.StableDiffusion3Pipeline(transformer=model, vae=vae, scheduler=scheduler, **empty)
    else:
        empty = dict.fromkeys(["text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
        scheduler = scheduler or diffusers.DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing")
        made = diffusers.StableDiffusionPipeline(
            unet=model, vae=vae, scheduler=scheduler, requires_safety_checker=False, **empty
        )
    made.set_progress_bar_config(disable=True)
    return made


def embeddings(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    rows = {k: v for k, v in small.banks(model).items() if k in NAMES}
    return {k: v[:2] for k, v in rows.items()}, {k: v[3] for k, v in rows.items()}


def run(name: str, pipeline: Any, noise: torch.Tensor, **options: Any) -> torch.Tensor:
    """Latents of two prompts."""
    model = pipeline.transformer if name == "sd3" else pipeline.unet
    rows, null = embeddings(model)
    given = {NAMES[k]: v for k, v in rows.items()} | {
        f"negative_{NAMES[k]}": v.expand(2, *v.shape) for k, v in null.items()
    }
    given |= {"latents": noise.clone(), "output_type": "latent", "num_inference_steps": STEPS, "guidance_scale": 7.5}
    found: torch.Tensor = pipeline(**given | options).images
    return found


def evaluated(model: Any) -> list[int]:
    """A list of the batch sizes that the model's first layer gets from now on."""
    sizes: list[int] = []
    first = model.pos_embed if hasattr(model, "pos_embed") else model.conv_in
    first.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    return sizes


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_constant_is_the_stock_pipeline(name: str) -> None:
    pipeline, noise = pipeline_of(name), small.cache(name).latents[:2]
    stock = run(name, pipeline, noise)
    with scheduled_guidance(pipeline, 6.5):
        ours = run(name, pipeline, noise, guidance_scale=3.0)
    assert ours.equal(stock)  # the same operations, and u + g (u - u) is u
    assert run(name, pipeline, noise).equal(stock)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("sd", None),
        ("sd", diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **BETAS)),
        ("sd", diffusers.HeunDiscreteScheduler(**BETAS)),
        ("sd3", None),
    ],
)
@pytest.mark.parametrize("schedule", [WINDOW, "2@50%,-1"])
def test_a_window_is_that_of_the_samplers(name: str, scheduler: Any, schedule: str) -> None:
    pipeline, noise = pipeline_of(name, scheduler), small.cache(name).latents[:2]
    model = pipeline.transformer if name == "sd3" else pipeline.unet
    rows, null = embeddings(model)
    wanted = sample_with(pipeline.scheduler, model, noise, rows, null, steps=STEPS, guidance=schedule)
    sizes = evaluated(model)
    with scheduled_guidance(pipeline, schedule) as same:
        assert same is pipeline
        ours = [run(name, pipeline, noise) for _ in range(2)]
    assert ours[0].equal(ours[1])
    passes = Guidance.parse(schedule).passes(Grid.visited(pipeline.scheduler))
    assert sizes == 2 * (2 * passes).tolist() and {1, 2} == set(passes.tolist())
    if scheduler is None:
        grid = Grid.of(pipeline.scheduler, STEPS)
        kind: Any = "flow_prediction" if name == "sd3" else "epsilon"
        own = sample(model, noise, rows, null, grid, guidance=schedule, prediction_type=kind)
        bound = rounding(pipeline, noise, wanted)
        assert (own - wanted).abs().max() <= bound
    assert (ours[0] - wanted).abs().max() <= rounding(pipeline, noise, wanted)


def rounding(pipeline: Any, noise: torch.Tensor, found: torch.Tensor) -> float:
    """A few roundings of each state; x_0 = (x - b eps) / a loses the digits of sigma."""
    grid = Grid.visited(pipeline.scheduler)
    sigma = float(grid.sigma[grid.sigma.isfinite()].max())
    return 64 * STEPS * torch.finfo(torch.float32).eps * (1 + sigma) * float(max(noise.abs().max(), found.abs().max()))


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_calls_that_a_schedule_cannot_serve(name: str) -> None:
    pipeline, noise = pipeline_of(name), small.cache(name).latents[:2]
    model = pipeline.transformer if name == "sd3" else pipeline.unet
    cases: list[tuple[str, dict[str, Any], str]] = [
        (WINDOW, {"guidance_scale": 1.0}, "guidance_scale: expected a number above 1 (of no further effect), so that"),
        ("3@4,-1@3.99,0", {}, "stretches in each of which a step of the grid starts, got none for"),
    ]
    if name == "sd":
        cases.append(("3@1e9,0", {}, "the ends of the levels, got 1e+09 in"))
        rule = "guidance_rescale: expected 0 with the schedule 3@4,-1@0.5,0, got 0.5"
        cases.append((WINDOW, {"guidance_rescale": 0.5}, rule))
    sizes = evaluated(model)
    for schedule, options, message in cases:
        with pytest.raises(InputError, match=re.escape(message)), scheduled_guidance(pipeline, schedule):
            run(name, pipeline, noise, **options)
        assert "forward" not in vars(model) and not sizes  # refused before the model is evaluated


def test_layers_cannot_be_skipped() -> None:
    """The pipeline reveals it only by evaluating the model once more."""
    pipeline, options = pipeline_of("sd3"), {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 1.0}
    rule = "skip_guidance_layers: expected None with the schedule 3@4,-1@0.5,0"
    with pytest.raises(InputError, match=re.escape(rule)), scheduled_guidance(pipeline, WINDOW):
        run("sd3", pipeline, small.cache("sd3").latents[:2], **options)
    assert "forward" not in vars(pipeline.transformer)


def test_rescaling_changes_nothing_without_guidance() -> None:
    pipeline, noise = pipeline_of("sd"), small.cache("sd").latents[:2]
    with scheduled_guidance(pipeline, 0):
        assert run("sd", pipeline, noise).equal(run("sd", pipeline, noise, guidance_rescale=0.5))


def test_pipelines_that_a_schedule_cannot_serve() -> None:
    def refused(pipeline: Any, schedule: Any, message: str) -> None:
        with pytest.raises(InputError, match=re.escape(message)), scheduled_guidance(pipeline, schedule):
            pytest.fail("entered")

    pipeline = pipeline_of("sd")
    refused(3, 1, "pipeline: expected a pipeline with a scheduler and a unet or transformer, got 3")
    refused(pipeline, "power:2^1", "schedule: expected a schedule without hooks (fastdistill.sample_with takes them)")
    refused(pipeline, "8@", "column 3 should be a number")
    for name in ("dit", "flux"):
        part = SimpleNamespace(transformer=small.model(name), scheduler=pipeline.scheduler)
        refused(part, 1, "a pipeline that has (null prompts, prompts) evaluated in one batch, got SimpleNamespace")
    inner = pipeline.unet.forward
    pipeline.unet.forward = lambda *args, **kwargs: inner(*args, **kwargs)  # like hooks of offloading
    own = pipeline.unet.forward
    with scheduled_guidance(pipeline, WINDOW):
        refused(pipeline, 1, "pipeline: expected a denoiser without a schedule (it has 3@4,-1@0.5,0), got 1")
        run("sd", pipeline, small.cache("sd").latents[:2])
    assert pipeline.unet.forward is own
    compiled = torch.compile(small.model("sd"), backend="eager")
    part = SimpleNamespace(unet=compiled, scheduler=pipeline.scheduler)
    refused(part, 1, "pipeline: expected a denoiser that is not compiled, got OptimizedModule")
    pipeline.unet.compile(backend="eager")
    refused(pipeline, 1, "pipeline: expected a denoiser that is not compiled, got UNet2DConditionModel")


def predicted(guider: Any, model: Any, x: torch.Tensor, t: torch.Tensor, data: dict[str, Any]) -> torch.Tensor:
    """As in the loop of a modular pipeline."""
    states = guider.prepare_inputs(data)
    for state in states:
        guider.prepare_models(model)
        assert guider.is_conditional == (state.prompts is data["prompts"][0])
        state.noise_pred = model(x, t, state.prompts)
        guider.cleanup_models(model)
    found: torch.Tensor = guider(states)[0]
    return found


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("schedule", [WINDOW, "2@0.6t,0", "2@50%,-1"])
def test_a_guider_has_the_weights_of_the_schedule(schedule: str, flow: bool, tmp_path: Any) -> None:
    if flow:
        scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        scheduler.set_timesteps(STEPS, mu=0.8)
    else:
        scheduler = diffusers.EulerDiscreteScheduler(**BETAS)
        scheduler.set_timesteps(STEPS)
    made = ScheduledGuidance(schedule, scheduler)
    made.save_pretrained(tmp_path)
    read = ScheduledGuidance.from_pretrained(tmp_path)
    assert read.config.schedule == schedule and read.config.noise == made.config.noise
    grid, calls = Grid.visited(scheduler), []
    x, prompts, null = torch.randn(2, 3), torch.randn(2, 3), torch.zeros(2, 3)

    def model(x: torch.Tensor, t: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return torch.tanh(x + prompts + t / 1000)

    for guider in (made, made.new(), read):
        for i, (t, w) in enumerate(
            zip(scheduler.timesteps, Guidance.parse(schedule).weights(grid).tolist(), strict=True)
        ):
            guider.set_state(i, STEPS, t)
            calls.clear()
            found = predicted(guider, model, x, t, {"prompts": (prompts, null)})
            assert len(calls) == guider.num_conditions == (1 if w in (0, -1) else 2)
            conditional, unconditional = model(x, t, prompts), model(x, t, null)
            assert found.equal(
                {0: conditional, -1: unconditional}.get(w, unconditional + (1 + w) * (conditional - unconditional))
            )
    made.disable()
    assert made.num_conditions == 1


@pytest.mark.parametrize(
    ("schedule", "noise", "message"),
    [
        ("cads:0..1,1,1:2", NoiseSchedule.cosine(), "schedule: expected a schedule without hooks"),
        (Guidance.function(float), NoiseSchedule.cosine(), "guidance: expected a schedule such as"),
        (2, "somewhere", "scheduler: expected a diffusers scheduler with alphas_cumprod"),
        (2, {"name": "curved"}, "schedule name: expected one of cosine"),
    ],
)
def test_guiders_that_cannot_be(schedule: Any, noise: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        ScheduledGuidance(schedule, noise)
    guider = ScheduledGuidance("2@3,0", FlowSchedule())
    with pytest.raises(InputError, match="the ends of the levels, got 3 in"):
        guider.set_state(0, 4, torch.tensor(700.0))
