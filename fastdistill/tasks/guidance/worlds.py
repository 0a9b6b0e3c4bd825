# SPDX-License-Identifier: Apache-2.0
"""Distributions of classes with exact scores, as models for samplers: guidance without a network's error.

A class is a Gaussian around its center; the null prompt is the mixture of all. With signal a, noise b and the variance
s^2 of a class, v = a^2 s^2 + b^2 and E[x_0 | x] = (a s^2 x + b^2 E[center | x]) / v; the posterior of the center
depends on z = a x / v. Ventura et al. 2026 (2602.00716) study these distributions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdistill.diffusion.distortion import directions
from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.schedule import PredictionType, Schedule, check_prediction_type
from fastdistill.errors import InputError, described
from fastdistill.ops import _check


class Prediction(NamedTuple):
    """The output of a denoiser in diffusers."""

    sample: Tensor


class World(nn.Module, ABC):
    """A model of x [B, d] for prompts [B, e], called as a U-Net of diffusers; computes in float64.

    Args:
        levels: the grid, or the schedule, of the timesteps.
        prediction_type: what it predicts; ``v_prediction`` determines x_0 at every level.

    ``dimension``: d; ``classes``: their number (None: no classes). ``mean``, ``variance`` [k]: of a class in its
    ``coordinates``; ``around``: the variance of all data there, if they are Gaussian.
    """

    classes: int | None = None
    mean: Tensor
    variance: Tensor
    around: Tensor | None
    signal: Tensor
    noise: Tensor
    times: Tensor

    def __init__(
        self, levels: Grid | Schedule, dimension: int, prediction_type: PredictionType = "v_prediction"
    ) -> None:
        super().__init__()
        _check.whole(dimension, "dimension", "at least 1 direction")
        if not isinstance(levels, Grid | Schedule):
            raise InputError.of("levels", "a Grid or a schedule", described(levels))
        self.dimension, self.prediction_type = int(dimension), check_prediction_type(prediction_type)
        steps = len(levels)
        times = torch.arange(steps, dtype=torch.float64, device="cpu") if levels.times is None else levels.times
        order = times.float().argsort()
        self.register_buffer("around", None)
        for name, value in (
            ("signal", levels.signal[:steps]),
            ("noise", levels.noise[:steps]),
            ("times", times.float()),
        ):
            self.register_buffer(name, value[order])

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, return_dict: bool = True) -> Any:
        """The prediction at ``sample`` [B, d] and ``timestep`` (a number or [B]), in the dtype of ``sample``."""
        _check.shape(sample, "sample", (None, self.dimension), f"states [B, {self.dimension}]")
        a, b = self._levels(torch.as_tensor(timestep, device=sample.device).float().expand(len(sample)).contiguous())
        x, prompts = sample.double(), encoder_hidden_states.double()
        null = ~prompts.any(1)
        x0 = self.conditional(x, prompts, a, b)
        if null.any():
            x0[null] = self.unconditional(x[null], a[null], b[null])
        eps = (x - a * x0) / b
        by_kind: dict[str, tuple[Any, Any]] = {
            "epsilon": (0, 1),
            "sample": (1, 0),
            "v_prediction": (-b, a),
            "flow_prediction": (-1, 1),
        }
        p, q = by_kind[self.prediction_type]
        out = Prediction((p * x0 + q * eps).to(sample.dtype))
        return out if return_dict else tuple(out)

    @abstractmethod
    def conditional(self, x: Tensor, prompts: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """E[x_0 | x, class]; x [B, d], a and b [B, 1]."""

    @abstractmethod
    def unconditional(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """E[x_0 | x]."""

    @abstractmethod
    def prompts(self, labels: Tensor) -> Tensor:
        """Rows [B, e] of the classes [B] int64; the null prompt is a row of zeros."""

    @abstractmethod
    def coordinates(self, x: Tensor, prompts: Tensor) -> Tensor:
        """[B, k]: x in the directions in which guidance acts, along the class's mean; its distribution there is
        N(``mean``, ``variance``)."""

    def right(self, x: Tensor, prompts: Tensor) -> Tensor | None:
        """[B] bool: whether no other class is more likely for x; None if there are no classes."""
        return None

    def _levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        index = torch.searchsorted(self.times, times).clamp(max=len(self.times) - 1)
        known = self.times[index] == times
        if not known.all():
            raise InputError.of("timestep", "times of the levels", float(times[~known][0]))
        return self.signal[index, None], self.noise[index, None]


class Gaussian(World):
    """p(x | c) = N(mu, c) and p(x) = N(0, u) in each of d directions, the columns of ``basis`` [d, d] (None: the axes).
    There is only one prompt.

    Args:
        mu, c, u: numbers or [d].
    """

    around: Tensor
    basis: Tensor

    def __init__(
        self,
        levels: Grid | Schedule,
        mu: Any,
        c: Any,
        u: Any,
        basis: Tensor | None = None,
        prediction_type: PredictionType = "v_prediction",
    ) -> None:
        mean, inner, outer = (value.reshape(-1).clone() for value in directions(mu=mu, c=c, u=u))
        super().__init__(levels, len(mean), prediction_type)
        axes = torch.eye(len(mean), dtype=torch.float64, device="cpu")
        turn = axes if basis is None else basis.double()
        _check.shape(turn, "basis", (len(mean), len(mean)), f"[{len(mean)}, {len(mean)}]")
        orthogonal = bool((turn.T @ turn - axes).abs().max() < 1e-6)  # with the tolerance of a float32 matrix
        _check.require(orthogonal, "basis", "orthonormal columns", "others")
        for name, value in (("mean", mean), ("variance", inner), ("around", outer), ("basis", turn)):
            self.register_buffer(name, value)

    def conditional(self, x: Tensor, prompts: Tensor, a: Tensor, b: Tensor) -> Tensor:
        inside = a**2 * self.variance + b**2
        return ((a * self.variance * (x @ self.basis) + b**2 * self.mean) / inside) @ self.basis.T

    def unconditional(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (a * self.around / (a**2 * self.around + b**2) * (x @ self.basis)) @ self.basis.T

    def prompts(self, labels: Tensor) -> Tensor:
        return torch.ones(len(labels), 1, dtype=torch.float64, device=labels.device)

    def coordinates(self, x: Tensor, prompts: Tensor) -> Tensor:
        return x @ self.basis


class Classes(World):
    """Classes N(m center, s^2); each center has d values +1 or -1, which are also the prompt."""

    def __init__(
        self,
        levels: Grid | Schedule,
        dimension: int,
        m: float = 1.0,
        s: float = 0.7,
        prediction_type: PredictionType = "v_prediction",
    ) -> None:
        super().__init__(levels, dimension, prediction_type)
        for name, value in (("m", m), ("s", s)):
            _check.require(0 < _check.real(value, name) < float("inf"), name, "a finite number > 0", value)
        self.m, self.s = float(m), float(s)
        self.register_buffer("mean", torch.full((self.dimension,), self.m, dtype=torch.float64, device="cpu"))
        self.register_buffer("variance", torch.full_like(self.mean, self.s**2))

    @abstractmethod
    def centre(self, z: Tensor) -> Tensor:
        """E[center | x] by z = a x / (a^2 s^2 + b^2), [B, d]."""

    def conditional(self, x: Tensor, prompts: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (a * self.s**2 * x + b**2 * self.m * prompts) / (a**2 * self.s**2 + b**2)

    def unconditional(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        v = a**2 * self.s**2 + b**2
        return (a * self.s**2 * x + b**2 * self.m * self.centre(a * x / v)) / v

    def coordinates(self, x: Tensor, prompts: Tensor) -> Tensor:
        return x * prompts


class TwoClass(Classes):
    """Two classes at +-m in each of d dimensions: their distance is proportional to sqrt(d). They vary in one
    direction."""

    classes = 2

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.mean, self.variance = self.mean[:1] * math.sqrt(self.dimension), self.variance[:1]

    def centre(self, z: Tensor) -> Tensor:
        return (self.m * z.sum(1, keepdim=True)).tanh().expand_as(z)

    def prompts(self, labels: Tensor) -> Tensor:
        return (1.0 - 2.0 * (labels % 2).double())[:, None].expand(-1, self.dimension)

    def coordinates(self, x: Tensor, prompts: Tensor) -> Tensor:
        return (x * prompts).sum(1, keepdim=True) / math.sqrt(self.dimension)

    def right(self, x: Tensor, prompts: Tensor) -> Tensor:
        return (x * prompts).sum(1) > 0


class Hypercube(Classes):
    """2^d classes at the corners m {+1, -1}^d. The posterior of each coordinate is independent: O(d)."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.classes = 2**self.dimension

    def centre(self, z: Tensor) -> Tensor:
        return (self.m * z).tanh()

    def prompts(self, labels: Tensor) -> Tensor:
        """The bits of a label are the signs of its corner, repeated from the 63rd on."""
        bits = labels[:, None] >> (torch.arange(self.dimension, device=labels.device) % 63)
        return 1.0 - 2.0 * (bits & 1).double()

    def right(self, x: Tensor, prompts: Tensor) -> Tensor:
        return (x * prompts > 0).all(1)


class RandomCentres(Classes):
    """K classes at random corners, drawn by ``seed``; alpha = ln K / d. O(K d)."""

    centres: Tensor

    def __init__(self, levels: Grid | Schedule, dimension: int, classes: int, *, seed: int = 0, **options: Any) -> None:
        super().__init__(levels, dimension, **options)
        _check.whole(classes, "classes", "at least 1 class")
        self.classes = int(classes)
        random = torch.Generator().manual_seed(_check.seed(seed))
        signs = torch.randint(2, (self.classes, self.dimension), generator=random).double()
        self.register_buffer("centres", 1 - 2 * signs)

    def centre(self, z: Tensor) -> Tensor:
        posterior: Tensor = (self.m * z @ self.centres.T).softmax(1)
        return posterior @ self.centres

    def prompts(self, labels: Tensor) -> Tensor:
        found: Tensor = self.centres[labels % len(self.centres)]
        return found

    def right(self, x: Tensor, prompts: Tensor) -> Tensor:
        return (x * prompts).sum(1) >= (x @ self.centres.T).amax(1) * (1 - 1e-12)
