# SPDX-License-Identifier: Apache-2.0
"""What the metrics of a run say about its course."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

GROWTH = 10.0  # times the median of the lines before
_LINES = 20  # that the median is of
_FEWEST = 3
_SKIPPED = 0.1  # share of the updates of an interval
_OTHER = ("step", "seconds", "skipped", "gradient_norm", "right")


def terms(metrics: Mapping[str, float]) -> list[str]:
    """The names of the loss and its parts in a line of the metrics."""
    return [name for name in metrics if name not in _OTHER]


def concerns(history: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """What is wrong in the last line of a run's metrics, by the term that shows it: a part of the loss (of a tap,
    ``feature/<module>``) that is more than ten times its median over the 20 lines before, or ``skipped`` where a tenth
    of the updates since the line before were skipped."""
    if len(history) <= _FEWEST:
        return {}
    last, before = history[-1], history[-1 - _LINES : -1]
    found = {}
    for name in terms(last):
        known = [line[name] for line in before if name in line]
        usual = statistics.median(known) if len(known) >= _FEWEST else 0.0
        if usual > 0 and last[name] > GROWTH * usual:
            found[name] = f"{name} is {last[name]:.3g}, {last[name] / usual:.0f} times its median of {usual:.3g}"
    steps, skipped = (last[name] - before[-1][name] for name in ("step", "skipped"))
    if skipped > _SKIPPED * steps:
        found["skipped"] = f"{skipped:.0f} of {steps:.0f} updates were skipped, as their gradients were not finite"
    return found
