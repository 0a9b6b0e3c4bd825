# SPDX-License-Identifier: Apache-2.0
"""Sampling on a ``Grid`` with a schedule of guidance; steps whose weight is 0 or -1 evaluate only one prompt."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from fastdistill.diffusion.distortion import Method
from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Guidance
from fastdistill.diffusion.passes import Passes
from fastdistill.diffusion.predictions import clean_and_noise, determines
from fastdistill.diffusion.prompts import Rows
from fastdistill.diffusion.sampler import predictor
from fastdistill.diffusion.schedule import PredictionType, check_prediction_type
from fastdistill.errors import InputError, described
from fastdistill.ops import _check
from fastdistill.ops.philox import ANCESTRAL, normal


@torch.no_grad()
def sample(
    model: Callable[..., Any],
    x: Tensor,
    prompts: Rows,
    null_prompt: Rows | None,
    grid: Grid,
    *,
    method: Method = "ddim",
    guidance: Guidance | float | str = 0.0,
    prediction_type: PredictionType = "epsilon",
    clip_sample: float | None = None,
    eta: float = 1.0,
    seed: int = 0,
    rows: Tensor | None = None,
    callback: Callable[[int, float, Tensor], object] | None = None,
) -> Tensor:
    """x_0 [B, *S] from the state x [B, *S] at the first level of a grid.

    Each step is that of ``distortion.recursion``.

    Args:
        model, prompts, null_prompt: as for ``ddim``; null_prompt None if every weight is 0. The model gets the times of
            the grid, int64 if all of them are whole, else float32.
        x: standard normal noise if a^2 + b^2 = 1 or a = 0 there. The state is at least float32.
        method: ``ddim``; ``euler``, the same; ``heun``, with a second evaluation at the end of a step (``evaluations``
            of order 2); ``ancestral``, with ``eta`` in [0, 1] and noise by (seed, row, step, element).
        guidance: a schedule, its text or a constant w: unconditional + (1 + w) (conditional - unconditional), in one
            batch of 2 B unless w is 0 (the prompts alone) or -1 (the null prompt alone). With ``power_law`` each sample
            has its own w; with ``cads`` the prompts are noised by (seed, row, step, element).
        clip_sample: limit of the predicted x_0; eps is computed again from the clipped x_0.
        rows: [B] int64, numbers of the rows for the noise; None: 0..B-1.
        callback: called after each step with (index, time, state).

    Returns:
        x_0 in the dtype of x. Row i depends only on x[i], prompts[i] and rows[i].

    Raises:
        InputError: shapes that do not fit, no null prompt although a weight is not 0, thresholds outside of the grid, a
            prediction that does not determine x_0 at a level, Heun's method on a grid that does not end at the data.
    """
    _check.tensors(x=x)
    if x.ndim < 2 or not x.dtype.is_floating_point:
        raise InputError.of("x", "floating point [B, ...]", f"{x.dtype} {tuple(x.shape)}")
    if method not in get_args(Method):
        raise InputError.of("method", f"one of {', '.join(get_args(Method))}", described(method))
    if not isinstance(grid, Grid):
        raise InputError.of("grid", "a Grid", described(grid))
    _check.require(0 <= _check.real(eta, "eta") <= 1, "eta", "a number in [0, 1]", eta)
    if clip_sample is not None and not _check.single(clip_sample, "clip_sample") > 0:
        raise InputError.of("clip_sample", "a limit above 0, or None", clip_sample)
    levels = list(zip(grid.signal.tolist(), grid.noise.tolist(), strict=True))
    kind = check_prediction_type(prediction_type)
    for level in levels[:-1]:
        if not determines(kind, *level):
            raise InputError.of("prediction_type", f"one that determines x_0 at (signal, noise) = {level}", kind)
    if method == "heun" and levels[-1][1] > 0:
        raise InputError.of("grid", "one that ends at sigma = 0, for heun", grid)
    numbers = torch.arange(len(x), device=x.device) if rows is None else rows
    if not isinstance(numbers, Tensor) or numbers.dtype != torch.int64 or tuple(numbers.shape) != (len(x),):
        raise InputError.of("rows", f"int64 row numbers [{len(x)}]", described(rows))
    passes = Passes.of(Guidance.parse(guidance), grid, x, prompts, null_prompt, kind, seed, numbers)

    times = grid.model_times(x.device)
    predict = predictor(model, x.dtype)

    def predicted(x: Tensor, index: int, step: int) -> tuple[Tensor, Tensor]:
        out = passes(predict, x, times[index], index, step)
        a, b = levels[index]
        x0, eps = clean_and_noise(x, out, a, b, kind)
        if clip_sample is not None:
            x0 = x0.clamp(-clip_sample, clip_sample)
            eps = (x - a * x0) / b
        return x0, eps

    state = x.to(torch.promote_types(x.dtype, torch.float32))
    for index, ((a, b), (a_next, b_next)) in enumerate(itertools.pairwise(levels)):
        x0, eps = predicted(state, index, index)
        up = eta * b_next * math.sqrt(max(0.0, 1 - (b_next * a / (a_next * b)) ** 2)) if method == "ancestral" else 0.0
        after = a_next * x0 + math.sqrt(b_next**2 - up**2) * eps
        if up > 0:
            step = torch.full_like(passes.key, index)
            after += up * normal(passes.key, step, numbers, x.shape[1:], stream=ANCESTRAL).to(state.dtype)
        if method == "heun" and a > 0 and b_next > 0:
            _, end = predicted(after, index + 1, index)
            after = a_next / a * state + (b_next - a_next * b / a) / 2 * (eps + end)
        state = after
        if callback is not None:
            callback(index, float(grid.times[index]), state)
    return state.to(x.dtype)
