# SPDX-License-Identifier: Apache-2.0
"""Functions that experiments share: the command in a report, and the time of all calls together."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastdistill.cli import main
from fastdistill.tasks import workers
from fastdistill.tasks.context import demo_config as context
from fastdistill.tasks.digits.config import DigitsConfig
from fastdistill.tasks.guidance import demo_config as guidance
from fastdistill.train.config import from_yaml


@pytest.mark.parametrize("quick", [False, True])
def test_the_command_gives_the_configuration(quick: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    default = DigitsConfig(quick=quick).resolved()
    assert workers.command("demo digits", default, default) == "fastdistill demo digits" + " --quick" * quick
    train = dataclasses.replace(default.train, lr=1e-3, fuse=True, trackers=("tensorboard",))
    changed = dataclasses.replace(default, seeds=2, student="blocks", channels=(8, 16), train=train, workers=1)
    line = workers.command("demo digits", changed, default)
    assert "workers" not in line  # it does not change results
    assert main([*shlex.split(line)[1:], "--dry-run"]) == 0
    (tmp_path / "given.yaml").write_text(capsys.readouterr().out)
    given = from_yaml(DigitsConfig, tmp_path / "given.yaml").resolved()
    assert dataclasses.replace(given, workers=1) == changed
    assert yaml.safe_load((tmp_path / "given.yaml").read_text())["seeds"] == 2


@pytest.mark.parametrize("before", [None, "7.5", "[]", "damaged"])
def test_seconds_are_those_of_all_sittings(tmp_path: Path, before: str | None) -> None:
    file = tmp_path / "seconds.json"
    if before is not None:
        file.write_text(before)
    first = 7.5 if before == "7.5" else 0.0
    with pytest.raises(KeyboardInterrupt), workers.timed(file) as spent:
        assert first < spent() < first + 1
        raise KeyboardInterrupt
    kept = float(file.read_text())
    assert kept > first
    with workers.timed(file) as spent:
        assert spent() > kept


def test_kernels_of_all_processes() -> None:
    results = [{"backend": {"a": ["cpp"], "b": ["reference"]}}, {"backend": {"a": ["cpp", "reference"]}}]
    assert workers.backend(results) == {"a": "cpp, reference", "b": "reference"}


@pytest.mark.parametrize("kind", [guidance.DemoConfig, context.DemoConfig])
def test_the_command_of_a_full_experiment_is_short(kind: Any) -> None:
    name = kind.__module__.split(".")[-2]
    config = kind(full=True, seeds=3).resolved()
    assert workers.command(f"demo {name}", config, kind(full=True).resolved()) == (
        f"fastdistill demo {name} --full --seeds 3"
    )
