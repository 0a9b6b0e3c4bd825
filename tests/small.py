# SPDX-License-Identifier: Apache-2.0
"""A teacher, a cache and a prompt bank of a few kilobytes, for tests of training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.distill import RandomConditioning, Weights
from fastdistill.models import Student, make_student
from fastdistill.train import DistillTrainer, TrainConfig
from fastdistill.train.stored import Stored, rank_file
from fastdistill.train.writing import write

SCHEDULE = NoiseSchedule.cosine()


def teacher() -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(8, 16),
            layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=2,
            norm_num_groups=4,
        )


def copied(model: nn.Module, dtype: torch.dtype, near: Callable[[Tensor], Tensor]) -> Any:
    """A copy of the model in ``dtype`` without gradients; ``near`` changes its parameters."""
    made = copy.deepcopy(model).to(dtype)
    made.zero_grad()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(near(parameter))
    return made


def cache(rows: int = 20) -> LatentCache:
    g = torch.Generator().manual_seed(1)
    return LatentCache(torch.randn(rows, 3, 8, 8, generator=g), torch.arange(rows) % 6, {})


def bank(width: int = 12) -> PromptBank:
    g = torch.Generator().manual_seed(2)
    return PromptBank(torch.randn(9, 4, width, generator=g), [f"prompt {i}" for i in range(8)])


def student(kind: str = "bk_base", model: UNet2DConditionModel | None = None) -> Student:
    init = "teacher" if kind.startswith("bk") else "random"
    return make_student(model or teacher(), kind, init=init, seed=3)  # type: ignore[arg-type]


def objective(made: Student, **changes: Any) -> RandomConditioning:
    taps = tuple(zip(made.teacher_taps, made.student_taps, strict=True))
    return RandomConditioning(**({"taps": taps, "weights": Weights()} | changes))


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**({"steps": 6, "batch": 4, "lr": 1e-3, "log_every": 2, "checkpoint_every": 2} | changes))


def trainer(kind: str = "bk_base", changes: dict[str, Any] | None = None, **options: Any) -> DistillTrainer:
    own = teacher()
    made = student(kind, own)
    return DistillTrainer(
        own, made.model, SCHEDULE, cache(), bank(), objective(made, **(changes or {})), config(**options)
    )


def recut(path: Path, ranks: int) -> None:
    """Write a checkpoint again as ``ranks`` ranks of a sharded student would: tensors with rows are divided."""
    stored, hashes = Stored(path), []
    for rank in reversed(range(ranks)):
        tensors, parts = {}, {}
        for name in (name for name, value in stored.outline().items() if isinstance(value, Tensor)):
            whole = stored[name]
            chunks = whole.split(-(-len(whole) // ranks)) if whole.ndim and "student." in name else [whole]
            if rank < len(chunks):
                tensors[name] = chunks[rank].clone()
                offset = [rank * len(chunks[0])] + [0] * (whole.ndim - 1) if whole.ndim else []
                parts[name] = {"shape": list(whole.shape), "offset": offset}
        head = {**stored.head, "parts": parts} | ({} if rank else {"files": hashes[::-1]})
        hashes.append(write(rank_file(path, rank, ranks), tensors, head))
