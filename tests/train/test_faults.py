# SPDX-License-Identifier: Apache-2.0
"""Faults while a run writes or waits: each ends as docs/reliability.md describes, and the run continues from there."""

from __future__ import annotations

import datetime
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import distributed_c10d

from fastdistill import runs
from fastdistill.errors import StorageError
from fastdistill.train import checkpoint, distributed
from fastdistill.train.checkpoint import read, steps
from fastdistill.train.config import to_yaml
from fastdistill.train.metrics import read_metrics
from tests import isa, processes
from tests.tasks.test_digits_run import run_config
from tests.train.ranks import make


def state(directory: Path) -> dict[str, Any]:
    return read(list(steps(directory).values())[-1])[0].state


def killed_in_a_write(directory: Path) -> None:
    """SIGKILL with half of the second checkpoint in its temporary file, and half of a line of metrics."""
    write = checkpoint.save

    def save(place: Path, tensors: Any, head: Any, going: Callable[[], None]) -> Path:
        blocks = iter(range(100))

        def dies() -> None:
            if head["step"] == 4 and next(blocks) == 10:
                with open(place / "metrics.jsonl", "a") as file:
                    file.write('{"step": 4, "lo')
                os.kill(os.getpid(), signal.SIGKILL)

        return write(place, tensors, head, dies)

    pytest.MonkeyPatch().setattr(checkpoint, "save", save)
    make(steps=6, log_every=1).fit(directory)


def test_killed_while_it_writes_a_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    process = processes.begin(killed_in_a_write, tmp_path / "killed")
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and list(steps(tmp_path / "killed")) == [2]
    assert len(list((tmp_path / "killed").glob(".step-00000004*.tmp"))) == 1
    for place in ("killed", "whole"):
        make(steps=6, log_every=1).fit(tmp_path / place)
    one, two = state(tmp_path / "killed"), state(tmp_path / "whole")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert [m["step"] for m in read_metrics(tmp_path / "killed" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert not list((tmp_path / "killed").glob(".*.tmp"))


def test_a_directory_that_vanishes_is_warned_of_and_an_error_at_the_end(tmp_path: Path) -> None:
    def vanish(done: int, _: object) -> None:
        if done == 1:
            shutil.rmtree(tmp_path / "run")

    said = r"step-00000002.safetensors: could not be written: No such file.*; training goes on, there is none yet"
    with pytest.warns(UserWarning, match=said), pytest.raises(StorageError, match=r"step-00000004.*: No such file"):
        make(steps=4).fit(tmp_path / "run", progress=vanish)


def test_clocks_that_go_backwards_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither which checkpoint is the newest, nor which checkpoints are kept."""
    now = iter(range(10**9, 0, -(10**5)))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    make(steps=4).fit(tmp_path)
    for age, path in enumerate(steps(tmp_path).values()):
        os.utime(path, (10**9 - age, 10**9 - age))
    assert make(steps=8).fit(tmp_path).steps == 8 and list(steps(tmp_path)) == [6, 8]


def test_a_disk_that_slows_to_a_crawl_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next checkpoint and the end of the run wait. Every file is complete, in order, and has the state of its
    step."""
    make(steps=6, log_every=1).fit(tmp_path / "whole")
    real, begun = os.fsync, []

    def crawl(descriptor: int) -> None:
        begun.append(descriptor)
        time.sleep(0.2)
        real(descriptor)

    def there(place: str) -> list[int]:
        return list(steps(tmp_path / place))

    seen: list[tuple[int, list[int]]] = []
    monkeypatch.setattr(os, "fsync", crawl)
    make(steps=6, log_every=1).fit(tmp_path / "slow", progress=lambda done, _: seen.append((done, there("slow"))))
    assert (3, []) in seen and there("slow") == [4, 6] and begun
    one, two = state(tmp_path / "slow"), state(tmp_path / "whole")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert [m["step"] for m in read_metrics(tmp_path / "slow" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_run_goes_on_with_other_instructions(tmp_path: Path) -> None:
    """As on another processor, which rounds differently: the run continues with the same cache and state."""
    smooth = {"log_every": 1, "eps": 1e-2, "lr_schedule": "constant"}
    losses = []
    for place in ("moved", "whole"):
        config = run_config(tmp_path, directory=str(tmp_path / place), train={"steps": 4, **smooth})
        runs.cache(config)
        if place == "moved":
            (tmp_path / "run.yaml").write_text(to_yaml(config))
            command = [sys.executable, "-m", "fastdistill", "distill", str(tmp_path / "run.yaml"), "--train.steps", "2"]
            assert subprocess.run(command, cwd=isa.ROOT, env=isa.environment("baseline", 1)).returncode == 0
            assert list(steps(tmp_path / place)) == [2]
        assert runs.distill(config).steps == 4
        losses.append([line["loss"] for line in read_metrics(tmp_path / place / "metrics.jsonl")])
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-3)


def rank_of_two(rank: int, directory: Path, fault: str) -> None:
    """Rank 1 fails after step 2; rank 0 writes its error message to a file."""
    torch.set_num_threads(1)
    distributed.ANSWER = 1.0
    torch.distributed.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=2)

    def fail(done: int, _: object) -> None:
        if done == 2:  # both ranks have reached this step, even on a busy machine
            distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=3))
        if done == 2 and rank == 1 and fault == "fails":
            raise ValueError("no data")
        if done == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL if fault == "dies" else signal.SIGSTOP)

    try:
        make(steps=4).fit(directory / "run", progress=fail)
    except Exception as error:
        (directory / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    os._exit(0)


@pytest.mark.parametrize("fault", ["dies", "hangs", "fails"])
def test_a_rank_that_fails_is_named_and_the_run_goes_on(tmp_path: Path, fault: str) -> None:
    """If a rank hangs, after the timeout of the process group; if it fails, with the rank's own error."""
    ranks = [processes.begin(rank_of_two, rank, tmp_path, fault) for rank in (0, 1)]
    ranks[0].join(60)
    ranks[1].kill()
    met = "ended with ValueError: no data" if fault == "fails" else "has died or hangs"
    assert (tmp_path / "0.txt").read_text() == f"FastdistillError: rank 1 {met}; the last checkpoint is intact"
    assert list(steps(tmp_path / "run")) == [2] and make(steps=4).fit(tmp_path / "run").steps == 4
