# SPDX-License-Identifier: Apache-2.0
"""Parts of an experiment in processes that are forked from one with all imports."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastdistill.errors import FastdistillError, StorageError
from fastdistill.tasks.processes import JOB, Job, Processes


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with Processes("tests.tasks.part", 1) as found:
        yield found


def job(place: Path, what: str) -> Job:
    place.mkdir()
    (place / JOB).write_text(json.dumps({"what": what}))
    return Job(what, place, {}, False)


def done(processes: Processes, place: Path, what: str, stop: threading.Event | None = None) -> dict[str, Any]:
    shown: list[dict[str, Any]] = []
    processes.run(job(place, what), stop or threading.Event(), lambda **fields: shown.append(fields))
    assert shown[0] == {"description": f"{what}: work"} and shown[1] == {"completed": 0, "total": 1}
    result: dict[str, Any] = json.loads((place / "result.json").read_text())
    return result


def gone(process: int) -> bool:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if not Path(f"/proc/{process}").exists():
            return True
        time.sleep(0.05)
    return False


def test_a_job_begins_from_what_was_imported(processes: Processes, tmp_path: Path) -> None:
    first, second = done(processes, tmp_path / "a", "one"), done(processes, tmp_path / "b", "two")
    assert first["parent"] == second["parent"] and first["process"] != second["process"]
    assert first["done"] == ["one"] and second["done"] == ["two"]  # nothing of the previous part is left


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("refuse", r"^refuse: no such thing$"),
        ("fail", r"^fail: the process ended with 1; see .*fail/log\.txt$"),
        ("killed", r"^killed: the process was killed \(out of memory\?\); see .*killed/log\.txt$"),
    ],
)
def test_a_job_that_fails(processes: Processes, tmp_path: Path, what: str, message: str) -> None:
    with pytest.raises(FastdistillError, match=message):
        done(processes, tmp_path / what, what)
    log = (tmp_path / what / "log.txt").read_text()
    assert ("ValueError: told in the log" in log) == (what == "fail")
    assert done(processes, tmp_path / "next", "next")["done"] == ["next"]


def test_a_job_that_is_stopped(processes: Processes, tmp_path: Path) -> None:
    before = done(processes, tmp_path / "a", "one")
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    with pytest.raises(KeyboardInterrupt):
        done(processes, tmp_path / "b", "wait", stop)
    assert gone(before["parent"])


def test_a_job_ends_when_nobody_reads_its_progress(tmp_path: Path) -> None:
    def closed(**fields: Any) -> None:
        raise LookupError

    with Processes("tests.tasks.part", 1) as processes:
        parent = done(processes, tmp_path / "a", "one")["parent"]
        with pytest.raises(LookupError):
            processes.run(job(tmp_path / "b", "wait"), threading.Event(), closed)
    assert gone(parent)


def test_a_log_that_cannot_be_written(processes: Processes, tmp_path: Path) -> None:
    (tmp_path / "a" / "log.txt").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"a/log\.txt: could not be written: "):
        processes.run(Job("one", tmp_path / "a", {}, False), threading.Event(), lambda **_: None)
