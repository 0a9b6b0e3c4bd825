# SPDX-License-Identifier: Apache-2.0
"""Several processes write one directory: they share its shards, and the bytes are those of a single process."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import files
from fastdistill.data import shards
from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.manifest import read_manifest
from fastdistill.errors import InputError, StorageError
from tests import processes
from tests.data.caches import content, make, teacher

Generate = Callable[[Tensor, Tensor], Tensor]


def until(condition: Callable[[], bool], process: ForkServerProcess | None = None) -> None:
    end = time.monotonic() + 60
    while not condition() and (process is None or process.is_alive()):
        assert time.monotonic() < end
        time.sleep(0.005)


def counted(made: list[int], before: Generate = teacher) -> Generate:
    def generate(rows: Tensor, prompts: Tensor) -> Tensor:
        made.extend(rows.tolist())
        return before(rows, prompts)

    return generate


def stuck(rows: Tensor, prompts: Tensor) -> Tensor:
    """Makes the first shard and hangs in the second."""
    if rows[0] >= 6:
        time.sleep(600)
    return teacher(rows, prompts)


def other(path: Path, log: Path) -> None:
    """One of two writers: waits for the other one before its first row, and logs the rows that it makes."""
    made: list[int] = []
    (log / f"{os.getpid()}.here").touch()
    until(lambda: len(list(log.glob("*.here"))) == 2)
    make(path, counted(made, lambda rows, prompts: (time.sleep(0.05), teacher(rows, prompts))[1]), rows_per_shard=3)
    assert read_manifest(path).complete
    (log / f"{os.getpid()}.rows").write_text(" ".join(map(str, made)))


def test_two_processes_share_the_shards(tmp_path: Path) -> None:
    make(tmp_path / "alone", rows_per_shard=3)
    (tmp_path / "log").mkdir()
    both = [processes.begin(other, tmp_path / "shared", tmp_path / "log") for _ in range(2)]
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    assert content(tmp_path / "shared") == content(tmp_path / "alone")
    rows = [[int(row) for row in file.read_text().split()] for file in (tmp_path / "log").glob("*.rows")]
    assert sorted(rows[0] + rows[1]) == list(range(23)) and all(rows)
    assert not list((tmp_path / "shared").glob(".shard-*"))


def test_what_a_killed_writer_leaves_goes_to_the_others(tmp_path: Path, whole: dict[str, bytes]) -> None:
    process = processes.begin(make, tmp_path, stuck)
    until((tmp_path / ".shard-00001.safetensors.lock").exists, process)
    made: list[int] = []
    seen: list[tuple[int, int]] = []

    def progress(*done: int) -> None:
        seen.append((done[0], done[1]))
        if done[0] == 17 and seen.count((17, 23)) == 2:  # only its own shard is missing: the other one waits for it
            process.kill()
            process.join()

    try:
        make(tmp_path, counted(made), progress=progress)
    finally:
        process.kill()
    assert made == [*range(12, 23), *range(6, 12)] and seen[-1] == (23, 23)
    assert content(tmp_path) == whole


def failing(path: Path, generate: Generate) -> None:
    with contextlib.suppress(InputError):
        make(path, generate)


def not_finite(rows: Tensor, prompts: Tensor) -> Tensor:
    time.sleep(0.05)
    return teacher(rows, prompts) * torch.where(rows == 13, torch.nan, 1.0)[:, None, None, None]


def test_what_one_cannot_make_ends_all_with_its_message(tmp_path: Path) -> None:
    process = processes.begin(failing, tmp_path, not_finite)
    with pytest.raises(InputError, match=r"expected latents that are finite as torch\.float16, got row 13"):
        make(tmp_path, not_finite)
    process.join(60)
    assert process.exitcode == 0 and 2 not in read_manifest(tmp_path).shards


def test_others_do_not_write_what_is_made_differently(tmp_path: Path) -> None:
    process = processes.begin(make, tmp_path, stuck)
    try:
        until((tmp_path / ".shard-00001.safetensors.lock").exists, process)
        before = content(tmp_path)
        for changes in ({"batch": 2, "dtype": torch.float32}, {"fingerprint": {"teacher": "b"}}):
            different: dict[str, Any] = changes
            with pytest.raises(StorageError, match="made differently"):
                make(tmp_path, None, **different)
        assert content(tmp_path) == before
        with pytest.raises(StorageError, match="unfinished: it has 6 of 23 rows"):
            LatentCache.load(tmp_path)
    finally:
        process.kill()


def test_who_keeps_a_shard_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once per shard that takes long, with the process and the time; when the shard is released, this process makes
    it."""
    monkeypatch.setattr(shards, "_LONG", 0.0)
    monkeypatch.setattr(shards, "_PATIENCE", 0.01)
    make(tmp_path, rows_per_shard=3)
    lock = tmp_path / ".shard-00001.safetensors.lock"
    (tmp_path / "shard-00001.safetensors").unlink()
    descriptor = files.lock(lock)
    assert descriptor is not None
    files.sign(descriptor)
    release = threading.Timer(0.3, os.close, [descriptor])
    release.start()
    with pytest.warns(UserWarning) as caught:
        make(tmp_path, rows_per_shard=3)
    told = [str(warning.message) for warning in caught if "waiting" in str(warning.message)]
    who = rf"process {os.getpid()} of \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert len(told) == 1 and re.search(rf"waiting for shard-00001.safetensors, which {who} makes; end that", told[0])
    assert read_manifest(tmp_path).complete and (tmp_path / "shard-00001.safetensors").exists()


def test_what_killed_writers_leave_goes(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """Also if all shards exist: a kill after the last one leaves its lock file."""
    make(tmp_path)
    for name in (".shard-00001.safetensors.lock", ".shard-00002.safetensors.1-ab.tmp", ".manifest.json.1-ab.tmp"):
        (tmp_path / name).touch()
    with files._temporary(tmp_path / ".shard-00003.safetensors.2-cd.tmp") as other:
        make(tmp_path)
        assert sorted(path.name for path in tmp_path.glob(".*")) == [".lock", Path(other.name).name, ".writers"]
    shards.tidy(tmp_path)
    assert content(tmp_path) == whole and sorted(path.name for path in tmp_path.glob(".*")) == [".lock", ".writers"]
