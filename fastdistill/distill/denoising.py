# SPDX-License-Identifier: Apache-2.0
"""Plain diffusion training without a teacher, to train a teacher itself (Ho, Jain, Abbeel 2020, arXiv 2006.11239,
eq. 14)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from fastdistill.diffusion.matching import match_table
from fastdistill.distill.objective import Setting
from fastdistill.ops import Draw, output_match
from fastdistill.train.config import validated


@dataclass(frozen=True)
class Denoising:
    """mean over samples of min(1 / abar(t), weight_limit) |target - S(x_t, c, t)|^2.

    The weight 1 / abar makes this a loss on the clean sample. The plain loss (limit 1) gives little weight to large t,
    where the prompt matters most. ``null_probability``: fraction of null prompts, for guidance.
    """

    weight_limit: Annotated[float, Field(gt=0)] = 1.0
    null_probability: Annotated[float, Field(ge=0, le=1)] = 0.1

    def bind(self, setting: Setting) -> BoundDenoising:
        return BoundDenoising(validated(self, "objective"), setting)

    def describe(self) -> dict[str, object]:
        return dataclasses.asdict(validated(self, "objective"))


class BoundDenoising:
    metric_names = ("loss",)
    trained: Sequence[nn.Module] = ()

    def __init__(self, config: Denoising, setting: Setting) -> None:
        schedule = setting.schedule
        setting.check("student")
        self._predict, self._grad_scale = setting.predictors[1], setting.grad_scale
        weights = schedule.signal.square().reciprocal().clamp(max=config.weight_limit)
        table = match_table(schedule.coefficients(setting.prediction_type), weights=weights)
        self._table = table.to(setting.device)
        never = torch.zeros(len(schedule), dtype=torch.int64, device="cpu")
        self._batches = setting.batches(never, null_probability=config.null_probability, task=True)
        self.prepare, self.close = self._batches.prepare, self._batches.close

    def __call__(self, counter: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.loss(self.draw(counter), counter)

    def draw(self, counter: Tensor) -> Draw[Any]:
        return self._batches(counter)

    def loss(self, draw: Draw[Any], counter: Tensor) -> tuple[Tensor, list[Tensor]]:
        output = self._predict(draw.x_t, draw.timestep, draw.prompt)
        task = self._batches.task(draw, counter)
        loss = output_match(output, None, draw.timestep, self._table, task=task, grad_scale=self._grad_scale).loss
        return loss, [loss.detach()]
