# SPDX-License-Identifier: Apache-2.0
"""What a run records about itself in its directory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastdistill import runs
from fastdistill.errors import FastdistillError
from fastdistill.runs import about
from fastdistill.runs.about import ABOUT, About
from tests.runs.conftest import cached, run_config


def test_of_a_run_that_fails(saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``micro_batch``, the run has a plan."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/fastdistill", "distill", "my run.yaml"])
    config = cached(run_config(saved("sd"), tmp_path, train={"micro_batch": 2}))
    told: list[str] = []
    seen: list[dict[str, float]] = []

    def progress(done: int, metrics: dict[str, float] | None) -> None:
        if metrics is not None:
            seen.append(metrics)
        if done == 2:
            raise ValueError("of my own")

    with pytest.raises(ValueError, match="of my own"):
        runs.distill(config, tell=told.append, progress=progress)
    found = json.loads((Path(config.directory) / ABOUT).read_text())
    assert found["command"] == "fastdistill distill 'my run.yaml'" and found["lines"] == told
    assert found["device"].startswith("CPU (") and found["versions"]["torch"] == torch.__version__
    assert found["ended"] == "ValueError: of my own" and len(seen) == 2 and all(line["mfu"] > 0 for line in seen)
    said = next(line for line in told if "GFLOP per image; CPU reaches" in line)
    assert found["flops"] == pytest.approx(4e9 * float(said.split()[0]), rel=0.01)
    assert found["ceiling"] > 0 and found["source"] == "measured" and told[-1].startswith("first step: eager (auto")


def test_what_float8_does_to_the_target(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """One line at the start, kept in the directory; and the student is exported as ever."""
    config = cached(run_config(saved("pixart_sigma"), tmp_path, train={"teacher_fp8": True}))
    told: list[str] = []
    runs.distill(config, tell=told.append)
    (line,) = (line for line in told if line.startswith("fp8 teacher: target changes by "))
    found = json.loads((Path(config.directory) / ABOUT).read_text())
    assert line in found["lines"] and told.index(line) == 1
    assert "float8_e4m3fn" in told[0].split(";")[0] and "float8" not in told[0].split(";")[1]


def test_of_steps_in_the_time_since_the_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = About(tmp_path, torch.device("cpu"), None)
    clock = iter([10.0, 12.0, 13.0, 13.0])
    monkeypatch.setattr(about.time, "perf_counter", lambda: next(clock))
    said.begin(100)
    assert said.utilization(110) == {}  # no plan
    said.values |= {"flops": 1e9, "ceiling": 1e11}
    assert said.utilization(120) == pytest.approx({"mfu": 0.1})
    assert said.utilization(120) == {}


def test_a_disk_that_is_full_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / ABOUT).mkdir()
    with pytest.warns(UserWarning, match=r"about.json.*; the report of the run will lack it"):
        About(tmp_path, torch.device("cpu"), None).add(["a line"])
    with pytest.warns(UserWarning, match="will lack it"):
        About(tmp_path, torch.device("cpu"), None).end(FastdistillError("nan"))
