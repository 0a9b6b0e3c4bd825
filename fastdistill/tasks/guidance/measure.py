# SPDX-License-Identifier: Apache-2.0
"""Measures what a guided sampler does to the classes of a world, from samples, compared with exact values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fastdistill.diffusion.distortion import Method, Moments, closed_form, recursion
from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Guidance
from fastdistill.diffusion.guided import sample
from fastdistill.diffusion.sampler import initial_noise
from fastdistill.errors import InputError, described
from fastdistill.ops import _check
from fastdistill.tasks.guidance.worlds import World

Source = Literal["closed_form", "recursion"]


@dataclass(frozen=True)
class Moved:
    """Mean and variance of samples within their class.

    mean: in the direction from the origin to the class's mean, root mean square over the k coordinates of the world.
    variance: mean over the coordinates.
    """

    mean: float
    variance: float


@dataclass(frozen=True)
class Measured:
    """The effect of guidance on the classes of a world.

    separation: ``found.mean`` divided by that of the class; shift: separation - 1; variance_ratio: ``found.variance``
    divided by that of the class. right: share of samples for which no other class is more likely. expected: exact
    values, by ``source``. groups: [G, 3] float64, separation, variance_ratio and right (NaN: unknown) of each group of
    samples.
    """

    found: Moved
    standard_error: Moved
    separation: float
    shift: float
    variance_ratio: float
    right: float | None
    expected: Moved | None
    source: Source | None
    groups: Tensor = field(repr=False, compare=False)


def measure(
    world: World,
    grid: Grid,
    guidance: Guidance | float | str = 0.0,
    *,
    samples: int = 4096,
    method: Method = "ddim",
    seed: int = 0,
    groups: int = 32,
    limit: bool = False,
) -> Measured:
    """Samples of a world with a schedule of guidance, from pure noise.

    Args:
        samples: total over ``groups`` groups, each of one class drawn by ``seed``; standard errors are from the groups'
            own means and variances.
        limit: the expected moments are those of ``closed_form`` (a constant w, and enough steps to be at the limit),
            not those of ``recursion`` on this grid. For classes they are only known if w = 0.

    Raises:
        InputError: fewer than two groups, or fewer than two samples in each; the errors of ``sample``.
    """
    schedule = Guidance.parse(guidance)
    _check.whole(groups, "groups", "at least 2")
    _check.require(groups >= 2, "groups", "at least 2", groups)
    enough = isinstance(samples, int) and samples >= 2 * groups
    _check.require(enough, "samples", f"at least 2 in each of {groups} groups", described(samples))
    if not isinstance(world, World):
        raise InputError.of("world", "a World", described(world))
    expected, source = _expected(world, grid, schedule, method, limit)
    each = samples // groups
    chosen = torch.Generator().manual_seed(_check.seed(seed))
    labels = torch.randint(min(world.classes or 1, 2**62), (groups,), generator=chosen, device="cpu")
    prompts = world.prompts(labels).repeat_interleave(each, 0)
    unit = math.hypot(float(grid.signal[0]), float(grid.noise[0]))
    x = unit * initial_noise(seed, torch.arange(groups * each, device="cpu"), (world.dimension,)).double()
    end = sample(
        world, x, prompts, torch.zeros_like(prompts[0]), grid, method=method, guidance=schedule, seed=seed,
        prediction_type=world.prediction_type,
    )  # fmt: skip
    end = end / float(grid.signal[-1])
    inside = world.coordinates(end, prompts).reshape(groups, each, -1)
    along = _along(world, inside.mean(1))
    spread = inside.var(1).mean(-1)
    right = world.right(end, prompts)
    judged = torch.full_like(along, math.nan) if right is None else right.double().reshape(groups, each).mean(1)
    true = float(_along(world, world.mean)) or math.nan
    separation = float(along.mean()) / true
    return Measured(
        Moved(float(along.mean()), float(spread.mean())),
        Moved(*(float(value.std()) / groups**0.5 for value in (along, spread))),
        separation,
        separation - 1,
        float(spread.mean()) / float(world.variance.mean()),
        None if right is None else float(judged.mean()),
        expected,
        source,
        torch.stack([along / true, spread / world.variance.mean(), judged], 1),
    )


def _along(world: World, mean: Tensor) -> Tensor:
    """Means [..., k] in the direction of the class's mean, root mean square over k."""
    direction: Tensor = world.mean / world.mean.norm().clamp(min=1e-300)
    return mean @ direction / math.sqrt(direction.numel())


def _expected(
    world: World, grid: Grid, guidance: Guidance, method: Method, limit: bool
) -> tuple[Moved | None, Source | None]:
    weights = guidance.weights(grid)
    around = world.around
    if around is None:
        if weights.any():
            return None, None
        around = world.variance  # any value: it only matters if w is not 0
    if limit:
        constant = bool((weights == weights[0]).all())
        _check.require(constant, "guidance", "a constant w, for a closed form", guidance)
        process: Literal["ode", "sde"] = "sde" if method == "ancestral" else "ode"
        exact = closed_form(world.mean, world.variance, around, float(weights[0]), process)
        return _moved(world, exact), "closed_form"
    return _moved(world, recursion(grid, guidance, world.mean, world.variance, around, "noise", method)), "recursion"


def _moved(world: World, moments: Moments) -> Moved:
    return Moved(float(_along(world, moments.mean)), float(moments.variance.mean()))
