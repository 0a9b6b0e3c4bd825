# SPDX-License-Identifier: Apache-2.0
"""The file with the fastest backend of ``attention``: damaged, shared by processes and threads, or not writable."""

from __future__ import annotations

import importlib
import json
import os
import pwd
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

from fastdistill.ops import attention
from tests.ops.test_attention import inputs

module = importlib.import_module("fastdistill.ops.attention")
table = importlib.import_module("fastdistill.ops.attention.table")
pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 1}', '{"schema": 1, "calls": {"x": {}}}', "\x00\xff"])
def test_a_damaged_file_is_named_once_and_written_again(content: str, cache: Path, measured: list[Any]) -> None:
    cache.parent.mkdir()
    cache.write_bytes(content.encode("latin-1"))
    table._read = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attention(*inputs())
        attention(*inputs(N=5))
    named = [str(w.message) for w in caught if "attention.json" in str(w.message)]
    assert len(named) == 1 and "not a table of attention backends" in named[0]
    assert len(measured) == 2 and len(json.loads(cache.read_text())["calls"]) == 2


def test_another_process_is_not_forgotten(cache: Path) -> None:
    attention(*inputs())
    held = json.loads(cache.read_text())
    held["calls"]["another"] = {"backend": "math", "ms": {"math": 1.0}, "refused": {}}
    cache.write_text(json.dumps(held))
    attention(*inputs(N=7))
    assert set(json.loads(cache.read_text())["calls"]) > set(held["calls"]) and len(held["calls"]) == 2
    assert [p.name for p in cache.parent.iterdir()] == ["attention.json"]


@pytest.mark.parametrize("place", ["file", "read-only", "no home", "no entry"])
def test_a_cache_that_cannot_be_written_has_a_stand_in(
    place: str, cache: Path, tmp_path: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in its place; a read-only disk, as in a container; a user without a name."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(table, "_warned", set())
    if place == "file":
        cache.parent.write_text("")
    elif place == "read-only":
        kept = {"schema": 1, "calls": {"of the image": {"backend": "math", "ms": {}}}}
        cache.parent.mkdir()
        cache.write_text(json.dumps(kept))
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: path != cache.parent and access(path, mode))
    else:
        monkeypatch.delenv("FASTDISTILL_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", "/proc/no/home")
        if place == "no entry":
            monkeypatch.delenv("HOME")
            monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    table._read = None
    with pytest.warns(UserWarning, match=rf"the measured attention backends are kept in {tmp_path}/temporary") as told:
        for n in (5, 6, 5):
            attention(*inputs(N=n))
    assert len(measured) == 2 and len(told) == 1
    held = json.loads(table.path().read_text())["calls"]
    assert table.path().parent.stat().st_mode & 0o777 == 0o700
    assert ("of the image" in held) == (place == "read-only") and len(held) == 2 + (place == "read-only")
    table._read = None  # like a new process
    attention(*inputs(N=5))
    assert len(measured) == 2


def test_no_place_at_all(cache: Path, tmp_path: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """If the temporary folder also belongs to another user, the measurements are kept in memory."""
    cache.parent.write_text("")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(table, "_warned", set())
    owner = os.getuid()
    monkeypatch.setattr(table.os, "getuid", lambda: owner + 1)
    with pytest.warns(UserWarning, match="backends are not kept: .*expected a directory of this user's") as told:
        for _ in range(2):
            attention(*inputs())
            attention(*inputs(N=6))
    assert len(measured) == 2 and len(told) == 1
    table._read = None
    assert table.found("of another user") is None


def test_threads_measure_one_after_the_other(measured: list[Any], cache: Path) -> None:
    """At the same time they would disturb each other's times; a thread uses what another one has measured."""
    tensors = inputs()
    threads = [threading.Thread(target=lambda: attention(*tensors)) for _ in range(4)]
    filters = list(warnings.filters)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(measured) == 1 and len(json.loads(cache.read_text())["calls"]) == 1
    assert warnings.filters == filters
