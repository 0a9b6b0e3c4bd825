# SPDX-License-Identifier: Apache-2.0
"""What each of two processes does for ``test_distributed``: scenarios that return tensors, or the error they met."""

from __future__ import annotations

import datetime
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from fastdistill.distill import Weights
from fastdistill.train import DistillTrainer
from fastdistill.train.checkpoint import state_of, steps
from fastdistill.train.guard import NoHostSync
from fastdistill.train.step import TrainStep
from tests import small

OPTIONS = {
    "steps": 4,
    "clip": 0.5,
    "eps": 1e-2,  # so that the update is no sign of gradients that are rounding errors
}
Scenario = Callable[[int, Path], Any]


class Interrupted(Exception):
    pass


def stop_after(step: int) -> Callable[[int, object], None]:
    def progress(done: int, _: object) -> None:
        if done == step:
            raise Interrupted

    return progress


def shard(student: Any) -> None:
    fully_shard(student.mid_block)
    fully_shard(student)


def make(kind: str = "channel_base", **options: Any) -> DistillTrainer:
    return small.trainer(kind, **(OPTIONS | options))


def finished(trainer: DistillTrainer, directory: Path | None = None) -> dict[str, Any]:
    """Run it to the end; on every rank the whole state, and what was logged but for the time."""
    history = trainer.fit(directory).history
    state = {k: getattr(v, "full_tensor", lambda v=v: v)() for k, v in state_of(trainer.step, trainer.student).items()}
    logged = [{k: v for k, v in m.items() if k != "seconds"} for m in history]
    return {"state": {k: v.detach().clone() for k, v in state.items()}, "history": logged}


def draws(rank: int, directory: Path) -> Any:
    trainer = make()
    batches: Any = trainer.step.objective._batches  # type: ignore[attr-defined]
    return [tuple(t.clone() for t in batches(torch.tensor([7, k]))) for k in (0, 5, 6)]


def run(rank: int, directory: Path) -> Any:
    return finished(make(), directory)


def interrupted(rank: int, directory: Path) -> Any:
    try:
        make().fit(directory, progress=stop_after(3))
    except Interrupted:
        return finished(make(), directory)


def lower(precision: str) -> Scenario:
    def scenario(rank: int, directory: Path) -> Any:
        trainer = make(precision=precision)
        if trainer.step.scaling is not None:
            trainer.step.scaling.value.fill_(2.0**20)  # too large: the first updates are skipped
        return finished(trainer)

    return scenario


def compiled(rank: int, directory: Path) -> Any:
    TrainStep.compile.__kwdefaults__["backend"] = "aot_eager"  # type: ignore[attr-defined]
    return finished(make(execution="compiled"))


def guarded(rank: int, directory: Path) -> Any:
    """DDP too waits for nothing, once it has ordered its buckets in the second step."""
    step = make().step
    for _ in range(2):
        step()
    with NoHostSync():
        step()
    return step.counter.clone()


def pressed(rank: int, directory: Path) -> Any:
    """Ctrl-C on one rank in the midst of a log interval: all stop at its end."""

    def press(done: int, _: object) -> None:
        if done == 1 and rank == 1:
            os.kill(os.getpid(), signal.SIGINT)

    try:
        make(checkpoint_every=100).fit(directory, progress=press)
    except KeyboardInterrupt as error:
        return str(error), list(steps(directory))


def nowhere(rank: int, directory: Path) -> Any:
    return make().fit("/proc/fastdistill")


def full(rank: int, directory: Path) -> Any:
    """Rank 0 cannot write its second checkpoint."""

    def remove(done: int, _: object) -> None:
        if done == 2 and rank == 0:
            for file in directory.iterdir():
                file.unlink()
            directory.rmdir()

    return make(steps=6, log_every=100).fit(directory, progress=remove)


def uneven(rank: int, directory: Path) -> Any:
    return make(batch=5)


def unlike(rank: int, directory: Path) -> Any:
    return make(lr=1e-3 * (rank + 1))


def wrapped(rank: int, directory: Path) -> Any:
    own = small.teacher()
    made = small.student(model=own)
    student = nn.parallel.DistributedDataParallel(made.model)
    return DistillTrainer(
        own, student, small.SCHEDULE, small.cache(), small.bank(), small.objective(made), small.config()
    )


def resting(rank: int, directory: Path) -> Any:
    return small.trainer("bk_base", {"weights": Weights(output=0.0)}).step()


def sharded(how: Callable[[Any], object] = shard, **options: Any) -> DistillTrainer:
    own = small.teacher()
    made = small.student("channel_base", own)
    config = small.config(**(OPTIONS | options))
    rest = small.SCHEDULE, small.cache(), small.bank(), small.objective(made), config
    return DistillTrainer(own, made.model, *rest, shard=how)


def shards(rank: int, directory: Path) -> Any:
    trainer = sharded()
    found = finished(trainer, directory)
    average = trainer.ema_student(to=small.student("channel_base").model)
    return found | {"average": average.state_dict(), "sharded": hasattr(trainer.step.parameters[0], "device_mesh")}


def shards_interrupted(rank: int, directory: Path) -> Any:
    try:
        sharded().fit(directory, progress=stop_after(3))
    except Interrupted:
        return finished(sharded(), directory)


def shards_compiled(rank: int, directory: Path) -> Any:
    TrainStep.compile.__kwdefaults__["backend"] = "aot_eager"  # type: ignore[attr-defined]
    return finished(sharded(execution="compiled"))


def shards_half(rank: int, directory: Path) -> Any:
    trainer = sharded(precision="float16")
    assert trainer.step.scaling is not None
    trainer.step.scaling.value.fill_(2.0**20)
    trainer.fit()
    return trainer.step.scaling.value, trainer.step.scaling.good, trainer.step.optimizer.skipped


def shards_copied(rank: int, directory: Path) -> Any:
    return sharded().ema_student()


def sharded_before(rank: int, directory: Path) -> Any:
    own = small.teacher()
    made = small.student("channel_base", own)
    shard(made.model)
    rest = small.SCHEDULE, small.cache(), small.bank(), small.objective(made), small.config()
    return DistillTrainer(own, made.model, *rest)


def unsharded(rank: int, directory: Path) -> Any:
    return sharded(lambda student: None)


SCENARIOS: dict[str, Scenario] = {
    "draws": draws, "run": run, "interrupted": interrupted, "float16": lower("float16"), "bfloat16": lower("bfloat16"),
    "compiled": compiled, "guarded": guarded, "pressed": pressed, "nowhere": nowhere, "full": full, "uneven": uneven,
    "unlike": unlike, "wrapped": wrapped, "resting": resting, "shards": shards,
    "shards_interrupted": shards_interrupted, "shards_compiled": shards_compiled, "shards_half": shards_half,
    "shards_copied": shards_copied, "sharded_before": sharded_before,
    "unsharded": unsharded,
}  # fmt: skip


def work(rank: int, directory: str, names: tuple[str, ...] = tuple(SCENARIOS)) -> None:
    """One process of two: run the scenarios, leave what they returned or raised in ``<directory>/<rank>.pt``."""
    torch.set_num_threads(1)
    store, wait = f"file://{directory}/store", datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=wait)
    found = {}
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found[name] = SCENARIOS[name](rank, Path(directory) / name)
            except Exception as error:
                found[name] = error
    torch.save(found, Path(directory) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
