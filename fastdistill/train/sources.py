# SPDX-License-Identifier: Apache-2.0
"""Sources of a run: what identifies them on any machine, whether they belong together, where their rows are, whether
these are finite."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.data import values
from fastdistill.data.encoded import EncodedRows
from fastdistill.data.fingerprint import dtype_name, hashes, plain, up_to_rounding
from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.data.staged import Rows
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.distill.objective import Bucket, Objective, Setting, Trajectory
from fastdistill.distill.trajectory import TrajectoryCache
from fastdistill.errors import InputError
from fastdistill.models.weights import weights_hash
from fastdistill.ops.noise_gather.banks import labels, listed, mapped
from fastdistill.train.config import APART, TrainConfig

Sources = list[tuple[LatentCache, PromptBank]]  # one pair per shape of latents
_PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)


def check_sources(latents: LatentCache, prompts: PromptBank, teacher: nn.Module, weights: str) -> None:
    """If a cache contains the hashes of its prompts and its teacher, compare them with the given ones.

    ``weights``: ``weights_hash`` of the teacher.

    Raises:
        InputError: the cache belongs to another bank (or to this one in another order), or to another teacher. If the
            teacher created it in a lower precision than it has now, it is recognized; in a higher precision it is not.
    """
    told, bank = latents.fingerprint.get("prompts"), prompts.identity
    if hashes(told, bank) and told != bank:
        rule = f"the bank {told} that the latents point into (LatentCache.remapped makes them point into another one)"
        raise InputError.of("prompts", rule, bank)
    told = latents.fingerprint.get("teacher")
    if not hashes(told, weights) or told == weights:
        return
    if all(told != weights_hash(teacher, dtype) for dtype in _PRECISIONS):
        rule = f"the model {told} that made the latents, in no lower precision than then"
        advice = "LatentCache(latents.latents, latents.prompt_index) makes no such claim"
        raise InputError.of("teacher", rule, f"{weights} ({advice})")


def fingerprint(setting: Setting, sources: Sources, objective: Objective, config: TrainConfig) -> dict[str, Any]:
    """The properties that must be equal when a run is continued, on this machine or another.

    The student's parameters are compared by name (``checkpoint.latest``). Computed results may differ in the last bits
    between machines, so no hash of such results is used here.
    """
    free = {*APART, "execution", "log_every", "precision", "micro_batch", "gradient_checkpointing"}
    if config.lr_schedule == "constant":
        free.add("steps")  # with a constant rate, a run can simply continue
    constant = config.ema_schedule == "constant"
    free |= {"ema_schedule", "ema_width"} if constant else {"ema_decay"}
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
    if config.teacher_fp8:
        settings["teacher_fp8"] = True  # older runs do not have it
    schedule = setting.schedule.to_config()
    if isinstance(setting.schedule, NoiseSchedule) and "alphas_cumprod" in schedule:
        schedule["alphas_cumprod"] = up_to_rounding(setting.schedule.alphas_cumprod)
    made = [cache.fingerprint or {"sha256": cache.identity} for cache, _ in sources]
    prompts = [bank.identity for _, bank in sources]
    return {
        "config": plain(settings, "config"),
        "objective": plain(objective.describe(), "objective.describe()"),
        "teacher": {"weights": weights_hash(setting.teacher), "dtype": _dtypes(setting.teacher)},
        "latents": made[0] if len(made) == 1 else {f"[{i}]": each for i, each in enumerate(made)},
        "prompts": prompts[0] if len(set(prompts)) == 1 else prompts,
        "schedule": schedule,
        "prediction_type": setting.prediction_type,
    }


def _dtypes(model: nn.Module) -> str:
    return ", ".join(sorted({dtype_name(p.dtype) for p in model.parameters()}))


def placed(sources: Sources, device: torch.device, config: TrainConfig) -> tuple[Bucket, ...]:
    """The banks in the memory that the configuration names; banks shared by several shapes are placed once. Banks on
    disk or encoded on demand stay there."""
    pinned = config.banks == "pinned" and device.type == "cuda"
    known: dict[int, Tensor] = {}

    def place(rows: Any) -> Any:
        if not isinstance(rows, Tensor):
            return rows
        if id(rows) not in known:
            known[id(rows)] = rows.cpu().pin_memory() if pinned else rows.to(device)
        return known[id(rows)]

    def rows_of(bank: PromptBank) -> Any:
        whole = all(isinstance(rows, Tensor) for rows in bank.banks.values())
        expanded = {id(rows): rows.contiguous() for rows in bank.banks.values() if whole and 0 in rows.stride()}
        return mapped(lambda rows: place(expanded.get(id(rows), rows)), bank.rows)  # kernels read contiguous ones

    def trajectory(cache: LatentCache) -> Trajectory | None:
        if not isinstance(cache, TrajectoryCache) or cache.step is None:
            return None
        return Trajectory(cache.step.to(device), {name: cache.fingerprint[name] for name in ("guidance", "grid")})

    return tuple(
        Bucket(place(cache.latents), cache.prompt_index.to(device), rows_of(bank), trajectory(cache))
        for cache, bank in sources
    )


def banks_of(setting: Setting) -> dict[str, Rows]:
    """Latents and prompts of every shape, by the names that messages use."""
    found: dict[str, Rows] = {}
    for i, bucket in enumerate(setting.buckets):
        place = f"[{i}]" if setting.others else ""
        found[f"latents{place}"] = bucket.latents
        rows = zip(labels(bucket.prompts), listed(bucket.prompts), strict=True)
        found |= {f"prompts{place}{name}": bank for name, bank in rows}
    return found


def explain(banks: Mapping[str, Rows], teacher: nn.Module, student: nn.Module) -> str:
    """The likely cause of a loss that is not finite. Reads the rows of the banks until one is not finite."""
    for name, rows in banks.items():
        for dtype in {p.dtype for model in (teacher, student) for p in model.parameters() if p.dtype in _PRECISIONS}:
            if (row := _not_finite(rows, dtype)) is not None:
                cast = f" as {dtype_name(dtype)}" if rows[row : row + 1].isfinite().all() else ""
                return f"row {row} of {name} is not finite{cast}"
    for name, parameter in teacher.named_parameters():
        if parameter.is_floating_point() and not _wide(parameter).isfinite().all():
            return f"the teacher's {name} is not finite"
    return "latents, prompts and the teacher's weights are finite: a lower learning rate or more warm-up usually helps"


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In a dtype for which torch can tell what is finite: not float8."""
    return tensor.float() if tensor.dtype.itemsize < 2 else tensor


def _not_finite(rows: Rows, dtype: torch.dtype) -> int | None:
    """The first row that is not finite after a cast to ``dtype``; None if there is none."""
    if not rows.dtype.is_floating_point or isinstance(rows, EncodedRows):  # checked when they are encoded
        return None
    for start, block in values.blocks(rows):
        if (row := values.misfit(block, dtype)) is not None:
            return start + row
    return None
