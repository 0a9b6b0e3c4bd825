# SPDX-License-Identifier: Apache-2.0
"""The command ``fastdistill profile``: ``fastdistill.train.profiling`` on a training step of the digits task."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table

from fastdistill.documented import documented
from fastdistill.train.profiling import profile_steps, replay


@documented
@dataclass(frozen=True)
class ProfileConfig:
    """Profile a few training steps of the digits task."""

    steps: Annotated[int, Field(ge=1)] = 3
    """Number of steps to profile."""
    warm_up: Annotated[int, Field(ge=0)] = 3
    """Steps to run before them."""
    batch: Annotated[int, Field(ge=1, le=65536)] = 64
    """Samples per step."""
    device: str = "auto"
    """Device to run on; auto: a GPU if there is one, else the CPU."""
    threads: Annotated[int, Field(ge=1, le=os.cpu_count() or 1)] = 1
    """CPU threads."""
    output: str = "runs/profile"
    """Directory for trace.json and for one saved call of every op."""
    nsight: bool = False
    """Mark the steps for Nsight Systems or Nsight Compute instead of writing a trace."""


@documented
@dataclass(frozen=True)
class ReplayConfig:
    """Run one saved call of an op repeatedly."""

    kernel: str = ""
    """Kernel to use: cuda, triton, cpp or reference; empty: the op's own choice."""
    device: str = "auto"
    """Device to run on; auto: a GPU if there is one, else the CPU."""
    repeats: Annotated[int, Field(ge=1)] = 20
    """Number of timed runs, after three warm-up runs."""
    threads: Annotated[int, Field(ge=1, le=os.cpu_count() or 1)] = 1
    """CPU threads."""
    nsight: bool = False
    """Call cudaProfilerStart before the runs and cudaProfilerStop after them."""


def profile_digits(config: ProfileConfig, console: Console) -> None:
    from fastdistill.data.latent_cache import LatentCache
    from fastdistill.runs import PromptSettings, RunConfig, StudentSettings, opened, trainer_of
    from fastdistill.train.config import TrainSettings

    torch.set_num_threads(config.threads)
    run = opened(
        RunConfig(
            teacher="task:digits",
            teacher_dtype="float32",
            device=config.device,
            prompts=PromptSettings(seen=48),
            student=StudentSettings(spec="bk_small"),
            train=TrainSettings(steps=10_000, batch=config.batch, lr=1e-5),
        )
    )
    noise = torch.randn(512, *run.pipeline.latent_shape(), generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    latents = LatentCache(noise, torch.arange(len(noise)) % run.pool.seen)
    trainer = trainer_of(run, (run.pipeline.encode(run.pool.texts), [latents]))
    models = {"teacher": trainer.teacher, "student": trainer.student}
    found = profile_steps(
        trainer.step, config.output, steps=config.steps, warm_up=config.warm_up, models=models, nsight=config.nsight
    )
    steps = "1 step" if config.steps == 1 else f"{config.steps} steps"
    table = Table(title=f"{steps}, {found.milliseconds:.1f} ms under the profiler", title_justify="left")
    for column in ("op", "share of the time", "saved call"):
        table.add_column(column)
    for op, path in found.calls.items():
        table.add_row(op, f"{found.ops[op]:.2%}" if op in found.ops else "", str(path))
    console.print(table)
    if found.trace is not None:
        console.print(f"\nTrace: {found.trace} (chrome://tracing, https://ui.perfetto.dev)", soft_wrap=True)


def replay_call(call: str, config: ReplayConfig, console: Console) -> None:
    torch.set_num_threads(config.threads)
    times = replay(
        call,
        kernel=config.kernel or None,
        device=_device(config.device),
        repeats=config.repeats,
        nsight=config.nsight,
    )
    console.print(f"{call}: {len(times)} runs, median {statistics.median(times):.4f} ms", soft_wrap=True)


def _device(name: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
