# SPDX-License-Identifier: Apache-2.0
"""Sampling on a grid with a guidance schedule, for the models of this task and of the digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastdistill.data.prompt_bank import PromptBank
from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Guidance
from fastdistill.diffusion.guided import sample as guided
from fastdistill.tasks.digits.sampling import SCHEDULE, in_batches

GRID = "karras:30@30..0.09"  # starts where an epsilon prediction contains information, so that no clipping is needed


def sample(
    model: nn.Module,
    bank: PromptBank,
    prompt: Tensor,
    rows: Tensor,
    seed: int,
    grid: Grid | str = GRID,
    guidance: Guidance | float | str = 0.0,
    *,
    clip_sample: float | None = None,
    batch: int = 64,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Images [n, 3, 8, 8] float32 on the CPU.

    Args:
        bank: prompts on the device of the model. prompt: [n] int64, rows of the bank.
        rows: [n] int64, numbers of the initial noise for ``seed``; image i depends only on (seed, rows[i], prompt[i]).
        progress: called after each batch with the number of finished images.
    """
    levels = Grid.parse(grid, SCHEDULE) if isinstance(grid, str) else grid

    def make(noise: Tensor, prompts: Tensor, rows: Tensor) -> Tensor:
        options: dict[str, Any] = {"guidance": guidance, "clip_sample": clip_sample, "seed": seed, "rows": rows}
        return guided(model, noise, prompts, bank.null, levels, **options)

    return in_batches(make, model, bank, prompt, rows, seed, batch, progress)
