# SPDX-License-Identifier: Apache-2.0
"""Finds problems of a run in its metrics."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from fastdistill.train.waits import WAITED

GROWTH = 10.0  # a term is reported above this multiple of its median
COLLAPSED = 1e-3  # a feature has collapsed below this fraction of its earlier spread and of the teacher's
_LINES = 20  # number of lines for the median
_FEWEST = 3
_SKIPPED = 0.1  # share of the updates of an interval
_OTHER = ("step", "seconds", "skipped", "gradient_norm", "right", *WAITED.values())
SPREAD = "spread/"


def terms(metrics: Mapping[str, float]) -> list[str]:
    """The names of the loss and its parts in a line of the metrics."""
    return [name for name in metrics if name not in _OTHER and not name.startswith(SPREAD)]


def spreads(metrics: Mapping[str, float]) -> dict[str, float]:
    """The spread of the student's feature at each tap, by its module (``fastdistill.distill.knowledge``)."""
    return {name.removeprefix(SPREAD): value for name, value in metrics.items() if name.startswith(SPREAD)}


def concerns(history: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """The problems in the last line of a run's metrics, by term: a part of the loss (for a tap, ``feature/<module>``)
    that is more than ten times its median over the previous 20 lines; ``spread/<module>`` if the student's feature at a
    tap has collapsed; ``skipped`` if more than a tenth of the updates since the previous line were skipped.

    A feature has collapsed if its spread is below a thousandth of its earlier spread (the maximum of the first line and
    the previous 20 lines) and of the teacher's spread, or below a millionth of the teacher's spread.
    """
    if len(history) <= _FEWEST:
        return {}
    last, before = history[-1], history[-1 - _LINES : -1]
    found = {}
    for name in terms(last):
        known = [line[name] for line in before if name in line]
        usual = statistics.median(known) if len(known) >= _FEWEST else 0.0
        if usual > 0 and last[name] > GROWTH * usual:
            found[name] = f"{name} is {last[name]:.3g}, {last[name] / usual:.0f} times its median of {usual:.3g}"
    for tap, spread in spreads(last).items():
        was = max(line.get(SPREAD + tap, 0.0) for line in (history[0], *before))
        if spread < COLLAPSED * min(max(was, COLLAPSED), 1.0):
            text = f"{spread:.2g} of the teacher's, at most {was:.2g} before"
            found[SPREAD + tap] = f"the student's feature at {tap} has collapsed: between samples it differs by {text}"
    steps, skipped = (last[name] - before[-1][name] for name in ("step", "skipped"))
    if skipped > _SKIPPED * steps:
        found["skipped"] = f"{skipped:.0f} of {steps:.0f} updates were skipped, as their gradients were not finite"
    return found
