# SPDX-License-Identifier: Apache-2.0
"""Draws random prompts more often from regions of the pool in which student and teacher differ more.

The idea is that of ARIA (arXiv 2606.23898); the formula is specific to this package. The M prompts of the pool are
divided into R regions of consecutive rows: region r has the prompts r M / R to (r + 1) M / R. Every step adds the
distances between the outputs for samples with random prompts to their regions. Every ``every`` steps, the mean m_r of
each region is added to a moving average:

    D_r <- decay D_r + (1 - decay) m_r        (the first m_r is taken as it is; regions without one get the mean)
    q_r = uniform n_r / M + (1 - uniform) n_r D_r^power / sum_k n_k D_k^power        (n_r prompts)

Then region r is drawn with probability q_r from an alias table (Walker 1977, Vose 1991), and one of its prompts
uniformly. Only samples with random prompts are compared, because their timesteps have the same distribution in all
regions. The loss is not reweighted: regions that are drawn more often count more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from fastdistill.distill.objective import Setting
from fastdistill.errors import InputError
from fastdistill.ops import Draw, philox
from fastdistill.ops.noise_gather import RANDOM
from fastdistill.ops.noise_gather.banks import labels, listed

_FRACTION = 2.0**20  # distances are summed as integers, so that the order of the sum does not matter
_LARGEST = 1e6


@dataclass(frozen=True)
class Regions:
    """count: number of regions, at most one per prompt of the pool; None: random prompts are drawn uniformly. every:
    steps between two updates of the table. decay: of the moving average. uniform: fraction of uniform draws. power: of
    the distances."""

    count: Annotated[int, Field(ge=2, le=2**16)] | None = None
    every: Annotated[int, Field(ge=1)] = 50
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.5
    uniform: Annotated[float, Field(ge=0, le=1)] = 0.2
    power: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


def alias_table(weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Returns thresholds and aliases, each [R] int64. To draw: choose a cell r uniformly; keep it if a 32-bit word is
    below its threshold, else take its alias. Vose's construction; the weights need not sum to 1."""
    R, total = len(weights), sum(weights)
    scaled = [weight * R / total for weight in weights]
    kept, alias = [2**32] * R, list(range(R))
    small = [r for r, weight in enumerate(scaled) if weight < 1]
    large = [r for r, weight in enumerate(scaled) if weight >= 1]
    while small and large:
        low, high = small.pop(), large[-1]
        kept[low], alias[low] = int(scaled[low] * 2**32), high
        scaled[high] -= 1 - scaled[low]
        if scaled[high] < 1:
            small.append(large.pop())
    return tuple(torch.tensor(values, dtype=torch.int64, device="cpu") for values in (kept, alias))  # type: ignore[return-value]


class RegionSampler:
    """The regions of a run; steps only read the tables and add to the sums, all in device memory.

    distance: [R] float64, D_r, below 0 if unknown. A checkpoint contains ``common`` (tables, equal on all ranks) and
    ``sums`` (over the samples of all ranks; here only the rank's part).

    Raises:
        InputError: more regions than prompts; prompts that are not in the device's memory, or of several shapes.
    """

    def __init__(self, config: Regions, setting: Setting) -> None:
        banks: Any = setting.prompts
        R, self._pool, device = config.count or 0, len(listed(banks)[0]) - 1, setting.device
        if self._pool < R:
            raise InputError.of("regions.count", f"at most the {self._pool} prompts of the pool", R)
        if setting.others:
            raise InputError.of("regions.count", "None for latents of several shapes", R)
        for name, bank in zip(labels(banks), listed(banks), strict=True):
            if not isinstance(bank, Tensor) or bank.device != device:
                rule = f"prompts in the memory of the {device.type} for regions (banks 'device', not on the disk)"
                raise InputError.of(f"prompts{name}", rule, getattr(bank, "device", type(bank).__name__))
        self.config, self._banks, self._count = config, listed(banks), R
        self._samples = setting.first_sample + torch.arange(setting.batch, device=device)
        first = [r * self._pool // R for r in range(R + 1)]
        self._first = torch.tensor(first[:-1], device=device)
        self._size = torch.tensor([b - a for a, b in itertools.pairwise(first)], device=device)
        self.distance = torch.full((R,), -1.0, dtype=torch.float64, device=device)
        self.threshold = torch.full((R,), 2**32, dtype=torch.int64, device=device)
        self.alias = torch.arange(R, device=device)
        self.total = torch.zeros(R, dtype=torch.int64, device=device)
        self.seen = torch.zeros(R, dtype=torch.int64, device=device)
        if device.type != "meta":
            self._write(self.distance.tolist())

    @property
    def common(self) -> dict[str, Tensor]:
        return {"region_distance": self.distance, "region_threshold": self.threshold, "region_alias": self.alias}

    @property
    def sums(self) -> dict[str, Tensor]:
        return {"region_total": self.total, "region_seen": self.seen}

    def prepare(self, step: int) -> None:
        """Update the table on the host if it is due; only here the host waits for the device."""
        if step == 0 or step % self.config.every or self.distance.device.type == "meta":
            return
        from fastdistill.train import distributed  # imported here: it imports the interface of objectives

        total, seen = distributed.rows(torch.stack([self.total, self.seen])).sum(0).tolist()
        before, decay, after = self.distance.tolist(), self.config.decay, []
        for was, amount, count in zip(before, total, seen, strict=True):
            mean = amount / _FRACTION / max(count, 1)
            after.append(was if not count else mean if was < 0 else decay * was + (1 - decay) * mean)
        self.distance.copy_(torch.tensor(after, dtype=torch.float64, device="cpu"))
        self._write(after)
        self.total.zero_()
        self.seen.zero_()

    def probabilities(self, distance: Sequence[float]) -> list[float]:
        """The probabilities q of the regions."""
        sizes: list[int] = self._size.tolist()
        known = [value for value in distance if value >= 0]
        usual = sum(known) / len(known) if known else 0.0
        each = [d if d >= 0 else usual for d in distance]
        found, whole = self._powers(sizes, each)
        if not 0 < whole < math.inf:  # the powers of none, or beyond floats: the same shares of smaller ones
            found, whole = self._powers(sizes, [d / (max(each) or 1.0) for d in each])
        even = self.config.uniform
        if not 0 < whole < math.inf:
            return [n / self._pool for n in sizes]
        return [even * n / self._pool + (1 - even) * one / whole for n, one in zip(sizes, found, strict=True)]

    def _powers(self, sizes: Sequence[int], distance: Sequence[float]) -> tuple[list[float], float]:
        """n D^power of the regions, and their sum."""
        try:
            found = [n * d**self.config.power for n, d in zip(sizes, distance, strict=True)]
        except OverflowError:
            return [], math.inf
        return found, sum(found)

    def _write(self, distance: Sequence[float]) -> None:
        threshold, alias = alias_table(self.probabilities(distance))
        self.threshold.copy_(threshold)
        self.alias.copy_(alias)

    def rows(self, counter: Tensor, samples: Tensor) -> Tensor:
        """Rows of the pool [B] int64 for sample numbers; uses stream 13 of ``ops.philox``."""
        zero = torch.zeros_like(counter[0])
        cell, keep, row, _ = philox.words(counter[0], counter[1], samples, zero, philox.REGION)
        region = philox.below(cell, self._count)
        region = torch.where(keep < self.threshold[region], region, self.alias[region])
        size = self._size[region]
        within = (row * (size >> 16) + ((row * (size & 0xFFFF)) >> 16)) >> 16  # ``philox.below`` for sizes in a tensor
        return self._first[region] + within

    def put(self, draw: Draw[Any], counter: Tensor, samples: Tensor | None = None) -> Draw[Any]:
        """The batch with other random prompts. ``samples``: sample numbers; None: those of the step's own batch."""
        row = self.rows(counter, self._samples if samples is None else samples)
        chosen = draw.choice == RANDOM
        for bank, drawn in zip(self._banks, listed(draw.prompt), strict=True):
            where = chosen.view(-1, *[1] * (drawn.dim() - 1))
            drawn.copy_(torch.where(where, bank.index_select(0, row).to(drawn.dtype), drawn))
        draw.prompt_index.copy_(torch.where(chosen, row, draw.prompt_index))
        return draw

    @torch.no_grad()
    def add(self, draw: Draw[Any], distances: Tensor, choices: tuple[int, ...]) -> None:
        """Record the distances [B] of samples with one of these choices, for a batch or a part of it."""
        row = draw.prompt_index
        counted = (row >= 0) & (row < self._pool)
        counted &= torch.stack([draw.choice == choice for choice in choices]).any(0)
        region = torch.div((row.clamp(0, self._pool - 1) + 1) * self._count - 1, self._pool, rounding_mode="floor")
        whole = (distances.nan_to_num(0.0).clamp(0, _LARGEST) * _FRACTION).round().to(torch.int64)
        self.total.index_add_(0, region, torch.where(counted, whole, 0))
        self.seen.index_add_(0, region, counted.to(torch.int64))
