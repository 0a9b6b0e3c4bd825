# SPDX-License-Identifier: Apache-2.0
"""``fastdistill cache``, killed by SIGKILL during a write: the same command continues, and no temporary file is
left."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path

import pytest

from fastdistill import files, runs
from fastdistill.cli import main
from fastdistill.train.config import to_yaml
from tests import processes, soak
from tests.data.caches import content
from tests.tasks.test_digits_run import run_config

PLACES = ("prompts", "latents")


def run_file(place: Path) -> Path:
    """A run whose cache in ``place`` has many shards."""
    place.mkdir()
    files.atomic_write(place / "run.yaml", to_yaml(run_config(place, cache={"rows_per_shard": 8})).encode())
    return place / "run.yaml"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    def make(place: Path) -> None:
        runs.cache(runs.load(run_file(place)))

    place = processes.once(tmp_path_factory, "whole-cache", make)
    return {name: content(place / "cache" / name) for name in PLACES}


def litter(cache: Path) -> list[str]:
    """Files that only a killed process leaves."""
    hidden = (path for path in cache.rglob(".*") if path.is_file())
    return sorted(p.name for p in hidden if p.name not in (".lock", ".writers", ".hashes.json"))


def killed(file: Path, place: str, call: int) -> None:
    """SIGKILL at the n-th sync of a file or folder in a folder."""
    real, calls = os.fsync, itertools.count(1)

    def fsync(descriptor: int) -> None:
        if f"/{place}" in os.readlink(f"/proc/self/fd/{descriptor}") and next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    pytest.MonkeyPatch().setattr(os, "fsync", fsync)
    main(["cache", str(file)])


#: The n-th sync of: the hashes of the models, a shard with its lock, the manifest after it.
KILLS: dict[tuple[str, int], tuple[str, ...]] = {
    ("cache/..hashes", 1): ("..hashes.json.",),
    ("latents", 3): (".shard-00000.safetensors.",) * 2,
    ("latents", 9): (".manifest.json.", ".shard-00001.safetensors.lock"),
}


@pytest.mark.parametrize(("place", "call"), KILLS)
def test_a_killed_cache_goes_on(tmp_path: Path, whole: dict[str, dict[str, bytes]], place: str, call: int) -> None:
    file = run_file(tmp_path / "killed")
    process = processes.begin(killed, file, place, call)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    left = litter(cache := tmp_path / "killed" / "cache")
    assert len(left) == len(KILLS[place, call]) and all(map(str.startswith, left, KILLS[place, call])), left
    assert main(["cache", str(file)]) == 0
    assert {name: content(cache / name) for name in PLACES} == whole and litter(cache) == []


def test_a_kill_after_the_last_shard_leaves_nothing_either(tmp_path: Path) -> None:
    """Although nothing is left to do."""
    file = run_file(tmp_path / "done")
    runs.cache(runs.load(file))
    cache = tmp_path / "done" / "cache"
    for name in ("prompts/.shard-00000.safetensors.lock", "latents/.shard-00000.safetensors.1-ab.tmp"):
        (cache / name).touch()
    runs.cache(runs.load(file))
    assert litter(cache) == []


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["one rank", "all"])
def test_under_torchrun(tmp_path: Path, whole: dict[str, dict[str, bytes]], victim: str) -> None:
    file = run_file(tmp_path / "killed")
    cache = tmp_path / "killed" / "cache"
    sitting = soak.Command(file, 2, "cache")
    soak.until(lambda: (cache / "latents" / "shard-00001.safetensors").exists(), sitting)
    ranks = sitting.ranks()
    soak.kill([*sitting.others(), *ranks] if victim == "all" else ranks[1:])
    assert soak.ended(sitting, soak.PATIENCE) != 0
    assert soak.ended(soak.Command(file, 2, "cache"), soak.PATIENCE) == 0
    assert {name: content(cache / name) for name in PLACES} == whole and litter(cache) == []
