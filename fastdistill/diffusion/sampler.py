# SPDX-License-Identifier: Apache-2.0
"""Samplers: deterministic DDIM with classifier-free guidance, and initial noise that belongs to row numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.diffusion.schedule import NoiseSchedule, PredictionType, check_prediction_type
from fastdistill.errors import InputError
from fastdistill.ops.philox import INITIAL_NOISE, normal


def initial_noise(seed: int, rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normals [B, *shape] float32 on the device of ``rows``; row i depends on (seed, rows[i]) alone.

    ``rows`` is [B] int64 in [0, 2**32), such as row numbers of a latent cache. They come from the counter-based
    generator's own stream for samplers, so that no training step draws the same numbers.
    """
    if rows.ndim != 1 or rows.dtype != torch.int64:
        raise InputError.of("rows", "int64 row numbers [B]", f"{rows.dtype} {tuple(rows.shape)}")
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < 2**32:
        raise InputError.of("rows", "row numbers in [0, 2**32)", f"{int(rows.min())} to {int(rows.max())}")
    key = torch.tensor(seed, dtype=torch.int64, device=rows.device)
    return normal(key, torch.zeros_like(key), rows, shape, stream=INITIAL_NOISE)


def trailing_timesteps(T: int, steps: int) -> list[int]:
    """``steps`` timesteps from T-1 downwards, evenly spaced ("trailing", Lin et al. 2305.08891, table 2).

    They start where x_T is pure noise, as sampling does; "leading" ones stop short of it.
    """
    if not 1 <= steps <= T:
        raise InputError.of("steps", f"1 to {T}, the timesteps of the schedule", steps)
    return [round(T - i * T / steps) - 1 for i in range(steps)]


@torch.no_grad()
def ddim(
    model: Callable[..., Any],
    x_T: Tensor,
    prompts: Tensor,
    null_prompt: Tensor | None,
    schedule: NoiseSchedule,
    *,
    steps: int,
    guidance_scale: float,
    prediction_type: PredictionType = "epsilon",
    timesteps: Sequence[int] | None = None,
    clip_sample: float | None = None,
    callback: Callable[[int, int, Tensor], object] | None = None,
) -> Tensor:
    """x_0 [B, *S] from noise x_T [B, *S] by DDIM with eta = 0 (Song, Meng, Ermon 2021, 2010.02502, eq. 12).

    Args:
        model: ``model(x, t, encoder_hidden_states=prompts)``, t int64 [b], in eval mode; returns the prediction like x,
            an object with ``.sample``, or a tuple that starts with it (diffusers' U-Nets).
        x_T: floating point; the state between the steps is at least float32. A module sees state and prompts in the
            dtype in which it computes, whatever theirs is; any other callable sees the state in the dtype of x_T.
        prompts: [B, L, D]. null_prompt: [L, D] or [1, L, D]; None only when guidance_scale is 1.
        steps: number of steps; the timesteps are ``trailing_timesteps``, ``timesteps`` (decreasing) replaces them.
            The last step goes to abar = 1 (``set_alpha_to_one`` of diffusers).
        guidance_scale: g of diffusers, prediction = null + g (conditional - null), in one batch of 2 B; any finite g
            (g = 1 + w where guidance is written s_c + w (s_c - s_u)). g = 1 skips the pass on the null prompt, g = 0
            the other one.
        clip_sample: limit c of the predicted x_0; the noise is then derived anew from the clipped x_0
            (``use_clipped_model_output`` of diffusers).
        callback: called after each step with (index, timestep, state).

    Returns:
        x_0 in the dtype of x_T. Row i depends on x_T[i] and prompts[i] alone.
    """
    check_prediction_type(prediction_type)
    _check_inputs(x_T, prompts, null_prompt, guidance_scale, clip_sample)
    times = trailing_timesteps(len(schedule), steps) if timesteps is None else _checked(timesteps, steps, len(schedule))
    abars = [float(schedule.alphas_cumprod[t]) for t in times] + [1.0]
    if prediction_type == "epsilon" and abars[0] == 0:
        raise InputError.of(
            "prediction_type", f"sample or v_prediction where abar is 0 (timestep {times[0]})", "epsilon"
        )
    guided = guidance_scale not in (0, 1)
    conditions = prompts
    if null_prompt is not None and guidance_scale != 1:
        null = null_prompt.expand_as(prompts)
        conditions = torch.cat([null, prompts]) if guided else null

    predict = _predictor(model, x_T.dtype)
    x = x_T.to(torch.promote_types(x_T.dtype, torch.float32))
    for index, t in enumerate(times):
        seen = torch.cat([x, x]) if guided else x
        t_batch = torch.full((len(seen),), t, dtype=torch.int64, device=x.device)
        out = _prediction(predict(seen, t_batch, conditions), seen).to(x.dtype)
        if guided:
            unconditional, conditional = out.chunk(2)
            out = unconditional + guidance_scale * (conditional - unconditional)
        x = _step(x, out, abars[index], abars[index + 1], prediction_type, clip_sample)
        if callback is not None:
            callback(index, t, x)
    return x.to(x_T.dtype)


def _predictor(model: Callable[..., Any], dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Any]:
    """How to call the model: a module in the dtype in which it computes, anything else with states of ``dtype``."""
    if isinstance(model, nn.Module):
        from fastdistill.models.calling import Predictor  # loads diffusers

        return Predictor(model)
    return lambda x, timestep, prompts: model(x.to(dtype), timestep, encoder_hidden_states=prompts)


def _step(x: Tensor, out: Tensor, abar: float, next_abar: float, kind: PredictionType, clip: float | None) -> Tensor:
    """One DDIM step between noise levels; the coefficients are Python floats, double precision up to the product."""
    signal, noise = math.sqrt(abar), math.sqrt(1 - abar)
    if kind == "epsilon":
        x0, eps = (x - noise * out) / signal, out
    elif kind == "sample":
        x0, eps = out, _noise_of(x, out, signal, noise)
    else:
        x0, eps = signal * x - noise * out, signal * out + noise * x
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
        eps = _noise_of(x, x0, signal, noise)
    return math.sqrt(next_abar) * x0 + math.sqrt(1 - next_abar) * eps


def _noise_of(x: Tensor, x0: Tensor, signal: float, noise: float) -> Tensor:
    return (x - signal * x0) / noise if noise else torch.zeros_like(x)


def _prediction(output: Any, like: Tensor) -> Tensor:
    output = getattr(output, "sample", output)
    output = output[0] if isinstance(output, tuple) else output
    if not isinstance(output, Tensor) or output.shape != like.shape:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError.of("model", f"a prediction of shape {tuple(like.shape)}", got)
    return output


def _checked(timesteps: Sequence[int], steps: int, T: int) -> list[int]:
    times = [int(t) for t in timesteps]
    if len(times) != steps:
        raise InputError.of("timesteps", f"as many as steps, {steps}", len(times))
    falling = all(a > b for a, b in itertools.pairwise(times))
    if not times or not falling or times[0] >= T or times[-1] < 0:
        raise InputError.of("timesteps", f"decreasing values from {T - 1} to 0", times)
    return times


def _check_inputs(x_T: Tensor, prompts: Tensor, null_prompt: Tensor | None, scale: float, clip: float | None) -> None:
    if x_T.ndim < 2 or not x_T.dtype.is_floating_point:
        raise InputError.of("x_T", "floating point [B, ...]", f"{x_T.dtype} {tuple(x_T.shape)}")
    if prompts.ndim != 3 or len(prompts) != len(x_T):
        raise InputError.of("prompts", f"[{len(x_T)} (batch of x_T), length, width]", tuple(prompts.shape))
    if not math.isfinite(scale):
        raise InputError.of("guidance_scale", "a finite number", scale)
    if clip is not None and not clip > 0:
        raise InputError.of("clip_sample", "a limit above 0, or None", clip)
    if null_prompt is None:
        if scale != 1:
            raise InputError.of("null_prompt", f"[length, width] for a guidance_scale of {scale}", None)
        return
    shape = tuple(null_prompt.shape[-2:])
    if null_prompt.ndim not in (2, 3) or null_prompt.shape[:-2] not in ((), (1,)) or shape != tuple(prompts.shape[1:]):
        raise InputError.of("null_prompt", f"a row of prompts {tuple(prompts.shape[1:])}", tuple(null_prompt.shape))
    for name, tensor in (("prompts", prompts), ("null_prompt", null_prompt)):
        if tensor.device != x_T.device:
            raise InputError.of(name, f"the device of x_T ({x_T.device})", tensor.device)
