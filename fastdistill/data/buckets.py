# SPDX-License-Identifier: Apache-2.0
"""Latents of several shapes (aspect buckets), each in its own cache: every step draws from one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.data.staged import Batches
from fastdistill.errors import InputError
from fastdistill.ops import Draw, Task

_STRIDE = 0x9E3779B97F4A7C15  # between the seeds of two buckets


def turn(sizes: Sequence[int], step: int) -> tuple[int, int]:
    """The bucket of a step, and the number of earlier steps with this bucket.

    Of each sum(sizes) steps, a bucket gets as many as its size, evenly spread: the first bucket takes the steps at
    which step * its share passes a whole number; the second bucket takes, by the same rule, its share of the remaining
    steps; and so on.
    """
    for bucket, size in enumerate(sizes[:-1]):
        rest = sum(sizes[bucket:])
        before = step * size // rest
        if (step + 1) * size // rest > before:
            return bucket, before
        step -= before
    return len(sizes) - 1, step


class Buckets:
    """``Batches`` of several caches, with the same methods; each step draws from one. Call ``prepare`` before each
    draw.

    The cache of a step follows from the step's number alone (``turn`` by the caches' rows). Each cache counts its own
    steps and has its own seed, so its latents are drawn once per epoch, and no two caches have the same draws.
    """

    def __init__(self, parts: Sequence[Batches], sizes: Sequence[int], device: torch.device) -> None:
        self._parts, self._sizes = list(parts), list(sizes)
        self._now: int | None = None
        self._counter = torch.zeros(2, dtype=torch.int64, device=device)  # seed and step of the cache

    def prepare(self, seed: int, step: int) -> None:
        """Choose the cache of this step; otherwise as in ``Batches.prepare``."""
        self._now, own = turn(self._sizes, step)
        seed = (seed + self._now * _STRIDE) % 2**63
        self._parts[self._now].prepare(seed, own)
        self._counter[0].fill_(seed)  # filling does not wait for the device
        self._counter[1].fill_(own)

    def __call__(self, counter: Tensor) -> Draw[Any]:
        """The batch of the step that was prepared; ``counter`` (the run's) is not used."""
        return self._part()(self._counter)

    def task(self, draw: Draw[Any], counter: Tensor) -> Task:
        """As in ``Batches.task``."""
        return self._part().task(draw, self._counter)

    def refresh(self) -> None:
        """As in ``Batches.refresh``."""
        for part in self._parts:
            part.refresh()

    def close(self) -> None:
        for part in self._parts:
            part.close()

    def _part(self) -> Batches:
        if self._now is None:
            raise InputError("counter: expected a step that was prepared, got none yet")
        return self._parts[self._now]
