# SPDX-License-Identifier: Apache-2.0
"""The short form of ``make soak``: a few kills during a short run, with forked processes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from fastdistill import runs
from fastdistill.train import checkpoint
from fastdistill.train.config import to_yaml
from tests import soak
from tests.tasks.test_digits_run import run_config


@pytest.mark.parametrize(("ranks", "kills"), [(1, 2), (2, 2)])
def test_killed_at_random_a_run_ends_with_the_same_bits(tmp_path: Path, ranks: int, kills: int) -> None:
    often = {"log_every": 3, "checkpoint_every": 2}
    outcome = soak.soak(tmp_path, ranks, 40, kills, 4, soak.Forked, early=1.0, **often)
    assert not outcome.unlike and len(outcome.kills) == kills
    assert [kill.begun <= kill.reached < 40 for kill in outcome.kills] == [True] * kills


@pytest.mark.slow
def test_a_rank_that_is_killed_under_torchrun_is_named_by_the_other(tmp_path: Path) -> None:
    """Although torchrun then ends that other rank with SIGTERM."""
    config = run_config(tmp_path, train={"steps": 10**6, "checkpoint_every": 2, "execution": "eager"}, log=["jsonl"])
    (file := tmp_path / "run.yaml").write_text(to_yaml(config))
    runs.cache(config)
    sitting = soak.Command(file, 2)
    soak.until(lambda: soak.newest(tmp_path / "run") >= 4, sitting)
    soak.kill(sitting.ranks()[:1])
    assert soak.ended(sitting, soak.PATIENCE) != 0
    said = r"^fastdistill: rank [01] has died or hangs; the last checkpoint is intact$"
    assert re.search(said, file.with_suffix(".log").read_text(), re.MULTILINE)


@pytest.mark.slow
def test_of_the_command_under_torchrun(tmp_path: Path) -> None:
    assert not soak.soak(tmp_path, 2, 60, 2, 0, soak.Command, checkpoint_every=2).unlike


def test_a_run_that_ends_otherwise_is_seen(tmp_path: Path) -> None:
    """A difference in one bit of a tensor, in a value, in a line of the metrics, or an additional file."""
    state = {"weights": torch.ones(3), "none": torch.zeros(())}
    head = {
        "schema": checkpoint.SCHEMA,
        "step": 2,
        "seconds": 1.0,
        "fingerprint": {},
        "trained": [],
        "values": {"a": 1},
    }
    lines = [{"step": 2, "loss": 0.5, "seconds": 1.0}]

    def made(name: str, state=state, head=head, lines=lines) -> Path:  # type: ignore[no-untyped-def]
        place = tmp_path / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        checkpoint.save(place, state, head)
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return place

    alone = made("alone")
    assert soak.unlike(alone, made("b", head={**head, "seconds": 7.0}, lines=[{**lines[0], "seconds": 9.0}]), 2) == []
    assert soak.unlike(alone, made("b", state={**state, "none": torch.tensor(-0.0)}), 2) == ["none"]
    assert soak.unlike(alone, made("b", head={**head, "values": {"a": 2}}), 2) == ["a"]
    assert soak.unlike(alone, made("b", lines=[{**lines[0], "loss": 0.6}]), 2) == ["metrics.jsonl"]
    assert soak.unlike(alone, made("b", lines=lines * 2), 2) == ["metrics.jsonl"]
    (made("b") / ".left.tmp").touch()
    assert soak.unlike(alone, tmp_path / "b", 2) == [".left.tmp"]
