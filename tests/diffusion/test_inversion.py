# SPDX-License-Identifier: Apache-2.0
"""Inversion: its order of accuracy, its limits, and a comparison with closed forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guided import sample
from fastdistill.diffusion.inversion import invert, round_trip
from fastdistill.diffusion.schedule import NoiseSchedule, targets
from fastdistill.errors import InputError
from tests.harness import EPS64

MU, C, TOP = 0.3, 0.4, 2.0  # a Gaussian, and the noise level to which it is inverted
X = torch.linspace(-2, 2, 7, dtype=torch.float64)[:, None]
PROMPTS = torch.zeros(7, 1, 1)


def levels(steps: int) -> Grid:
    """Uniform steps in sigma for a variance-preserving process."""
    sigma = torch.linspace(TOP, 0, steps + 1, dtype=torch.float64)
    signal = (1 + sigma**2).rsqrt()
    return Grid(signal, sigma * signal, torch.arange(steps), sigma[:-1] / TOP)


def gaussian(grid: Grid, kind: str = "epsilon") -> Callable[..., Tensor]:
    """The exact prediction; its time is the number of the level."""

    def model(x: Tensor, level: Tensor, **_: Any) -> Tensor:
        sigma = grid.sigma[level][:, None]
        signal = (1 + sigma**2).rsqrt()
        x0 = MU + C / (C + sigma**2) * (x / signal - MU)
        eps = (x / signal - x0) / sigma
        p, q = targets(signal, sigma * signal)[kind]  # type: ignore[index]
        return p * x0 + q * eps

    return model


EXACT = (MU + (X - MU) * ((C + TOP**2) / C) ** 0.5) / (1 + TOP**2) ** 0.5


@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("heun", 2)])
def test_order(method: Any, order: int) -> None:
    """The error against the probability flow falls with this power of the step size, that of a round trip at least."""

    def errors(steps: int) -> Tensor:
        grid = levels(steps)
        there = invert(gaussian(grid), X, PROMPTS, grid, method=method)
        back = round_trip(gaussian(grid), X, PROMPTS, grid, method=method)
        return torch.stack([(there - EXACT).abs().max(), back.max()])

    there, trip = (errors(32) / errors(64)).log2()
    assert abs(there - order) < 0.3 and trip > order - 0.3


@pytest.mark.parametrize("method", ["ddim", "heun"])
def test_fixed_point_passes_invert_the_sampler_itself(method: Any) -> None:
    grid = levels(6)
    trips = [float(round_trip(gaussian(grid), X, PROMPTS, grid, method=method, correct=c).max()) for c in (0, 2, 40)]
    assert trips[1] < trips[0] / 2 and trips[2] <= 64 * EPS64 * X.abs().max()


@pytest.mark.parametrize("kind", ["sample", "v_prediction", "flow_prediction"])
def test_predictions_of_any_kind(kind: Any) -> None:
    """x_0, v and flow predictions give the same result as eps."""
    grid = levels(5)
    for method in ("ddim", "heun"):
        expected = invert(gaussian(grid), X, PROMPTS, grid, method=method, correct=1)  # type: ignore[arg-type]
        got = invert(gaussian(grid, kind), X, PROMPTS, grid, method=method, correct=1, prediction_type=kind)  # type: ignore[arg-type]
        assert (got - expected).abs().max() <= 64 * EPS64 * expected.abs().max()


def test_a_part_of_the_schedule() -> None:
    schedule = NoiseSchedule.cosine()
    grid = Grid.trailing(schedule, 4, first=650)
    assert grid.times.tolist() == [650, 487, 325, 162]
    assert torch.equal(grid.signal[0], schedule.signal[650]) and grid.noise[-1] == 0
    assert Grid.trailing(schedule, 4, first=999).times.tolist() == Grid.trailing(schedule, 4).times.tolist()
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    zero = invert(lambda x, t, **_: torch.zeros_like(x), x, PROMPTS[:2], grid)
    assert (zero - x * schedule.signal[650].float()).abs().max() <= 1e-6 * x.abs().max()
    back = sample(lambda x, t, **_: torch.zeros_like(x), zero, PROMPTS[:2], None, grid)
    assert (back - x).abs().max() <= 1e-6 * x.abs().max()


def test_wrong_arguments() -> None:
    schedule = NoiseSchedule.cosine()
    for first in (-1, 1000, 3.5):
        with pytest.raises(InputError, match="first: expected a timestep of the schedule, 0 to 999"):
            Grid.trailing(schedule, 4, first=first)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="steps: expected 1 to 3"):
        Grid.trailing(schedule, 4, first=2)
    for given, message in (
        ({"method": "euler"}, "method: expected one of ddim, heun"),
        ({"correct": -1}, "correct: expected a whole number from 0"),
        ({"grid": Grid.flow(4)}, "grid: expected one that starts where there is signal"),
        ({"x": X[:3]}, "prompts: expected rows"),
        ({"prediction_type": "score"}, "prediction_type: expected one of"),
    ):
        arguments: dict[str, Any] = {"x": X, "prompts": PROMPTS, "grid": levels(3)} | given  # type: ignore[dict-item]
        with pytest.raises(InputError, match=message):
            invert(gaussian(levels(3)), **arguments)
