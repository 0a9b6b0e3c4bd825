# SPDX-License-Identifier: Apache-2.0
"""The time of a step, operator by operator: what its products, its bytes or its launch take at the least."""

from __future__ import annotations

import numpy as np

from fastdistill.plan.cards import Card
from fastdistill.plan.trace import Trace

PHASES = ("draw", "teacher", "student", "backward", "step", "optimizer")
_ONCE = ("draw", "optimizer")  # a step, not a part of its batch
_THROTTLED = 0.9  # of the speed of its first seconds that a GPU keeps up


def flops(trace: Trace) -> dict[str, int]:
    """Floating-point operations of a sample in each phase that has some."""
    samples = trace.unit * trace.parts
    found: dict[str, int] = {}
    for phase, operations, _, _ in trace.work:
        found[phase] = found.get(phase, 0) + operations
    return {phase: found[phase] // samples for phase in PHASES if found.get(phase)}


def seconds(trace: Trace, micro_batch: int, batch: int, card: Card) -> dict[str, float]:
    """Time of a step of ``batch`` samples, ``micro_batch`` at once, in each phase, in the long run.

    Each operator takes what is longest: its operations at the card's speed of products, its bytes at the card's speed
    of copies, or a launch. The whole step is no faster than the card is in a long run.
    """
    phases, *work = zip(*trace.work, strict=True)
    operations, fixed, grown = np.asarray(work, dtype=np.float64) / [[trace.unit], [1], [trace.unit]]
    once = np.isin(phases, _ONCE)
    samples = np.where(once, batch / trace.parts, micro_batch)
    longest = np.maximum(operations * samples / card.matmul, (fixed + grown * samples) / card.copy)
    times = np.maximum(longest, card.launch) * np.where(once, 1, batch / micro_batch / trace.parts)
    if card.device == "cuda":
        times /= _THROTTLED
    slowest = sum(flops(trace).values()) * batch / card.sustained
    times *= max(1.0, slowest / times.sum())
    return {phase: float(times[np.asarray(phases) == phase].sum()) for phase in PHASES}
