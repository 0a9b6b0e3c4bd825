# SPDX-License-Identifier: Apache-2.0
"""The seconds in which a training waits."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistill.train import checkpoint
from fastdistill.train.waits import Waits
from tests import tiny

SLOW = 0.05  # seconds


def slowly(act: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*given: Any) -> Any:
        time.sleep(SLOW)
        return act(*given)

    return slow


def test_data_and_checkpoints_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first checkpoint is written during the second step. The second checkpoint has to wait for that write; this
    wait comes after the second line of metrics."""
    quick = tiny.trainer(steps=4, checkpoint_every=1).fit().history
    assert all(line["waited_data"] > 0 and line["waited_checkpoint"] < SLOW for line in quick)
    run = tiny.trainer(steps=4, checkpoint_every=1)
    monkeypatch.setattr(run.step, "prepare", slowly(run.step.prepare))
    monkeypatch.setattr(checkpoint, "save", slowly(slowly(slowly(checkpoint.save))))
    lines = run.fit(tmp_path).history
    assert all(line["waited_data"] >= SLOW for line in lines)
    assert lines[0]["waited_checkpoint"] == 0 and all(line["waited_checkpoint"] >= SLOW for line in lines[2:])
    last = lines[-1]
    assert sum(line["waited_data"] + line["waited_checkpoint"] for line in lines) <= last["seconds"]


class Mark:
    """An event that a device reaches at ``at`` milliseconds; ``now``: the device's current time."""

    now = 0.0

    def __init__(self, at: float) -> None:
        self.at = at

    def query(self) -> bool:
        return self.at <= Mark.now

    def elapsed_time(self, other: Mark) -> float:
        return other.at - self.at


def test_on_a_gpu_it_is_the_stream_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans that the device has not yet reached are reported later; many are added before they are read."""
    waits = Waits(torch.device("cuda"))
    marks = iter([Mark(at) for step in range(100) for at in (10.0 * step, 10.0 * step + 4)])
    monkeypatch.setattr(waits, "_event", lambda: next(marks))
    Mark.now = 505.0
    for _ in range(100):
        with waits("data"):
            pass
    assert len(waits._spans) <= 64
    assert waits.taken() == pytest.approx({"waited_data": 51 * 0.004, "waited_checkpoint": 0.0})
    Mark.now = 1000.0
    assert waits.taken() == pytest.approx({"waited_data": 49 * 0.004, "waited_checkpoint": 0.0})
    assert waits.taken() == {"waited_data": 0.0, "waited_checkpoint": 0.0}
