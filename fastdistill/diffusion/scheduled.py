# SPDX-License-Identifier: Apache-2.0
"""Sampling by any scheduler of diffusers, each sample with random numbers of its own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from fastdistill.diffusion.flow import FlowSchedule, mu_of
from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Guidance
from fastdistill.diffusion.passes import Passes
from fastdistill.diffusion.prompts import Rows
from fastdistill.diffusion.sampler import one_guidance
from fastdistill.diffusion.schedule import PredictionType, Schedule, check_prediction_type, flow_matching
from fastdistill.errors import InputError, described, quoted
from fastdistill.models import families
from fastdistill.models.calling import Call, Predictor
from fastdistill.ops import _check, philox


@torch.no_grad()
def sample_with(
    scheduler: Any,
    model: nn.Module,
    x_T: Tensor,
    prompts: Rows,
    null_prompt: Rows | None = None,
    *,
    steps: int,
    guidance_scale: float | None = None,
    guidance: Guidance | float | str | None = None,
    seed: int = 0,
    rows: Tensor | None = None,
    call: Call | None = None,
    callback: Callable[[int, Tensor, Tensor], object] | None = None,
) -> Tensor:
    """x_0 [B, *S] from noise x_T [B, *S] (standard normal) by a scheduler of diffusers, as its pipelines do it.

    Args:
        scheduler: with ``set_timesteps`` and ``step``; a copy of it is used.
        model: in eval mode; called as its family requires, or by ``call`` (``Predictor``).
        prompts: rows [B, ...], a tensor of embeddings or banks by name. null_prompt: one row [...] of each; not needed
            if guidance_scale is 1.
        guidance_scale: prediction = null + g (conditional - null), in one batch of 2 B; 1 (or None): the conditional
            alone, 0: the null prompt alone.
        guidance: instead of guidance_scale, a schedule of w = g - 1 (``Guidance``, its text or a number), taken at the
            noise of each evaluation (``Grid.visited``).
        seed, rows: stochastic schedulers draw sample i from its own generator, seeded by (seed, rows[i]); rows [B]
            int64 (None: 0..B-1). The prompts of ``cads`` use them too.
        callback: called after each step with (index, timestep, state).

    Returns:
        x_0 in the dtype of x_T; the state between the steps is at least float32.

    Raises:
        InputError: an object that is no scheduler, a scheduler with learned variance, prompts of another batch size, a
            number of steps below 1 or above its maximum, a guidance scale that is not finite or given together with a
            schedule; thresholds outside of the levels.
    """
    check_scheduler(scheduler)
    _check.tensors(x_T=x_T)
    weights = one_guidance(1.0 if guidance_scale is None and guidance is None else guidance_scale, guidance)
    if not isinstance(steps, int) or steps < 1:
        raise InputError.of("steps", "at least 1", described(steps))
    seed = _check.seed(seed)
    if rows is not None:
        _check.valued(rows=rows)
        _check.dtype(rows, "rows", torch.int64)
        _check.shape(rows, "rows", (len(x_T),), f"row numbers [{len(x_T)}]")
    scheduler = copy.deepcopy(scheduler)
    set_timesteps(scheduler, steps, tuple(x_T.shape[1:]), model, x_T.device)
    index = torch.arange(len(x_T), device=x_T.device) if rows is None else rows
    if isinstance(weights, Guidance):
        kind = _prediction_type(scheduler)
        passes = Passes.of(weights, Grid.visited(scheduler), x_T, prompts, null_prompt, kind, seed, index)
    else:
        passes = Passes([weights] * len(scheduler.timesteps), x_T, prompts, null_prompt)
    options = _options(scheduler, seed, index)
    predict = Predictor(model, call)
    x = x_T.to(torch.promote_types(x_T.dtype, torch.float32)) * getattr(scheduler, "init_noise_sigma", 1.0)
    for number, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = passes(predict, seen, t.to(x.device), number)
        x = scheduler.step(output, t, x, **options, return_dict=False)[0].to(x.dtype)
        if callback is not None:
            callback(number, t, x)
    return x.to(x_T.dtype)


def _prediction_type(scheduler: Any) -> PredictionType:
    """The type of prediction that a scheduler expects."""
    if flow_matching(type(scheduler).__name__, scheduler.config):
        return "flow_prediction"
    return check_prediction_type(scheduler.config.get("prediction_type", "epsilon"))


def check_scheduler(scheduler: Any) -> None:
    """InputError unless ``sample_with`` supports it."""
    if not all(hasattr(scheduler, name) for name in ("set_timesteps", "step", "config")):
        raise InputError.of("scheduler", "a scheduler of diffusers", type(scheduler).__name__)
    if str(scheduler.config.get("variance_type")).startswith("learned"):
        raise InputError.of("scheduler", "one with a fixed variance", scheduler.config["variance_type"])


def scheduler_of(schedule: Schedule, prediction_type: PredictionType, clip_sample: float | None = None) -> Any:
    """A deterministic scheduler of diffusers for these noise levels: DDIM with trailing timesteps, or Euler with the
    shift of a ``FlowSchedule``. ``clip_sample``: limit of the predicted clean sample, for DDIM.

    Raises:
        InputError: a prediction that it cannot sample from: epsilon if the signal is 0; for rectified flow, anything
            but flow_prediction.
    """
    if isinstance(schedule, FlowSchedule):
        if prediction_type != "flow_prediction":
            raise InputError.of("prediction_type", "flow_prediction, to sample from rectified flow", prediction_type)
        return FlowMatchEulerDiscreteScheduler(round(schedule.factor), schedule.shift)
    if prediction_type == "epsilon" and float(schedule.signal[-1]) == 0:
        rule = "sample or v_prediction, to sample where the signal ends at 0"
        raise InputError.of("prediction_type", rule, prediction_type)
    clip = {"clip_sample": clip_sample is not None, "clip_sample_range": clip_sample or 1.0}
    scheduler = DDIMScheduler(len(schedule), timestep_spacing="trailing", prediction_type=prediction_type, **clip)
    scheduler.alphas_cumprod = schedule.signal.square().float()
    return scheduler


def set_timesteps(
    scheduler: Any,
    steps: int,
    shape: tuple[int, ...],
    model: nn.Module,
    device: torch.device | str = "cpu",
    *,
    argument: str = "steps",
) -> None:
    """Set the timesteps as the pipelines of the model's family do it, for states [B, *shape].

    Raises:
        InputError: more steps (argument ``argument``) than the scheduler has timesteps or supports.
    """
    options: dict[str, Any] = {}
    if (mu := mu_of(scheduler, families.tokens_of(model, shape))) is not None:
        options["mu"] = mu
    family = families.find(model)
    sigmas = None if family is None else family.sigmas(steps)
    if sigmas is not None and "sigmas" in _takes(scheduler.set_timesteps):
        options["sigmas"] = sigmas
    kind, last = type(scheduler).__name__, scheduler.config.get("num_train_timesteps", steps)
    if steps > last:
        raise InputError.of(argument, f"at most the {last} timesteps of the scheduler ({kind})", steps)
    try:
        scheduler.set_timesteps(steps, device=device, **options)
    except ValueError as error:
        raise InputError.of(argument, f"steps that {kind} can make", f"{steps} ({quoted(error)})") from error
    if hasattr(scheduler, "alphas_cumprod") and (t := float(max(scheduler.timesteps))) > last - 1:
        got = f"{steps}, with the first at {t:g} (steps_offset {scheduler.config.get('steps_offset')})"
        raise InputError.of(argument, f"steps that {kind} makes at timesteps up to {last - 1}", got)


def _options(scheduler: Any, seed: int, rows: Tensor) -> dict[str, Any]:
    """A generator for each row, if the scheduler takes generators."""
    if "generator" not in _takes(scheduler.step):
        return {}
    key = torch.tensor(seed, dtype=torch.int64, device=rows.device)
    zero = torch.zeros_like(key)
    low, high, *_ = philox.words(key, zero, rows, zero, philox.SAMPLING)
    seeds = (low | (high >> 1) << 32).tolist()
    return {"generator": [torch.Generator(rows.device).manual_seed(own) for own in seeds]}


def _takes(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters
