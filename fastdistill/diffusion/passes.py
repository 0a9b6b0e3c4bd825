# SPDX-License-Identifier: Apache-2.0
"""The guided prediction of a model at the steps of a grid, in as few evaluations as a schedule needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Guidance
from fastdistill.diffusion.hooks import Cads, PowerLaw, score_scale
from fastdistill.diffusion.prompts import Rows, after_null, check_prompts, null_rows
from fastdistill.diffusion.sampler import prediction_like
from fastdistill.ops import _check

Predict = Callable[[Tensor, Tensor, Rows], Any]


class Passes:
    """unconditional + (1 + w) (conditional - unconditional) at each step: in one batch of 2 B, or the prompts alone
    where w is 0, or the null prompt alone where w is -1.

    Args:
        guidance: with its hooks (``PowerLaw``, ``Cads``).
        grid: where its weights are taken.
        x: the first state [B, ...]; prompts, null_prompt: as of ``ddim``.
        prediction: (p, q) float64 [n] of predictions p x_0 + q eps at the steps; for ``PowerLaw``.
        seed, rows: of the noise of prompts: an int64, numbers of the rows [B].

    Raises:
        InputError: prompts that do not fit, no null prompt where a weight is not 0, thresholds outside of the grid.
    """

    def __init__(
        self,
        guidance: Guidance,
        grid: Grid,
        x: Tensor,
        prompts: Rows,
        null_prompt: Rows | None,
        prediction: tuple[Tensor, Tensor],
        seed: int,
        rows: Tensor,
    ) -> None:
        self.annealing = guidance if isinstance(guidance, Cads) else None
        base = self.annealing.base if self.annealing else guidance
        self.law = base if isinstance(base, PowerLaw) else None
        steps = len(grid)
        self.weights = [base.omega] * steps if isinstance(base, PowerLaw) else base.weights(grid).tolist()
        self.single = (guidance.passes(grid) == 1).tolist()
        check_prompts(x, prompts, null_prompt, next((1 + w for w in self.weights if w != 0), 1.0))
        self.scores = score_scale(grid.signal[:-1], grid.noise[:-1], *prediction).tolist() if self.law else []
        self.clock = grid.clock.tolist()
        self.prompts, self.null_prompt = prompts, null_prompt
        self.key = torch.tensor(_check.seed(seed), dtype=torch.int64, device=x.device)
        self.rows = rows
        self._inputs: dict[str, Rows] = {}
        if self.annealing:
            self.annealing.annealed(prompts, max(self.clock), self.key, self.key, rows)  # refuses what it cannot noise

    def __call__(self, predict: Predict, x: Tensor, time: Tensor, level: int, step: int) -> Tensor:
        """The prediction [B, ...] in the dtype of x, at a level (of number ``level``) with the weight of a step."""
        w, single = self.weights[step], self.single[step]
        seen = x if single else torch.cat([x, x])
        out = prediction_like(seen, predict(seen, time.expand(len(seen)), self._conditions(level, step))).to(x.dtype)
        if single:
            return out
        unconditional, conditional = out.chunk(2)
        difference = conditional - unconditional
        if self.law is None:
            return unconditional + (1 + w) * difference
        weights = 1 + self.law.sample_weights(difference, self.scores[level]).to(x.dtype)
        return unconditional + weights.view(-1, *[1] * (x.dim() - 1)) * difference

    def _conditions(self, level: int, step: int) -> Rows:
        kind = "both" if not self.single[step] else "null" if self.weights[step] == -1 else "prompts"
        if self.annealing is not None and kind != "null":
            number = torch.full_like(self.key, level)
            prompts = self.annealing.annealed(self.prompts, self.clock[level], self.key, number, self.rows)
            return self._joined(kind, prompts)
        if kind not in self._inputs:
            self._inputs[kind] = self._joined(kind, self.prompts)
        return self._inputs[kind]

    def _joined(self, kind: str, prompts: Rows) -> Rows:
        if kind == "prompts" or self.null_prompt is None:
            return prompts
        return (after_null if kind == "both" else null_rows)(prompts, self.null_prompt)
