# SPDX-License-Identifier: Apache-2.0
"""The progress line of a training, in a terminal and in a log."""

from __future__ import annotations

import io
import itertools
import re

import pytest
from rich.console import Console

from fastdistill.commands import _training
from fastdistill.commands._bars import Bars

LINE = {"step": 100, "loss": 0.0123456, "mfu": 0.342, "skipped": 2.0, "seconds": 1e5, "waited_data": 0.36,
        "waited_checkpoint": 0.12}  # fmt: skip


def course(monkeypatch: pytest.MonkeyPatch, terminal: bool, seconds: float) -> tuple[Bars, _training.Course]:
    """A run of 400,000 steps with 256 images; each read of its clock advances it by ``seconds``."""
    monkeypatch.setattr(_training.time, "perf_counter", itertools.count(50, seconds).__next__)
    bars = Bars()
    bars.console.file, bars.console.is_interactive = io.StringIO(), terminal
    return bars, _training.Course(bars, 400_000, 256)


def test_what_is_said() -> None:
    """Waits below a hundredth of the time are not shown, nor the number of skipped updates if it is 0."""
    assert _training.said(LINE, 12.0) == "loss 0.0123, MFU 34%, 2 skipped, data 3%, saves 1%"
    quiet = LINE | {"skipped": 0.0, "waited_checkpoint": 0.11}
    del quiet["mfu"]
    assert _training.said(quiet, 12.0) == "loss 0.0123, data 3%"


def test_a_log_has_a_line_for_each_of_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """The speed is that of the interval, also in a continued run."""
    bars, line = course(monkeypatch, False, 10.0)
    for done, metrics in ((300_000, None), (300_100, LINE), (300_150, None), (300_200, LINE)):
        line.show(done, metrics)
    file = bars.console.file
    assert isinstance(file, io.StringIO)
    assert file.getvalue().splitlines() == [
        "step 300,100 of 400,000: loss 0.0123, MFU 34%, 2 skipped, data 4%, saves 1%; 10 it/s 2,560 img/s, "
        "2:46:30 left",
        "step 300,200 of 400,000: loss 0.0123, MFU 34%, 2 skipped, data 2%; 5 it/s 1,280 img/s, 4:09:30 left",
    ]


@pytest.mark.parametrize("columns", [100, 120])
def test_a_terminal_of_a_hundred_columns_has_room(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """In a narrow terminal, only the bar shrinks."""
    bars, line = course(monkeypatch, True, 6.0)
    bars.get_time = itertools.count(0, 0.5).__next__
    for done, metrics in ((123_400, None), (123_406, None), (123_456, LINE)):
        line.show(done, metrics)
    console = Console(file=io.StringIO(), width=columns, force_terminal=True, color_system=None)
    console.print(bars.get_renderable())
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue().rstrip("\n")
    assert "…" not in text and "\n" not in text and len(text) <= columns
    said = "loss 0.0123, MFU 34%, 2 skipped, data 3%, saves 1%"
    assert re.fullmatch(said + r" ━[━╸╺ ]+ 123456/400000 [\d.]+ it/s [\d,]+ img/s \d:\d\d:\d\d", text)
