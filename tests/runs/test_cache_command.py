# SPDX-License-Identifier: Apache-2.0
"""``fastdistill cache``: what it prints, on one and on several processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastdistill import runs
from fastdistill.cli import main
from fastdistill.commands import cache
from fastdistill.files import atomic_write
from fastdistill.train.config import to_yaml
from tests.data.caches import content
from tests.runs.conftest import run_config

Saved = Callable[[str], Path]


def run_file(saved: Saved, directory: Path, name: str) -> Path:
    """A run whose cache has this name."""
    changes = {"directory": str(directory / name), "sizes": [[32, 32]], "rows_per_shard": 1, "batch": 1}
    config = run_config(saved("sd"), directory, cache=changes)
    atomic_write(directory / f"{name}.yaml", to_yaml(config).encode())
    return directory / f"{name}.yaml"


def test_what_it_prints(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(run_file(saved, tmp_path, "one"))
    assert main(["cache", file, "--only", "prompts"]) == 0
    out, error = capsys.readouterr()
    assert out == f"{tmp_path / 'one'}: 6 encodings and 0 latents, of which 6 are new\n" and "prompts" in error
    assert main(["cache", file, "--json"]) == 0
    out, error = capsys.readouterr()
    assert not error and json.loads(out) == {
        "prompts": str(tmp_path / "one" / "prompts"),
        "latents": [str(tmp_path / "one" / "latents-32x32")],
        "texts": 6,
        "samples": 6,
        "made": 6,
    }
    assert main(["cache", file]) == 0
    assert capsys.readouterr().out.endswith("6 encodings and 6 latents, of which 0 are new\n")
    assert main(["cache", file, "--seed", "3"]) == 2
    assert "seed: expected 3, got 0" in capsys.readouterr().err


def test_the_time_that_is_left_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(cache.time, "perf_counter", lambda: now)
    stage = cache._Stage(task=cache.TaskID(0), begun=0.0, first=100)
    now = 8.0
    assert stage.estimate(100, 10_000) is None
    assert stage.estimate(116, 10_000) == "about 82 minutes"  # 16 rows in 8 seconds
    assert stage.estimate(132, 10_000) is None
    assert cache._Stage(cache.TaskID(0), 0.0, 0).estimate(1, 8101) == "about 18.0 hours"
    assert cache._Stage(cache.TaskID(0), 0.0, 0).estimate(16, 32) is None


@pytest.mark.slow
def test_processes_of_torchrun_share_the_work(saved: Saved, tmp_path: Path) -> None:
    runs.cache(runs.load(run_file(saved, tmp_path, "one")))
    file = run_file(saved, tmp_path, "two")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fastdistill", "cache"]
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("encodings and 6 latents") == 1
    for place in ("prompts", "latents-32x32"):
        assert content(tmp_path / "one" / place) == content(tmp_path / "two" / place)
