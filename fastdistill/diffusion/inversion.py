# SPDX-License-Identifier: Apache-2.0
"""From data to noise: the steps of a sampler in reverse, without guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guided import sample
from fastdistill.diffusion.predictions import clean_and_noise, determines
from fastdistill.diffusion.prompts import Rows, check_prompts, prediction_like
from fastdistill.diffusion.sampler import predictor
from fastdistill.diffusion.schedule import PredictionType, check_prediction_type
from fastdistill.errors import InputError, described
from fastdistill.ops import _check

Method = Literal["ddim", "heun"]


@torch.no_grad()
def invert(
    model: Callable[..., Any],
    x: Tensor,
    prompts: Rows,
    grid: Grid,
    *,
    method: Method = "ddim",
    correct: int = 0,
    prediction_type: PredictionType = "epsilon",
) -> Tensor:
    """The state [B, *S] at the first level of a grid from x [B, *S] at the last level: the sampler's steps in reverse.

    A step of the sampler goes from level (a, b) to (a', b') by x' = a'/a x + D eps, D = b' - a' b/a. eps is evaluated
    at (x, a, b); ``heun`` takes the mean with eps at the end of the step. The reverse step takes eps at x' (DDIM
    inversion: Song et al. 2010.02502, section 4.3), or this mean. The model has no time for the data, so the step from
    the data takes eps at the time of the level before, and ``heun`` then corrects it once.

    Args:
        model, prompts, prediction_type: as for ``guided.sample``. grid: from the wanted level, whose signal is above 0,
            to the data.
        correct: number of fixed-point passes per step, x <- a/a' (x' - D eps(x)); they converge to the inverse of the
            sampler's own step. A pass evaluates the model as often as a step of the sampler.

    Returns:
        In the dtype of x; between the steps it is at least float32.

    Raises:
        InputError: shapes that do not fit, a grid that starts where there is no signal, a prediction that does not
            determine eps at a level.
    """
    _check.tensors(x=x)
    if x.ndim < 2 or not x.dtype.is_floating_point:
        raise InputError.of("x", "floating point [B, ...]", f"{x.dtype} {tuple(x.shape)}")
    if method not in get_args(Method):
        raise InputError.of("method", f"one of {', '.join(get_args(Method))}", described(method))
    if not isinstance(grid, Grid):
        raise InputError.of("grid", "a Grid", described(grid))
    is_count = isinstance(correct, int) and not isinstance(correct, bool) and correct >= 0
    _check.require(is_count, "correct", "a whole number from 0", described(correct))
    check_prompts(x, prompts, None, 1)
    kind = check_prediction_type(prediction_type)
    levels = list(zip(grid.signal.tolist(), grid.noise.tolist(), strict=True))
    if levels[0][0] == 0:
        raise InputError.of("grid", "one that starts where there is signal, to go back to", grid)
    for level in levels[:-1]:
        if not determines(kind, *level):
            raise InputError.of("prediction_type", f"one that determines x_0 at (signal, noise) = {level}", kind)
    times = grid.model_times(x.device)
    predict = predictor(model, x.dtype)

    def eps(x: Tensor, index: int) -> Tensor:
        out = prediction_like(x, predict(x, times[index].expand(len(x)), prompts)).to(x.dtype)
        return clean_and_noise(x, out, *levels[index], kind)[1]

    state = x.to(torch.promote_types(x.dtype, torch.float32))
    for index in reversed(range(len(grid))):
        (a, b), (a_after, b_after) = levels[index], levels[index + 1]
        ratio, D = a / a_after, b_after - a_after * b / a
        last = index + 1 == len(grid)
        both = method == "heun" and not last

        def back(noise: Tensor, state: Tensor = state, ratio: float = ratio, D: float = D) -> Tensor:
            return ratio * (state - D * noise)

        end = eps(ratio * state, index) if last else eps(state, index + 1)
        found = back(end)
        if method == "heun":
            found = back(eps(found, index) if last else (eps(found, index) + end) / 2)
        for _ in range(correct):
            noise = eps(found, index)
            if both:
                noise = (noise + eps(found / ratio + D * noise, index + 1)) / 2
            found = back(noise)
        state = found
    return state.to(x.dtype)


def round_trip(
    model: Callable[..., Any],
    x: Tensor,
    prompts: Rows,
    grid: Grid,
    *,
    method: Method = "ddim",
    correct: int = 0,
    prediction_type: PredictionType = "epsilon",
) -> Tensor:
    """[B], the root mean square of sample(invert(x)) - x, both without guidance on the same grid."""
    latents = invert(model, x, prompts, grid, method=method, correct=correct, prediction_type=prediction_type)
    again = sample(model, latents, prompts, None, grid, method=method, prediction_type=prediction_type)
    return (again - x).flatten(1).square().mean(1).sqrt()
