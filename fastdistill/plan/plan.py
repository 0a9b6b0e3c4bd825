# SPDX-License-Identifier: Apache-2.0
"""The needs of a run: memory by part, time, disk; and changes that would make it fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from fastdistill.errors import InputError
from fastdistill.plan import cost
from fastdistill.plan.cards import GIB, WITHOUT_FLOAT8, Card
from fastdistill.plan.memory import Layout, memory, total
from fastdistill.plan.step import Job, Traced
from fastdistill.train.config import TrainConfig


@dataclass(frozen=True)
class Plan:
    """What a run needs on each of its ranks; created by ``planned``.

    micro_batch: samples per forward. batch: samples per step on this rank. memory: bytes by part
    (``fastdistill.plan.memory.PARTS``) at the peak. flops: floating-point operations per sample, by phase. seconds: of
    a step, by phase. disk: bytes by part. parameters: numbers for teacher, student, and the trained ones.
    """

    card: Card
    ranks: int
    sharded: bool
    execution: str
    micro_batch: int
    batch: int
    steps: int
    memory: Mapping[str, int]
    flops: Mapping[str, int]
    seconds: Mapping[str, float]
    disk: Mapping[str, int]
    parameters: Mapping[str, int]
    job: Job = field(repr=False, compare=False)

    @property
    def total(self) -> int:
        """Bytes of all parts of the memory."""
        return total(self.memory)

    @cached_property
    def largest_micro_batch(self) -> int | None:
        """The largest divisor of ``batch`` that fits in the card's memory; None: not even 1 does."""
        return default_micro_batch(self.job, self.card.memory, ranks=self.ranks, sharded=self.sharded)

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def images_per_second(self) -> float:
        """Images per second of all ranks."""
        return self.ranks * self.batch / self.step_seconds

    @property
    def hours(self) -> float:
        """Hours of all steps."""
        return self.steps * self.step_seconds / 3600

    def changed(self, *, ranks: int | None = None, sharded: bool | None = None, **changes: Any) -> Plan:
        """The plan of the same run with other settings: fields of ``TrainConfig``, ``teacher_dtype`` and ``stored`` of
        a ``Job``, the number of ranks that share the batch, whether the student is sharded."""
        own = {name: changes.pop(name) for name in ("teacher_dtype", "stored") if name in changes}
        given = {"micro_batch": self.micro_batch} | changes
        job = dataclasses.replace(self.job, config=dataclasses.replace(self.job.config, **given), **own)
        return planned(
            job,
            self.card,
            ranks=self.ranks if ranks is None else ranks,
            sharded=self.sharded if sharded is None else sharded,
            disk=self.disk,
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("job", "card")}
        found = {name: dict(value) if isinstance(value, Mapping) else value for name, value in found.items()}
        own = ("total", "largest_micro_batch", "step_seconds", "images_per_second", "hours")
        return {"card": dataclasses.asdict(self.card), **found, **{name: getattr(self, name) for name in own}}


@dataclass(frozen=True)
class Remedy:
    """A change of settings, by their names in a run file, and the bytes that the run needs with it."""

    settings: Mapping[str, Any]
    bytes: int
    enough: bool

    def __str__(self) -> str:
        settings = ", ".join(f"{name}: {value}" for name, value in self.settings.items())
        return f"{settings} ({self.bytes / GIB:.1f} GiB{'' if self.enough else ', not enough alone'})"


def planned(
    job: Job,
    card: Card,
    *,
    ranks: int = 1,
    sharded: bool = False,
    disk: Mapping[str, int] | None = None,
) -> Plan:
    """What a job needs on a card.

    If ``micro_batch`` is None, the largest one that fits is used, or the smallest if none fits.

    Args:
        ranks: number of processes that share the batch, each on its own card. sharded: whether the student is sharded.
        disk: bytes of stored data except the checkpoints.

    Raises:
        InputError: a batch that the ranks cannot share equally, or a micro-batch that does not divide a rank's part.
    """
    config = job.config
    if ranks < 1:
        raise InputError.of("ranks", "at least 1", ranks)
    if config.batch % ranks:
        raise InputError.of("train.batch", f"a multiple of the {ranks} ranks that share it", config.batch)
    if config.teacher_fp8 and card.name in WITHOUT_FLOAT8:
        raise InputError.of("train.teacher_fp8", f"false on the {card.name}, whose products take no float8", True)
    batch = config.batch // ranks
    if config.micro_batch is not None and batch % config.micro_batch:
        raise InputError.of("train.micro_batch", f"a divisor of the {batch} samples of each rank", config.micro_batch)
    job = dataclasses.replace(job, device=card.device)
    micro_batch = config.micro_batch or _largest(job, card.memory, ranks, sharded)
    traced = job.traced(micro_batch < batch)
    return Plan(
        card=card,
        ranks=ranks,
        sharded=sharded,
        execution=_execution(job, sharded),
        micro_batch=micro_batch,
        batch=batch,
        steps=config.steps,
        memory=_memory(job, traced, micro_batch, batch, ranks, sharded),
        flops=cost.flops(traced.trace),
        seconds=cost.seconds(traced.trace, micro_batch, batch, card),
        disk={**(disk or {}), "checkpoints": _checkpoints(traced, config)},
        parameters=traced.parameters,
        job=job,
    )


def default_micro_batch(job: Job, available: int, *, ranks: int = 1, sharded: bool = False) -> int | None:
    """The largest divisor of a rank's part of the batch that fits into ``available`` bytes; None: not even the smallest
    one that the objective allows (mostly 1) fits."""
    batch, multiple = job.config.batch // ranks, job.traced(True).multiple
    for size in (size for size in range(batch, 0, -1) if batch % size == 0 == size % multiple):
        parts = _memory(job, job.traced(True), size, batch, ranks, sharded)
        spared = 2 * parts["gradients"] if size == batch else 0  # at most; only if gradients are not accumulated
        if available < total(parts) <= available + spared:
            parts = _memory(job, job.traced(False), size, batch, ranks, sharded)
        if total(parts) <= available:
            return size
    return None


def _largest(job: Job, available: int, ranks: int, sharded: bool) -> int:
    """The default micro-batch, or the smallest one if that does not fit either."""
    found = default_micro_batch(job, available, ranks=ranks, sharded=sharded)
    return job.traced(True).multiple if found is None else found


def fits(plan: Plan, available: int) -> list[Remedy] | None:
    """None if a plan fits into ``available`` bytes; otherwise remedies, with the bytes that the run needs with each.

    Remedies that are sufficient alone come first. If none is, the last one is all of them together.
    """
    if plan.total <= available:
        return None
    found = []
    together: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for names, changes in _changes(plan, available):
        changed = plan.changed(**changes)
        if changed.total < plan.total:
            found.append(Remedy(names, changed.total, changed.total <= available))
            if "ranks" not in changes or plan.ranks > 1:
                together |= changes
                settings |= names
    found.sort(key=lambda remedy: not remedy.enough)
    if len(together) > 1 and not any(remedy.enough for remedy in found):
        all_of_them = plan.changed(**together)
        found.append(Remedy(settings, all_of_them.total, all_of_them.total <= available))
    return found


def _changes(plan: Plan, available: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Possible changes that reduce a plan: settings by their names in a run file, and arguments of ``Plan.changed``."""
    config = plan.job.config
    smaller = _largest(plan.job, available, plan.ranks, plan.sharded)
    if smaller < plan.micro_batch:
        yield {"train.micro_batch": smaller}, {"micro_batch": smaller}
    if config.teacher_ahead:
        yield {"train.teacher_ahead": False}, {"teacher_ahead": False}
    if not config.gradient_checkpointing:
        yield {"train.gradient_checkpointing": True}, {"gradient_checkpointing": True}
    if not config.fused(plan.job.device):
        yield {"train.fuse": True}, {"fuse": True}
    if plan.job.teacher_dtype.itemsize > 2:
        yield {"teacher_dtype": "bfloat16"}, {"teacher_dtype": torch.bfloat16}
    if not plan.job.stored:
        if config.banks == "device" and plan.card.device == "cuda":
            yield {"train.banks": "pinned"}, {"banks": "pinned"}
        yield {"cache.read": "disk"}, {"stored": True}
    if plan.execution in ("graph", "compiled_graph"):
        yield {"train.execution": "eager"}, {"execution": "eager"}
    if not plan.sharded:
        most = next((n for n in (plan.ranks, 2, 4, 8) if n > 1 and plan.batch * plan.ranks % n == 0), None)
        if plan.ranks > 1:
            yield {"shard": True}, {"sharded": True}
        elif most is not None and plan.card.device == "cuda":
            changes = {"sharded": True, "ranks": most}
            micro = min(plan.micro_batch, plan.batch // most)
            if (plan.batch // most) % micro == 0 == (plan.batch // most) % plan.job.traced(True).multiple:
                yield {"shard": True, "ranks": most}, changes | {"micro_batch": micro}


def _execution(job: Job, sharded: bool) -> str:
    if job.config.execution != "auto":
        return job.config.execution
    return "eager" if job.device != "cuda" else "compiled" if sharded else "graph"


def _memory(job: Job, traced: Traced, micro_batch: int, batch: int, ranks: int, sharded: bool) -> dict[str, int]:
    layout = Layout(
        graph=_execution(job, sharded) == "graph",  # in compiled code, teacher and student are one branch
        banks=job.config.banks == "device" and not job.stored,
        ranks=ranks,
        sharded=sharded,
        block=traced.block,
        cuda=job.device == "cuda",
    )
    return memory(traced.trace, micro_batch, batch, layout) | {"encoders": job.encoders}


def _checkpoints(traced: Traced, config: TrainConfig) -> int:
    """Bytes of the kept checkpoints, and of the one that is written before the oldest is removed."""
    kinds = ("student", "masters", "moments", "averages", "adapters")
    held = zip(traced.trace.sizes, traced.trace.labels, strict=True)
    kept = config.keep_checkpoints + 1 + (config.keep_best is not None)
    if config.keep_every is not None:
        kept += config.steps // math.lcm(config.keep_every, config.checkpoint_every)
    return kept * sum(size for size, label in held if label in kinds)
