# SPDX-License-Identifier: Apache-2.0
"""The lines that a run prints before its first step and after it."""

from __future__ import annotations

import resource
import sys

import torch
from torch import nn

from fastdistill import ops
from fastdistill.data.fingerprint import dtype_name
from fastdistill.files import readable
from fastdistill.plan import Plan
from fastdistill.train import DistillTrainer


def before(trainer: DistillTrainer, planned: Plan | None) -> list[str]:
    """Lines about the models, the taps with the shapes of their features (batch first), and the memory that the plan
    expects."""
    student = trainer.student
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    count = sum(p.numel() for p in student.parameters())
    lines = [f"teacher: {_size(trainer.teacher)}; student: {_size(student)}, {_share(trained, count)} trained"]
    lines += trainer.about_teacher
    for (theirs, own), wide, narrow in getattr(trainer.step.objective, "tapped", ()):
        adapter = "" if wide == narrow else " by an adapter"
        lines.append(f"tap: student {own} {list(narrow)} to teacher {theirs} {list(wide)}{adapter}")
    if planned is None:
        return [*lines, "memory: no plan, as models this small need far less than is free"]
    gflop, card = sum(planned.flops.values()) / 1e9, planned.card
    ceiling = f"{card.name} reaches {card.matmul / 1e12:.3g} TFLOP/s ({card.source})"
    return [*lines, f"memory: {readable(planned.total)} planned", f"{gflop:,.3g} GFLOP per image; {ceiling}"]


def after(trainer: DistillTrainer) -> list[str]:
    """Lines about what the first step used. (The step itself refuses a tap whose feature has no gradient.)"""
    device = trainer.step.counter.device
    kernels = ", ".join(f"{op} {found[0]}" for op, found in sorted(ops.used().items()))
    if device.type == "cuda":
        peak = f"{readable(torch.cuda.max_memory_allocated(device))} allocated at the peak"
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = f"{readable(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)} of memory in the process"
    taps = getattr(trainer.step.objective, "tapped", ())
    gradient = [f"{'the tap carries' if len(taps) == 1 else f'all {len(taps)} taps carry'} a gradient"] if taps else []
    execution = f"{trainer.step.execution} ({trainer.step.why})"
    return ["; ".join([f"first step: {execution}", f"kernels {kernels}", *gradient, peak])]


def _size(model: nn.Module) -> str:
    dtypes = sorted({dtype_name(p.dtype) for p in model.parameters()})
    return f"{sum(p.numel() for p in model.parameters()):,} parameters in {' and '.join(dtypes)}"


def _share(trained: int, count: int) -> str:
    return "all" if trained == count else f"{trained:,}"
