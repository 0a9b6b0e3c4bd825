# SPDX-License-Identifier: Apache-2.0
"""The guided prediction of a model at the steps of a grid, with as few evaluations as the schedule allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Guidance
from fastdistill.diffusion.hooks import Cads, PowerLaw, score_scale
from fastdistill.diffusion.prompts import Rows, after_null, check_prompts, null_rows, prediction_like
from fastdistill.diffusion.schedule import PredictionType, targets
from fastdistill.ops import _check

Predict = Callable[[Tensor, Tensor, Rows], Any]


class Passes:
    """unconditional + g (conditional - unconditional) at each step: in one batch of 2 B, or the prompts alone if g is
    1, or the null prompt alone if g is 0.

    Args:
        scales: g = 1 + w of each step.
        x: the first state [B, ...]; prompts, null_prompt: as for ``ddim``.
        law, scores: a ``PowerLaw`` and ``score_scale`` at each level; then each sample has its own w, and scales is
            ignored. annealing, clock: a ``Cads`` and the share t / T of each level; seed, rows [B] int64: for its
            noise.

    Raises:
        InputError: prompts that do not fit, no null prompt although a scale is not 1, thresholds outside of the grid.
    """

    def __init__(
        self,
        scales: Sequence[float],
        x: Tensor,
        prompts: Rows,
        null_prompt: Rows | None,
        *,
        law: PowerLaw | None = None,
        scores: Sequence[float] = (),
        annealing: Cads | None = None,
        clock: Sequence[float] = (),
        seed: int = 0,
        rows: Tensor | None = None,
    ) -> None:
        for scale in dict.fromkeys(scales):
            check_prompts(x, prompts, null_prompt, scale)
        self.scales, self.prompts, self.null_prompt = scales, prompts, null_prompt
        self.law, self.scores, self.annealing, self.clock = law, scores, annealing, clock
        self.key = torch.tensor(_check.seed(seed), dtype=torch.int64, device=x.device)
        self.rows = torch.arange(len(x), device=x.device) if rows is None else rows
        self._inputs: dict[str, Rows] = {}
        if annealing:
            annealing.annealed(prompts, max(clock), self.key, self.key, self.rows)  # checks the prompts

    @classmethod
    def of(
        cls,
        guidance: Guidance,
        grid: Grid,
        x: Tensor,
        prompts: Rows,
        null_prompt: Rows | None,
        prediction_type: PredictionType,
        seed: int = 0,
        rows: Tensor | None = None,
    ) -> Passes:
        """With the weights and hooks of a schedule on a grid."""
        annealing = guidance if isinstance(guidance, Cads) else None
        base = annealing.base if annealing else guidance
        hooks: dict[str, Any] = {"annealing": annealing, "clock": grid.clock.tolist(), "seed": seed, "rows": rows}
        if isinstance(base, PowerLaw):
            a, b = grid.signal[:-1], grid.noise[:-1]
            p, q = targets(a, b)[prediction_type]
            hooks |= {"law": base, "scores": score_scale(a, b, p, q).tolist()}
            scales = [1 + base.omega] * len(grid)
        else:
            scales = base.scales(grid).tolist()
        return cls(scales, x, prompts, null_prompt, **hooks)

    def __call__(self, predict: Predict, x: Tensor, time: Tensor, level: int, step: int | None = None) -> Tensor:
        """The prediction [B, ...] in the dtype of x at level number ``level``, with the weight of step number ``step``
        (None: the step that starts there)."""
        step = level if step is None else step
        kind = self._kind(step)
        both = kind == "both"
        seen = torch.cat([x, x]) if both else x
        out = prediction_like(seen, predict(seen, time.expand(len(seen)), self._conditions(kind, level))).to(x.dtype)
        if not both:
            return out
        unconditional, conditional = out.chunk(2)
        difference = conditional - unconditional
        if self.law is None:
            return unconditional + self.scales[step] * difference
        scales = 1 + self.law.sample_weights(difference, self.scores[level]).to(x.dtype)
        return unconditional + scales.view(-1, *[1] * (x.dim() - 1)) * difference

    def _kind(self, step: int) -> str:
        scale = self.scales[step]
        return "prompts" if scale == 1 else "null" if scale == 0 and self.law is None else "both"

    def _conditions(self, kind: str, level: int) -> Rows:
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
