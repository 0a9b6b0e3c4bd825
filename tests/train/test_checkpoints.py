# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are written during training: the contents of the file, what the loop waits for, what a failed write
leaves behind, and which files are kept."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from fastdistill.data.fingerprint import sha256_of_tensors
from fastdistill.errors import StorageError
from fastdistill.train import checkpoint
from fastdistill.train.checkpoint import prune, read, steps
from fastdistill.train.metrics import read_metrics
from fastdistill.train.writing import Cancelled, Staging, Writer, write
from tests.train.ranks import Interrupted, make, stop_after

DAY = {"lr_schedule": "constant", "log_every": 1}


def test_a_file_is_what_safetensors_writes(tmp_path: Path) -> None:
    """For any dtypes, sizes and strides; written from the memory that holds the copies."""
    state = {
        "weights": torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last),
        "rows": torch.randn(1, 7).expand(4, 7),
        "none": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "half\u00e9": torch.randn(5).half(),
        "flags": torch.tensor([True, False, True]),
        "small": torch.randn(3).to(torch.float8_e4m3fn),
        "turned": torch.randn(6, 2).t(),
    }
    held = Staging().hold(state)
    assert held["weights"].is_contiguous(memory_format=torch.channels_last) and held["turned"].stride() == (1, 2)
    write(tmp_path / "file", held, {"schema": 0})
    with safetensors.safe_open(tmp_path / "file", framework="pt") as file:
        assert json.loads(file.metadata()["fastdistill"]) == {"schema": 0, "sha256": sha256_of_tensors(state)}
    found = safetensors.torch.load_file(tmp_path / "file")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].double(), tensor.double()), name


def test_copies_lie_in_one_memory_that_is_used_again() -> None:
    staging, state = Staging(), {"a": torch.ones(100), "b": torch.ones(3, dtype=torch.int64)}
    places = [t.data_ptr() for t in staging.hold(state).values()]
    state = {name: tensor + 1 for name, tensor in state.items()}
    held = staging.hold(state)
    assert [t.data_ptr() for t in held.values()] == places and all(torch.equal(held[k], state[k]) for k in state)
    assert len({t.untyped_storage().data_ptr() for t in held.values()}) == 1
    assert next(iter(held.values())).untyped_storage().nbytes() <= 400 + 24 + 2 * 64
    assert torch.equal(staging.hold({"a": torch.zeros(7)})["a"], torch.zeros(7))


class Held:
    """Writes that wait for ``go``, and fail for the steps in ``failing``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *failing: int) -> None:
        self.go, self.begun, self._save, self._failing = threading.Event(), [], checkpoint.save, failing
        monkeypatch.setattr(checkpoint, "save", self)

    def __call__(self, directory: Path, tensors: Any, head: Any, going: Callable[[], None]) -> Path:
        self.begun.append(head["step"])
        while not self.go.wait(0.005):
            going()
        if head["step"] in self._failing:
            raise StorageError(f"{directory}/step-{head['step']}: could not be written: {os.strerror(errno.ENOSPC)}")
        return self._save(directory, tensors, head, going)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It continues until the next checkpoint; the file contains the state of its own step."""
    held, seen = Held(monkeypatch), []

    def progress(done: int, _: object) -> None:
        seen.append((done, list(steps(tmp_path))))
        if done == 3:
            held.go.set()

    make(steps=4, keep_checkpoints=9).fit(tmp_path, progress=progress)
    assert seen[:4] == [(0, []), (1, []), (2, []), (3, [])] and held.begun == [2, 4] and list(steps(tmp_path)) == [2, 4]
    monkeypatch.undo()
    make(steps=2).fit(alone := tmp_path / "alone")
    theirs, own = (read(place / "step-00000002.safetensors")[0].state for place in (alone, tmp_path))
    assert all(torch.equal(theirs[name], own[name]) for name in theirs)


def test_a_failed_write_is_a_warning_and_the_last_one_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch, 4, 6)
    held.go.set()
    said = r"checkpoint: .*step-4: could not be written: No space left.*; training goes on, the last one is of step 2"
    with (
        pytest.warns(UserWarning, match=said),
        pytest.raises(StorageError, match="step-6: could not be written"),
    ):
        make(**DAY, steps=6).fit(tmp_path)
    assert list(steps(tmp_path)) == [2] and len(read_metrics(tmp_path / "metrics.jsonl")) == 6
    monkeypatch.undo()
    make(**DAY, steps=6).fit(tmp_path)
    make(**DAY, steps=6).fit(tmp_path / "whole")
    theirs, own = (read(place / "step-00000006.safetensors")[0].state for place in (tmp_path, tmp_path / "whole"))
    assert all(torch.equal(theirs[name], own[name]) for name in theirs)


def test_an_error_in_the_loop_waits_for_the_write_and_ctrl_c_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, before = Held(monkeypatch), threading.active_count()
    threading.Timer(0.1, held.go.set).start()
    with pytest.raises(Interrupted):
        make().fit(tmp_path, progress=stop_after(3))
    assert list(steps(tmp_path)) == [2]

    def press(done: int, _: object) -> None:
        if done == 3:
            raise KeyboardInterrupt

    held.go.clear()
    with pytest.raises(KeyboardInterrupt):
        make().fit(tmp_path / "pressed", progress=press)
    assert not steps(tmp_path / "pressed") and threading.active_count() <= before


def test_what_is_no_longer_wanted_ends_at_its_next_block(tmp_path: Path) -> None:
    def going() -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        write(tmp_path / "file", {"a": torch.ones(3)}, {}, going)
    writer = Writer()
    writer.begin(lambda going: write(tmp_path / "file", {"a": torch.ones(3)}, {}, going))
    writer.wait()
    assert writer.failure() is None and os.listdir(tmp_path) == ["file"]


def test_metrics_that_cannot_be_written_wait(tmp_path: Path) -> None:
    """They are written as soon as this is possible again, and are complete then."""
    file = tmp_path / "metrics.jsonl"

    def block(done: int, _: object) -> None:
        if done == 1:
            file.rename(tmp_path / "aside")
            file.mkdir()
        if done == 3:
            file.rmdir()
            (tmp_path / "aside").rename(file)

    with pytest.warns(UserWarning, match="Is a directory; training goes on, lines that wait: 2"):
        make(**DAY, steps=4).fit(tmp_path, progress=block)
    assert [m["step"] for m in read_metrics(file)] == [1, 2, 3, 4]


def test_metrics_of_steps_that_are_done_again_go(tmp_path: Path) -> None:
    """Lines of a process that was killed before its first checkpoint, and invalid lines, are removed."""
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    make(**DAY, steps=2).fit(tmp_path)
    assert [m["step"] for m in read_metrics(file)] == [1, 2] == [json.loads(m)["step"] for m in file.open()]
    with file.open("ab") as more:
        more.write(b'\xff\n3\n[1]\n{}\n{"step": "a"}\n{"st')
    assert [m["step"] for m in make(**DAY, steps=3).fit(tmp_path).history] == [1, 2, 3]
    file.unlink()
    file.mkdir()
    with pytest.raises(StorageError, match=r"metrics.jsonl: could not be read: Is a directory"):
        make(**DAY, steps=4).fit(tmp_path)


@pytest.mark.parametrize(
    ("keep", "left"),
    [((2,), [50, 60]), ((1, 20), [20, 40, 60]), ((1, None, 10), [10, 60]), ((2, 30, 10), [10, 30, 50, 60])],
)
def test_which_checkpoints_are_kept(tmp_path: Path, keep: Any, left: list[int]) -> None:
    for step in range(10, 70, 10):
        (tmp_path / f"step-{step:08d}.safetensors").touch()
    prune(tmp_path, *keep)
    assert list(steps(tmp_path)) == left


@pytest.mark.parametrize(("best", "kept"), [("lowest", 2), ("highest", 4)])
def test_the_best_checkpoint_is_kept_over_sittings(tmp_path: Path, best: str, kept: int) -> None:
    def score(done: int, _: object) -> dict[str, float]:
        return {"fid": {2: 1.0, 4: 3.0}.get(done, 2.0)}

    def sitting(count: int) -> None:
        make(steps=count, keep_checkpoints=1, keep_best="fid", best=best).fit(tmp_path, callbacks=[(2, score)])

    for count in (4, 6, 8):
        sitting(count)
    assert list(steps(tmp_path)) == [kept, 8]


def test_a_value_that_nothing_returns_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="keep_best: expected a callback that returns a value named 'fid' at the step"):
        make(steps=2, keep_best="fid").fit(tmp_path, callbacks=[(1, lambda done, _: {"kid": 1.0})])
