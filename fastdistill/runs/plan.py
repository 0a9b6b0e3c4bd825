# SPDX-License-Identifier: Apache-2.0
"""The needs of a run: memory by part, the micro-batch that fits, time and disk; without a GPU and without weights."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fastdistill import plan as plans
from fastdistill.data.prompt_bank import stored_name
from fastdistill.errors import InputError, described
from fastdistill.plan import Job, Plan
from fastdistill.runs.config import RunConfig
from fastdistill.runs.objective import as_fields, check_conditioning, objective_of
from fastdistill.runs.opened import Run, opened
from fastdistill.train.config import TrainConfig, TrainSettings


def plan(config: RunConfig, *, card: str | None = None, ranks: int = 1, allow_code: bool = False) -> Plan:
    """What a run needs on each of its ranks.

    A step of the run is traced on the meta device, without memory; this takes seconds. If ``train.micro_batch`` is
    None, the plan uses the largest one that fits.

    Args:
        card: name of a GPU (``fastdistill.plan.card_named``); None: the run's device on this machine.
        ranks: number of processes that share the batch, each on its own card.
        allow_code: whether ``config.call`` may be imported.

    Raises:
        InputError: what ``opened`` refuses; an unknown card; a batch that the ranks cannot share.
        StorageError: what ``opened`` refuses.
    """
    if not isinstance(ranks, int) or ranks < 1:
        raise InputError.of("ranks", "a whole number of at least 1", described(ranks))
    named = None if card is None else plans.card_named(card)
    if named is not None:
        config = dataclasses.replace(config, device="cpu")  # the run's device need not exist
    run = opened(config, allow_code=allow_code)
    check_conditioning(config, len(run.pipeline.schedule(run.sizes[0])), ranks)
    return plan_of(run, named or plans.card_here(run.config.device), ranks=ranks)


def plan_of(run: Run, card: plans.Card, *, ranks: int = 1) -> Plan:
    """What an opened run needs on a card."""
    job = job_of(run, card.device, ranks=ranks, available=card.memory)
    with as_fields():
        return plans.planned(job, card, ranks=ranks, sharded=run.config.shard, disk=_disk(run))


def default_micro_batch(run: Run, available: int, *, ranks: int = 1) -> int | None:
    """The largest micro-batch of an opened run that fits into ``available`` bytes of its device; None: not even 1
    fits."""
    job = job_of(run, torch.device(run.config.device).type, ranks=ranks, available=available)
    with as_fields():
        return plans.default_micro_batch(job, available, ranks=ranks, sharded=run.config.shard)


def job_of(run: Run, device: str, *, ranks: int = 1, available: int | None = None) -> Job:
    """The sizes of an opened run, for a type of device with ``available`` bytes. With several image sizes, the largest
    is used; if prompts are encoded on demand, the device has the encodings of the next steps for each size."""
    config = run.config
    shapes = [run.pipeline.latent_shape(size) for size in run.sizes]
    largest = max(range(len(shapes)), key=lambda i: math.prod(shapes[i]))
    samples = run.pool.seen * config.cache.images_per_prompt
    rows = math.ceil(samples * sum(map(math.prod, shapes)) / math.prod(shapes[largest]))
    dtype = run.teacher_dtype if config.teacher_dtype != "auto" else None
    on_demand = config.cache.encodings == "on_demand"
    staged = (config.train.ahead + 1) * math.ceil(config.train.batch / ranks) * len(shapes)
    given = {f.name: getattr(config.train, f.name) for f in dataclasses.fields(TrainSettings)}
    latents = torch.empty(rows, *shapes[largest], dtype=run.cache_dtype, device="meta")
    prompts = _banks(run, staged if on_demand else len(run.pool.texts) + 1)
    large = available is not None and sum(bank.nbytes for bank in (latents, *prompts.values())) > available // 4
    return Job(
        teacher=lambda: run.pipeline.model(device="meta"),
        student=run.student,
        objective=lambda made: objective_of(config.objective, made),
        schedule=run.pipeline.schedule(run.sizes[largest]),
        latents=latents,
        prompts=prompts,
        prediction_type=run.pipeline.prediction_type,
        config=TrainConfig(**given, seed=config.seed),
        teacher_dtype=dtype or (torch.bfloat16 if device == "cuda" else torch.float32),
        call=run.call,
        device=device,
        encoders=_encoders(run, device) if on_demand else 0,
        stored=config.cache.read == "disk" or (config.cache.read == "auto" and large),
    )


def _banks(run: Run, rows: int) -> dict[str, Tensor]:
    """The encoded prompts on the meta device."""
    stored = run.stored_prompts()
    if stored is not None:
        names = {stored_name(name): name for name in run.pipeline.row()}
        shapes = {names[name]: (spec.shape, spec.dtype) for name, spec in stored.tensors.items()}
    else:
        shapes = {name: (tuple(row.shape), _stored(row, run.cache_dtype)) for name, row in run.pipeline.row().items()}
    return {name: torch.empty(rows, *shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}


def _stored(row: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if row.is_floating_point() else row.dtype


def _encoders(run: Run, device: str) -> int:
    """Bytes of the text encoders' weights, in 16 bits on a GPU."""
    count = 0
    for name in run.pipeline.components():
        if name.startswith("text_encoder"):
            for file in sorted((run.pipeline.path / name).glob("*.safetensors")):
                with safe_open(file, framework="pt") as tensors:
                    count += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    return count * (2 if device == "cuda" else 4)


def _disk(run: Run) -> dict[str, int]:
    """Bytes of the finished caches."""
    samples = run.pool.seen * run.config.cache.images_per_prompt
    latent = sum(math.prod(run.pipeline.latent_shape(size)) for size in run.sizes) * run.cache_dtype.itemsize
    found: dict[str, Any] = {"latents": samples * (latent + len(run.sizes) * torch.int64.itemsize), "prompts": 0}
    if run.config.cache.encodings == "stored":
        found["prompts"] = sum(bank.nbytes for bank in _banks(run, len(run.pool.texts) + 1).values())
    return found
