# SPDX-License-Identifier: Apache-2.0
"""What each of two processes does for ``test_distributed``: scenarios that return tensors, or end in an error."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from fastdistill.data.latent_cache import LatentCache, generate_latent_cache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.distill import GuidanceDistillation, Regions, Rolling
from fastdistill.errors import Stopped
from fastdistill.models import make_student
from fastdistill.train import DistillTrainer, choice, distributed
from fastdistill.train.checkpoint import steps
from fastdistill.train.guard import NoHostSync
from fastdistill.train.step import TrainStep
from tests import small
from tests.train.ranks import SMOOTH, Interrupted, Scenario, Tiny, finished, make, shard, stop_after, work


def draws(rank: int, directory: Path) -> Any:
    trainer = make()
    batches: Any = trainer.step.objective._batches  # type: ignore[attr-defined]
    return [tuple(t.clone() for t in batches(torch.tensor([7, k]))) for k in (0, 5, 6)]


def from_disk(rank: int, directory: Path) -> Any:
    """The same draws, each rank reading only the rows of its own ahead."""
    cache, where = small.cache(), directory / str(rank)
    generate_latent_cache(
        where / "latents",
        lambda rows, _: cache.latents[rows],
        cache.prompt_index,
        (3, 8, 8),
        torch.float32,
        {"made": 1},
    )
    return prepared(make(latents=LatentCache.open(where / "latents")))


def encoded(rank: int, directory: Path) -> Any:
    """The same, each rank encoding only the rows of its own ahead."""
    bank = small.bank()

    def encode(texts: list[str]) -> Tensor:
        assert len(texts) <= 2  # of a batch of 4
        return bank.embeddings[bank.indices_of(texts)]

    null = bank.embeddings[-1:]
    own = PromptBank.on_demand(bank.texts, encode, encode_null=lambda text: null, encoder={"made": 1})
    return prepared(make(prompts=own))


def prepared(trainer: DistillTrainer) -> Any:
    batches: Any = trainer.step.objective._batches  # type: ignore[attr-defined]
    found = []
    for k in (0, 5, 6):
        batches.prepare(7, k)
        found.append(tuple(t.clone() for t in batches(torch.tensor([7, k]))))
    batches.close()
    return found


def sizes() -> list[LatentCache]:
    """Caches of two shapes."""
    g = torch.Generator().manual_seed(3)
    return [LatentCache(torch.randn(6, 3, *size, generator=g), torch.arange(6) % 4) for size in ((8, 8), (4, 12))]


def buckets(rank: int, directory: Path) -> Any:
    return finished(make(latents=sizes()))


def run(rank: int, directory: Path) -> Any:
    return finished(make(), directory)


def parts(rank: int, directory: Path) -> Any:
    return finished(make(micro_batch=1), directory)


def shards_parts(rank: int, directory: Path) -> Any:
    return finished(make(shard=shard, micro_batch=1))


ROLLING = Rolling(every=2, groups=1, by="student")  # with states that move in every step


def rolling(rank: int, directory: Path) -> Any:
    return finished(make(rolling=ROLLING, steps=5))


def rolling_interrupted(rank: int, directory: Path) -> Any:
    options: dict[str, Any] = {"rolling": ROLLING, "steps": 5, "checkpoint_every": 3, "log_every": 1}
    with contextlib.suppress(Interrupted):
        make(**options).fit(directory / "rolling", progress=stop_after(4))
    return finished(make(**options), directory / "rolling")


ADAPTIVE: dict[str, Any] = {  # a measured p(t), and a new table of regions in every second step
    "rolling": ROLLING,
    "steps": 5,
    "conditioning": {
        "probability": "measured",
        "parameters": {"points": 4, "samples": 8},
        "regions": Regions(count=3, every=2),
    },
}


def adaptive(rank: int, directory: Path) -> Any:
    return finished(make(**ADAPTIVE))


def adaptive_interrupted(rank: int, directory: Path) -> Any:
    options: dict[str, Any] = ADAPTIVE | {"checkpoint_every": 3, "log_every": 1}
    with contextlib.suppress(Interrupted):
        make(**options).fit(directory / "adaptive", progress=stop_after(4))
    return finished(make(**options), directory / "adaptive")


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


def measured(rank: int, directory: Path) -> Any:
    """On rank 0 a step is faster in channels_last, on rank 1 it is not."""
    seconds = choice.Bench.seconds

    def pretended(bench: choice.Bench, way: choice.Choice) -> float:
        seconds(bench, way)
        return float(bool(way.channels_last) != (rank == 0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "LEAST", 1)
        patch.setattr(choice, "PATIENCE", 0.0)
        patch.setattr(choice.Bench, "seconds", pretended)
        trainer = make()
        outcome = finished(trainer)
    strides = [p.stride() for p in (*trainer.student.parameters(), *trainer.teacher.parameters())]
    return outcome | {"execution": trainer.step.execution, "strides": strides}


def unlike_processors(rank: int, directory: Path) -> Any:
    """Rank 0's multiplies bfloat16, and is faster then."""
    seconds = choice.Bench.seconds

    def pretended(bench: choice.Bench, way: choice.Choice) -> float:
        seconds(bench, way)
        return float((next(bench.student.parameters()).dtype == torch.bfloat16) != (rank == 0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdistill.train.trainer.LEAST", 1)
        patch.setattr("fastdistill.train.trainer.has_bfloat16", lambda device: rank == 0)
        patch.setattr(choice.Bench, "seconds", pretended)
        trainer = make(precision="measured")
        outcome = finished(trainer)
    return outcome | {"dtypes": {str(p.dtype) for p in trainer.student.parameters()}}


def fused(rank: int, directory: Path) -> Any:
    """A U-Net with adapters, fused and then wrapped."""
    return small.trainer("channel_base", fuse=True, steps=2, **SMOOTH).fit().history[0]["gradient_norm"]


def guided(rank: int, directory: Path) -> Any:
    """A fused U-Net that reads guidance weights drawn by counter."""
    own = small.teacher()
    made = make_student(own, "bk_base", guidance_embedding=True)
    taps = tuple(zip(made.teacher_taps, made.student_taps, strict=True))
    objective = GuidanceDistillation("1@2,-1@0.5,0", (0.0, 4.0), taps=taps)
    data = small.SCHEDULE, small.cache(), small.bank(), objective, small.config(fuse=True, steps=2, **SMOOTH)
    return DistillTrainer(own, made.model, *data).fit().history[0]["gradient_norm"]


def shards_fused(rank: int, directory: Path) -> Any:
    own = small.teacher()
    made = small.student("channel_base", own)
    config = small.config(fuse=True, steps=2, **SMOOTH)
    rest = small.SCHEDULE, small.cache(), small.bank(), small.objective(made), config
    return DistillTrainer(own, made.model, *rest, shard=shard).fit().history[0]["gradient_norm"]


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
    except Stopped as stop:
        return stop.code, str(stop).split(";")[0], list(steps(directory))


def nowhere(rank: int, directory: Path) -> Any:
    return make().fit("/proc/fastdistill")


def full(rank: int, directory: Path) -> Any:
    """Rank 0 cannot write its second checkpoint, and goes on, nor its third, the last."""

    def remove(done: int, _: object) -> None:
        if done == 2 and rank == 0:
            while 2 not in steps(directory):  # written beside the training
                time.sleep(0.01)
            for file in directory.iterdir():
                file.unlink()
            directory.rmdir()

    return make(steps=6, log_every=100).fit(directory, progress=remove)


def uneven(rank: int, directory: Path) -> Any:
    return make(batch=5)


def unlike(rank: int, directory: Path) -> Any:
    return make(lr=1e-3 * (rank + 1))


def unlike_logs(rank: int, directory: Path) -> Any:
    """A setting that may change when a run is resumed, but must be the same on all ranks."""
    return make(log_every=rank + 1)


def unlike_places(rank: int, directory: Path) -> Any:
    return make().fit(directory if rank else None)


def unlike_shards(rank: int, directory: Path) -> Any:
    return make(shard=shard if rank else None)


def wrapped(rank: int, directory: Path) -> Any:
    return make(student=nn.parallel.DistributedDataParallel(Tiny(6)))


def resting(rank: int, directory: Path) -> Any:
    return make(output=0.0).step()


def shards(rank: int, directory: Path) -> Any:
    trainer = make(shard=shard)
    found = finished(trainer, directory)
    average = trainer.ema_student(to=Tiny(6))
    return found | {"average": average.state_dict(), "sharded": hasattr(trainer.step.parameters[0], "device_mesh")}


def shards_interrupted(rank: int, directory: Path) -> Any:
    try:
        make(shard=shard).fit(directory, progress=stop_after(3))
    except Interrupted:
        return finished(make(shard=shard), directory)


def shards_compiled(rank: int, directory: Path) -> Any:
    TrainStep.compile.__kwdefaults__["backend"] = "aot_eager"  # type: ignore[attr-defined]
    return finished(make(shard=shard, execution="compiled"))


def shards_half(rank: int, directory: Path) -> Any:
    trainer = make(shard=shard, precision="float16")
    assert trainer.step.scaling is not None
    trainer.step.scaling.value.fill_(2.0**20)
    trainer.fit()
    return trainer.step.scaling.value, trainer.step.scaling.good, trainer.step.optimizer.skipped


def shards_in_float32(rank: int, directory: Path) -> Any:
    first = make(shard=shard, precision="bfloat16", steps=2)
    first.fit(directory)
    again = make(shard=shard, steps=2)
    again.fit(directory)
    optimizer: Any = first.step.optimizer
    masters = {name: optimizer.state[p]["master"] for name, p in first.step.parameters_by_name.items()}
    found = again.step.parameters_by_name, masters
    return tuple({name: distributed.whole(t).detach() for name, t in named.items()} for named in found)


def adapted() -> nn.Module:
    """Adapters of PEFT on frozen weights."""
    import peft

    student = Tiny(12)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["inner", "outer", "prompt"])
    made: nn.Module = peft.get_peft_model(student, config)
    return made


def adapters(rank: int, directory: Path, **options: Any) -> Any:
    try:
        make(student=adapted(), **options).fit(directory, progress=stop_after(3))
    except Interrupted:
        trainer = make(student=adapted(), **options)
        found = finished(trainer, directory)
        trainer.save_adapters(directory / "adapters")
        return found


def shards_adapters(rank: int, directory: Path) -> Any:
    def shard_inside(student: Any) -> None:
        fully_shard(student.get_base_model())  # which PEFT calls
        fully_shard(student)

    return adapters(rank, directory, shard=shard_inside)


def released(rank: int, directory: Path) -> Any:
    trainer = make()
    reducer = weakref.ref(trainer.step._evaluate.reducer)  # type: ignore[attr-defined]
    trainer.fit()
    trainer.close()
    return reducer() is None and trainer.ema_student() is not None


def shards_copied(rank: int, directory: Path) -> Any:
    return make(shard=shard).ema_student()


def sharded_before(rank: int, directory: Path) -> Any:
    student = Tiny(6)
    shard(student)
    return make(student=student)


def unsharded(rank: int, directory: Path) -> Any:
    return make(shard=lambda student: None)


_ALL: tuple[Any, ...] = (
    draws, from_disk, encoded, buckets, run, parts, shards_parts, interrupted,
    fused, guided, compiled, measured, unlike_processors, guarded, pressed, nowhere, full, uneven, unlike,
    unlike_logs, unlike_places, unlike_shards, wrapped, resting, shards, shards_interrupted, shards_fused,
    shards_compiled, shards_half, shards_in_float32, shards_copied, sharded_before, unsharded, adapters,
    shards_adapters, rolling, rolling_interrupted, adaptive, adaptive_interrupted, released,
)  # fmt: skip
SCENARIOS: dict[str, Scenario] = {scenario.__name__: scenario for scenario in _ALL}
SCENARIOS |= {precision: lower(precision) for precision in ("float16", "bfloat16")}


def both(rank: int, directory: str) -> None:
    """One of the two processes."""
    work(rank, directory, SCENARIOS)
