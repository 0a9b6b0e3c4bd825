# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: every round runs each contestant once, so that a machine that drifts drifts for all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Median and interquartile range of the rounds, in milliseconds."""

    median: float
    spread: float


def interleaved(
    contestants: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 3
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Times of each contestant, and for all but the first the median over rounds of its time by the first's."""
    for _ in range(warm_up):
        for run in contestants.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    ours, *rivals = times
    ratios = {r: statistics.median(b / a for a, b in zip(times[ours], times[r], strict=True)) for r in rivals}
    return {name: _summary(values) for name, values in times.items()}, ratios


def _summary(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4)
    return Timing(median, high - low)
