# SPDX-License-Identifier: Apache-2.0
"""Shows the progress of a training: in a terminal one line that is updated, in a log one line per line of metrics."""

from __future__ import annotations

import datetime
import time

from fastdistill.commands._bars import Bars, rate
from fastdistill.train.waits import WAITED

_SHARE = 0.01  # waits below this fraction of the time are not shown


class Course:
    """``show`` is the ``progress`` argument of ``runs.distill``, for ``steps`` steps with ``batch`` images each."""

    def __init__(self, bars: Bars, steps: int, batch: int) -> None:
        self._bars, self._steps, self._batch = bars, steps, batch
        self._task = bars.begin("distill", steps) if bars.console.is_interactive else None
        self._text = "distill"
        self._first: tuple[int, float] | None = None  # steps done at the start, and when that was
        self._last = 0, 0.0  # the same at the last line

    def show(self, done: int, metrics: dict[str, float] | None) -> None:
        now = done, time.perf_counter()
        if self._first is None:
            self._first = self._last = now
        if metrics is not None:
            seconds = max(now[1] - self._last[1], 1e-9)
            self._text = said(metrics, seconds)
            if self._task is None and not self._bars.disable:
                speed = rate((done - self._last[0]) / seconds, self._batch)
                line = f"step {done:,} of {self._steps:,}: {self._text}; {speed}, {self._left(now)} left"
                self._bars.console.print(line, highlight=False, soft_wrap=True)
            self._last = now
        if self._task is not None:
            self._bars.show(self._task, done, self._text, self._batch)

    def _left(self, now: tuple[int, float]) -> datetime.timedelta:
        assert self._first is not None
        each = (now[1] - self._first[1]) / max(now[0] - self._first[0], 1)
        return datetime.timedelta(seconds=round((self._steps - now[0]) * each))


def said(metrics: dict[str, float], seconds: float) -> str:
    """A line of metrics as text; ``seconds``: time since the previous line."""
    text = f"loss {metrics['loss']:.3g}"
    if "mfu" in metrics:
        text += f", MFU {100 * metrics['mfu']:.2g}%"
    if metrics["skipped"]:
        text += f", {metrics['skipped']:.0f} skipped"
    for name, cause in {"data": "data", "saves": "checkpoint"}.items():
        share = metrics[WAITED[cause]] / seconds
        if share >= _SHARE:
            text += f", {name} {share:.0%}"
    return text
