# SPDX-License-Identifier: Apache-2.0
"""A small trainer, and the process of a rank, which runs scenarios and keeps what they return or the error they met."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.distill import RandomConditioning, Rolling, Weights
from fastdistill.train import DistillTrainer
from fastdistill.train.state import state_of
from tests import small
from tests.harness import untimed

SMOOTH = {"clip": 0.5, "eps": 1e-2}  # so that the sign of an update does not depend on rounding errors
OPTIONS = SMOOTH | {"steps": 4}
Scenario = Callable[[int, Path], Any]


class Interrupted(BaseException):  # like a kill: nothing is saved
    pass


def stop_after(step: int) -> Callable[[int, object], None]:
    def progress(done: int, _: object) -> None:
        if done == step:
            raise Interrupted

    return progress


class Tiny(nn.Module):
    """A model with the interface of diffusers; a whole U-Net would take minutes if two processes share a core."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.inner, self.outer = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.time, self.prompt = nn.Linear(1, width), nn.Linear(12, width)

    def forward(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        told = self.time(timestep[:, None].to(x.dtype) / 1000) + self.prompt(encoder_hidden_states.mean(1))
        output: Tensor = self.outer(nn.functional.silu(self.inner(x) + told[..., None, None]))
        return output


def shard(student: nn.Module) -> None:
    fully_shard(next(student.children()))
    fully_shard(student)


def make(
    *,
    teacher: nn.Module | None = None,
    student: nn.Module | None = None,
    latents: LatentCache | list[LatentCache] | None = None,
    prompts: PromptBank | None = None,
    shard: Callable[[nn.Module], object] | None = None,
    output: float = 1.0,
    rolling: Rolling | None = None,
    conditioning: dict[str, Any] | None = None,
    **options: Any,
) -> DistillTrainer:
    own = {"taps": (("inner", "inner"),), "weights": Weights(output), "rolling": rolling or Rolling()}
    objective = RandomConditioning(**own | (conditioning or {}))
    data = small.SCHEDULE, latents or small.cache(), prompts or small.bank(), objective
    config = small.config(**(OPTIONS | options))
    return DistillTrainer(teacher or Tiny(12), student or Tiny(6), *data, config, shard=shard)


def finished(trainer: DistillTrainer, directory: Path | None = None) -> dict[str, Any]:
    """Run it to the end; returns, on every rank, the whole state and everything that was logged except times."""
    history = trainer.fit(directory).history
    state = {k: getattr(v, "full_tensor", lambda v=v: v)() for k, v in state_of(trainer.step, trainer.student).items()}
    return {"state": {k: v.detach().clone() for k, v in state.items()}, "history": untimed(history)}


def work(rank: int, directory: str, scenarios: dict[str, Scenario], size: int = 2) -> None:
    """One process of ``size``: run the scenarios, leave what they returned or raised in ``<directory>/<rank>.pt``."""
    torch.set_num_threads(1)
    store, wait = f"file://{directory}/store", datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=wait)
    found = {}
    for name, scenario in scenarios.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found[name] = scenario(rank, Path(directory) / name)
            except Exception as error:
                found[name] = error
    torch.save(found, Path(directory) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
