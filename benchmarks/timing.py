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
    contestants: Mapping[str, Callable[[], object]], rounds: int, seconds: float = 2.0
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Times of each contestant, and for all but the first the median over rounds of its time by the first's.

    At least ``rounds`` are counted, and as many as fit into ``seconds``; a tenth of both goes before, uncounted.
    """
    _times(contestants, max(rounds // 10, 3), seconds / 10)
    times = _times(contestants, rounds, seconds)
    ours, *rivals = times
    ratios = {r: statistics.median(b / a for a, b in zip(times[ours], times[r], strict=True)) for r in rivals}
    return {name: _summary(values) for name, values in times.items()}, ratios


def _times(contestants: Mapping[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contestants}
    begin = time.perf_counter()
    while len(next(iter(times.values()))) < rounds or time.perf_counter() - begin < seconds:
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _summary(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4)
    return Timing(median, high - low)
