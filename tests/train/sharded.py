# SPDX-License-Identifier: Apache-2.0
"""What each of several processes does for ``test_sharded_checkpoints``: runs with a sharded student."""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from fastdistill.errors import StorageError
from fastdistill.train import distributed, writing
from fastdistill.train.checkpoint import steps
from fastdistill.train.stored import Stored
from tests.train.ranks import Interrupted, Tiny, finished, make, shard, stop_after

OPTIONS = {"batch": 6, "keep_checkpoints": 9}


class Uneven(Tiny):
    """Tensors whose shards differ in size (some are empty), and a buffer that all ranks have."""

    def __init__(self, width: int = 6) -> None:
        super().__init__(width)
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("mean", torch.rand(3))

    def forward(self, *given: Any, **named: Any) -> Tensor:
        output: Tensor = super().forward(*given, **named) * self.gain
        return output


def run(directory: Path, *, cut: bool = True, steps: int = 4, **options: Any) -> dict[str, Any]:
    """Train to that step, or only restore it; returns the whole state."""
    return finished(make(student=Uneven(), shard=shard if cut else None, steps=steps, **OPTIONS | options), directory)


def first(rank: int, place: Path) -> Any:
    return run(place)


def interrupted(rank: int, place: Path) -> Any:
    try:
        make(student=Uneven(), shard=shard, **OPTIONS).fit(place, progress=stop_after(3))
    except Interrupted:
        return run(place)


def from_one(rank: int, place: Path) -> Any:
    """Continue what one process wrote; each rank reads only its part of each tensor."""
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        whole = Stored.__getitem__
        patch.setattr(Stored, "__getitem__", lambda stored, name: (asked.append(name), whole(stored, name))[1])
        return run(place.parent.parent / "from_one", steps=2) | {"asked": asked}


def sizes(rank: int, place: Path) -> Any:
    """Bytes of the memory that stages a checkpoint, and of the rank's shards of weights, moments and averages."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        close = writing.Staging.close
        patch.setattr(writing.Staging, "close", lambda own: (found.append(len(own.memory)), close(own))[1])
        trainer = make(teacher=Tiny(128), student=Tiny(128), shard=shard, steps=2)
        trainer.fit(place)
    return max(found), 4 * sum(distributed.part_of(p.detach()).local.nbytes for p in trainer.step.parameters[:8])


def failing(rank: int, place: Path) -> Any:
    """Rank 1 cannot write the first checkpoint, rank 0 cannot write the third, which is the last."""
    written, told = writing.write, []

    def fails(path: Path, tensors: Any, head: Any, *rest: Any) -> str:
        if (head["step"], rank) in ((2, 1), (6, 0)):
            raise StorageError(f"{path}: could not be written: no room")
        return written(path, tensors, head, *rest)

    def look(done: int, _: object) -> None:
        if done == 3:
            while list(steps(place)) != [] or list(place.glob("step-*")):  # other ranks' files are removed later
                time.sleep(0.01)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(writing, "write", fails)
        try:
            make(student=Uneven(), shard=shard, steps=6, **OPTIONS).fit(place, progress=look)
        except StorageError as error:
            told = [str(error)]
    torch.distributed.barrier()  # each rank has removed its own files
    warned = [str(w.message) for w in caught if "checkpoint" in str(w.message)]
    return told, warned, [path.name for path in place.glob("step-*")]


def pressed(rank: int, place: Path) -> Any:
    """A second Ctrl-C while rank 1 writes; returns the files that are left."""
    written = writing.write

    def slow(path: Path, tensors: Any, head: Any, going: Callable[[], None], *rest: Any) -> str:
        while rank == 1:
            going()
            time.sleep(0.01)
        return written(path, tensors, head, going, *rest)

    def press(done: int, _: object) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "write", slow)
        with contextlib.suppress(KeyboardInterrupt):
            make(student=Uneven(), shard=shard, **OPTIONS).fit(place, progress=press)
    torch.distributed.barrier()
    return [path.name for path in place.iterdir()]


def elsewhere(rank: int, place: Path) -> Any:
    return run(place / str(rank))


def damaged(rank: int, place: Path) -> Any:
    """The last value in rank 1's newest file was changed; one of the ranks detects it."""
    return run(place.parent.parent / "damaged", steps=2)


def again(rank: int, place: Path) -> Any:
    """Any number of ranks continues what two ranks wrote: restore it, and train on."""
    restored = run(place.parent.parent / "again")
    return {"restored": restored, "later": run(place.parent.parent / "again", steps=6)}


def uncut(rank: int, place: Path) -> Any:
    return run(place.parent.parent / "uncut", cut=False)


def hybrid(rank: int, place: Path) -> Any:
    """Two copies of a student that is sharded over two ranks (hybrid sharding)."""
    mesh = torch.distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))

    def shard(student: nn.Module) -> None:
        fully_shard(student, mesh=mesh)

    def run(steps: int) -> dict[str, Any]:
        return finished(make(student=Uneven(), shard=shard, steps=steps, **OPTIONS | {"batch": 4}), place)

    return [run(steps) for steps in (2, 2)] + [sorted(loaded(file)) for file in sorted(place.glob("step-*"))]


def columns(rank: int, place: Path) -> Any:
    """Sharded along another dimension, whose size is divisible."""

    def shard(student: nn.Module) -> None:
        fully_shard(student, shard_placement_fn=lambda p: Shard(1 if p.ndim > 1 and p.shape[1] % 2 == 0 else 0))

    return [finished(make(student=Uneven(), shard=shard, steps=2, **OPTIONS), place) for _ in range(2)]


def on_one(rank: int, place: Path) -> Any:
    """A process group with one rank."""
    shutil.copytree(place.parent.parent / "2" / "first", place)
    return run(place), len(list(place.glob("step-*"))), run(place, steps=6), len(list(place.glob("step-*")))


def killed(rank: int, directory: Path) -> None:
    """Rank 1 is killed in the middle of its second write; rank 0 writes its error message to a file."""
    torch.set_num_threads(1)
    distributed.ANSWER = 1.0
    wait = datetime.timedelta(seconds=10)
    torch.distributed.init_process_group("gloo", f"file://{directory}/store", wait, 2, rank)
    written = writing.write

    def dies(path: Path, tensors: Any, head: Any, going: Callable[[], None], *rest: Any) -> str:
        blocks = iter(range(100))

        def block() -> None:
            if (rank, head["step"]) == (1, 4) and next(blocks) == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        return written(path, tensors, head, block, *rest)

    writing.write = dies
    try:
        make(student=Uneven(), shard=shard, **OPTIONS | {"steps": 6}).fit(directory / "run")
    except Exception as error:
        (directory / "told.txt").write_text(f"{type(error).__name__}: {error}")
    os._exit(0)


def loaded(file: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(file)
