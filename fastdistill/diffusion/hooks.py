# SPDX-License-Identifier: Apache-2.0
"""Guidance that is more than one number per step: a weight for each sample, or noised prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastdistill.data.prompt_bank import EMBEDDINGS
from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import By, Guidance, finite, shown
from fastdistill.diffusion.prompts import Rows
from fastdistill.diffusion.schedule import Schedule
from fastdistill.errors import InputError, described
from fastdistill.ops import _check
from fastdistill.ops.philox import CONDITION, normal

_NOISED = (EMBEDDINGS, "text_embeds", "pooled_projections")  # the banks with a prompt's embeddings


def score_scale(signal: Tensor, noise: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """|Delta_s| / |Delta_out| at levels x = a x_0 + b eps, for predictions p x_0 + q eps: a^2 / (b |a q - b p|).

    s is the score of x / a, whose noise is sigma = b / a. For epsilon Delta_s = -Delta_eps / sigma; for another type,
    Delta_eps is a / (a q - b p) times the difference of two predictions at the same x.

    Args:
        signal, noise, p, q: tensors of one shape, such as the columns of ``Schedule.coefficients``.
    """
    return signal**2 / (noise * (signal * q - noise * p).abs())


@dataclass(frozen=True)
class PowerLaw(Guidance):
    """s_c + omega Delta_s |Delta_s|^alpha, Delta_s = s_c - s_u (Pavasovic et al. 2025, 2502.07849).

    The norm is the Euclidean norm over all elements of a sample, not divided by their number; s is the score of
    x / signal: Delta_s = -Delta_eps / sigma. alpha = 0 is a constant. If Delta_s = 0 and alpha is not 0, w = 0.
    """

    omega: float
    alpha: float
    by: By = field(default="sigma", init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "omega", finite(self.omega, "omega"))
        alpha = finite(self.alpha, "alpha")
        _check.require(alpha > -1, "alpha", "a number > -1, so that guidance vanishes with the difference", alpha)
        object.__setattr__(self, "alpha", alpha)

    def __str__(self) -> str:
        return f"power:{shown(self.omega)}^{shown(self.alpha)}"

    def describe(self) -> str:
        return f"w = {shown(self.omega)} |Delta_s|^{shown(self.alpha)} of each sample"

    def sample_weights(self, difference: Tensor, scale: Tensor | float) -> Tensor:
        """w of each sample, float32 [B]; the norm is summed in float64.

        Args:
            difference: conditional - unconditional prediction [B, ...].
            scale: ``score_scale`` at the sample's level, a number or [B].
        """
        norm = torch.linalg.vector_norm(difference.flatten(1), dim=1, dtype=torch.float64) * scale
        factor = norm**self.alpha
        return (self.omega * (factor if self.alpha >= 0 else torch.where(norm > 0, factor, 0.0))).float()

    def passes(self, grid: Grid) -> Tensor:
        return torch.full((len(grid),), 1 if self.omega == 0 else 2, dtype=torch.int64, device="cpu")

    def weights_at(self, values: Tensor) -> Tensor:
        raise InputError.of("guidance", "a schedule of one weight a level", f"{str(self)!r}, a weight for each sample")


@dataclass(frozen=True)
class Cads(Guidance):
    """``base`` with annealed prompts (condition-annealed sampling, Sadat et al. 2023, 2310.17347, section 4).

    A row y of a prompt becomes sqrt(gamma) y + scale sqrt(1 - gamma) n. n is standard normal; gamma is 1 up to t = tau1
    T, 0 from tau2 T on, and linear between. This is then blended, with share ``mix``, with itself rescaled to the row's
    original mean and standard deviation. The null prompt stays. Noise is a function of (seed, row, step, element).

    The embeddings are noised: with banks ``encoder_hidden_states``, ``text_embeds`` and ``pooled_projections``.
    """

    base: Guidance
    tau1: float
    tau2: float
    scale: float
    mix: float = 1.0
    by: By = field(default="sigma", init=False, compare=False)

    def __post_init__(self) -> None:
        simple = isinstance(self.base, Guidance) and not isinstance(self.base, Cads)
        _check.require(simple, "base", "a Guidance without cads", described(self.base))
        for name in ("tau1", "tau2", "mix"):
            share = "a number in [0, 1]"
            object.__setattr__(self, name, _check.within(getattr(self, name), name, 0, 1, share))
        _check.require(self.tau1 < self.tau2, "tau1", f"less than tau2 ({self.tau2:g})", self.tau1)
        scale = finite(self.scale, "scale")
        _check.require(scale >= 0, "scale", "a number >= 0", scale)
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "by", self.base.by)

    def __str__(self) -> str:
        numbers = f"{shown(self.tau1)}..{shown(self.tau2)},{shown(self.scale)},{shown(self.mix)}"
        return f"cads:{numbers}:{self.base}"

    def describe(self) -> str:
        ends = f"from t = {shown(self.tau1)} T to {shown(self.tau2)} T"
        return f"{self.base.describe()}, prompts noised {ends} by {shown(self.scale)}"

    def annealed(self, prompts: Rows, clock: float, seed: Tensor, step: Tensor, rows: Tensor) -> Rows:
        """The prompts [B, ...] that the model gets at t = ``clock`` T.

        Args:
            seed, step: int64, 0-dim. rows: [B] int64.

        Raises:
            InputError: banks without floating-point embeddings, such as class labels.
        """
        gamma = min(1.0, max(0.0, (self.tau2 - clock) / (self.tau2 - self.tau1)))
        if gamma == 1:
            return prompts
        named = prompts if isinstance(prompts, Mapping) else {EMBEDDINGS: prompts}
        banks = {name: named[name] for name in _NOISED if name in named and named[name].dtype.is_floating_point}
        _check.require(bool(banks), "prompts", f"embeddings ({', '.join(_NOISED)}), for cads", ", ".join(named))
        sizes = [bank.shape[1:].numel() for bank in banks.values()]
        noise = torch.split(normal(seed, step, rows, (sum(sizes),), stream=CONDITION), sizes, 1)
        parts = zip(banks.items(), noise, strict=True)
        noised = {name: self._noised(bank, gamma, part.view(bank.shape)) for (name, bank), part in parts}
        return {**named, **noised} if isinstance(prompts, Mapping) else noised[EMBEDDINGS]

    def _noised(self, bank: Tensor, gamma: float, noise: Tensor) -> Tensor:
        axes = tuple(range(1, bank.dim()))
        row = bank.to(torch.promote_types(bank.dtype, torch.float32))
        found = math.sqrt(gamma) * row + self.scale * math.sqrt(1 - gamma) * noise
        (own, mean), (spread, centre) = (torch.std_mean(x, axes, correction=0, keepdim=True) for x in (row, found))
        moved = mean + (found - centre) * torch.where(spread > 0, own / spread, 0.0)
        return (self.mix * moved + (1 - self.mix) * found).to(bank.dtype)

    def passes(self, grid: Grid) -> Tensor:
        return self.base.passes(grid)

    def weights(self, grid: Grid) -> Tensor:
        return self.base.weights(grid)

    def weights_at(self, values: Tensor) -> Tensor:
        return self.base.weights_at(values)

    def table(self, levels: Schedule | Tensor) -> Tensor:
        rule = "a schedule without cads, whose prompts change from step to step, for a table of timesteps"
        raise InputError.of("guidance", rule, repr(str(self)))
