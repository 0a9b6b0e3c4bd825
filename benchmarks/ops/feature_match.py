# SPDX-License-Identifier: Apache-2.0
"""``feature_match``, loss and gradient, for the taps of a training step."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.registry import COMPILED, DTYPES, Case, Run, Workload, agrees, compiled, forward_backward, generator
from benchmarks.shapes import PIXART_TAPS, SD15_TAPS, SDXL_TAPS, Sizes
from fastdistill.ops import feature_match

SHAPES = [  # label, taps, batch, device, headline
    ("SD-1.5 8 taps", SD15_TAPS, 4, "cpu", False),
    ("SD-1.5 8 taps", SD15_TAPS, 16, "cpu", False),
    ("SD-1.5 8 taps", SD15_TAPS, 32, "cuda", True),
    ("SD-1.5 8 taps", SD15_TAPS, 4, "cuda", True),
    ("SDXL 7 taps", SDXL_TAPS, 8, "cuda", False),
    ("PixArt-XL/2 14 taps", PIXART_TAPS, 32, "cuda", False),
]


def cases() -> Iterator[Case]:
    for label, taps, batch, device, headline in SHAPES:
        for dtype in DTYPES:
            rivals = ("literal", *(("eager",) if dtype != "fp32" else ()), "torch._foreach", COMPILED)
            build = functools.partial(_build, taps, batch, DTYPES[dtype])
            yield Case(
                "feature_match", f"{label} B={batch}", dtype, device, build, rivals, headline and dtype == "bf16"
            )


def literal(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """As in the scripts of BK-SDM and Random Conditioning."""
    return torch.stack([F.mse_loss(s.float(), t.float()) for s, t in zip(student, teacher, strict=True)]).sum()


def eager(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """In the precision of the features."""
    return torch.stack([F.mse_loss(s, t) for s, t in zip(student, teacher, strict=True)]).sum()


def _foreach(student: list[Tensor], teacher: list[Tensor], buffers: list[Tensor]) -> Run:
    """With a handwritten gradient."""
    factors = [2 / s.numel() for s in student]

    @torch.no_grad()
    def run() -> tuple[Tensor, ...]:
        torch._foreach_copy_(buffers, student)
        torch._foreach_sub_(buffers, teacher)
        norms = torch._foreach_norm(buffers, dtype=torch.float32)
        loss = torch.stack([n.square() * (f / 2) for n, f in zip(norms, factors, strict=True)]).sum()
        torch._foreach_mul_(buffers, factors)
        return (loss, *buffers)

    return run


def _build(taps: tuple[Sizes, ...], batch: int, dtype: torch.dtype, device: torch.device) -> Workload:
    g = generator(device)

    def features() -> list[Tensor]:
        return [torch.randn(batch, *s, generator=g, device=device).to(dtype) for s in taps]

    student, teacher = [s.requires_grad_() for s in features()], features()
    buffers, others = ([torch.empty_like(t) for t in teacher] for _ in range(2))
    ours = forward_backward(lambda s, t: feature_match(s, t, grads=buffers).loss, student, teacher)
    rivals: dict[str, Run | str] = {
        "literal": forward_backward(literal, student, teacher),
        "torch._foreach": _foreach(student, teacher, others),
        COMPILED: forward_backward(compiled(literal, device), student, teacher),
    }
    if dtype != torch.float32:
        rivals["eager"] = forward_backward(eager, student, teacher)
    moved = 3 * sum(t.numel() for t in teacher) * dtype.itemsize
    return Workload(ours, rivals, agrees(ours), moved)
