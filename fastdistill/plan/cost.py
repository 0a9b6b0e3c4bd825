# SPDX-License-Identifier: Apache-2.0
"""The time of a step, operator by operator: the minimum time of its operations, its bytes or its launch."""

from __future__ import annotations

import numpy as np

from fastdistill.plan.cards import Card
from fastdistill.plan.trace import Trace

PHASES = ("draw", "teacher", "student", "backward", "step", "optimizer")
_ONCE = ("draw", "optimizer")  # once per step, not once per part of the batch
_THROTTLED = 0.9  # fraction of its initial speed that a GPU sustains


def flops(trace: Trace) -> dict[str, int]:
    """Floating-point operations per sample, by phase."""
    samples = trace.unit * trace.parts
    found: dict[str, int] = {}
    for phase, operations, _, _ in trace.work:
        found[phase] = found.get(phase, 0) + operations
    return {phase: found[phase] // samples for phase in PHASES if found.get(phase)}


def seconds(trace: Trace, micro_batch: int, batch: int, card: Card) -> dict[str, float]:
    """Seconds of a step with ``batch`` samples, ``micro_batch`` at once, by phase, in a long run.

    Each operator takes the longest of three times: its operations at the card's matmul speed, its bytes at the card's
    copy speed, or a launch. The whole step is not faster than the card's sustained speed.
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
