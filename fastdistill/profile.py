# SPDX-License-Identifier: Apache-2.0
"""The command ``fastdistill profile``: what ``fastdistill.train.profiling`` does, on the digits task's step."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table

from fastdistill.train.profiling import profile_steps, replay


@dataclass(frozen=True)
class ProfileConfig:
    """A few steps of the digits task under a profiler."""

    steps: Annotated[int, Field(ge=1)] = 3
    """Steps that are profiled."""
    warm_up: Annotated[int, Field(ge=0)] = 3
    """Steps before them."""
    batch: Annotated[int, Field(ge=1, le=65536)] = 64
    """Samples a step."""
    device: str = "auto"
    """Where to compute; auto takes a GPU when there is one."""
    threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads."""
    output: str = "runs/profile"
    """Directory for trace.json and a call of every op."""
    nsight: bool = False
    """Mark the steps for Nsight Systems or Nsight Compute in place of writing a trace."""


@dataclass(frozen=True)
class ReplayConfig:
    """One kept call of an op, again and again."""

    kernel: str = ""
    """Force a kernel: cuda, triton, cpp or reference."""
    device: str = "auto"
    """Where to compute; auto takes a GPU when there is one."""
    repeats: Annotated[int, Field(ge=1)] = 20
    """How often it is run, after three runs to warm up."""
    threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads."""
    nsight: bool = False
    """Put the runs between cudaProfilerStart and Stop."""


def profile_digits(config: ProfileConfig, console: Console) -> None:
    from fastdistill.tasks.digits.trainer import noise_trainer
    from fastdistill.train.devices import usable

    device = _device(config.device)
    usable(device)
    torch.set_num_threads(config.threads)
    trainer = noise_trainer(config.batch, device)
    models = {"teacher": trainer.teacher, "student": trainer.student}
    found = profile_steps(
        trainer.step, config.output, steps=config.steps, warm_up=config.warm_up, models=models, nsight=config.nsight
    )
    steps = "1 step" if config.steps == 1 else f"{config.steps} steps"
    table = Table(title=f"{steps}, {found.milliseconds:.1f} ms under the profiler", title_justify="left")
    for column in ("op", "share of the time", "its call, to be replayed"):
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
