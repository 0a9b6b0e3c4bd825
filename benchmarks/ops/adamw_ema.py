# SPDX-License-Identifier: Apache-2.0
"""``adamw_ema``: clip, AdamW, average of the weights and low-precision copy. The dtype bf16 means bf16 weights and
gradients with fp32 masters. Gradients are kept, as torch's optimizers do."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.registry import DTYPES, Case, Run, Workload, generator, optional
from benchmarks.shapes import Sizes, pixart_weights, sd15_weights
from fastdistill.ops import use
from fastdistill.train import AdamWEMA

SHAPES = [  # label, parameters, device, headline
    ("SD-1.5 blocks 320 640 1280", sd15_weights(), "cpu", False),
    ("SD-1.5 blocks 320 640 1280, 6 of each", sd15_weights() * 6, "cuda", True),
    ("PixArt-XL/2", pixart_weights(), "cuda", False),
]
RIVALS = ("default", "torch._foreach", "fused + foreach EMA", "apex + foreach EMA")


def cases() -> Iterator[Case]:
    for label, shapes, device, headline in SHAPES:
        count = sum(torch.Size(s).numel() for s in shapes)
        for dtype in DTYPES:
            build = functools.partial(_build, shapes, DTYPES[dtype])
            yield Case(
                "adamw_ema", f"{label}, {count / 1e6:.0f}M", dtype, device, build, RIVALS, headline and dtype == "bf16"
            )


def _build(shapes: list[Sizes], dtype: torch.dtype, device: torch.device) -> Workload:
    g = generator(device)
    weights, grads = ([torch.randn(s, generator=g, device=device).to(dtype) for s in shapes] for _ in range(2))
    mixed = dtype != torch.float32

    def parameters() -> list[Tensor]:
        made = [w.clone().requires_grad_() for w in weights]
        for p, grad in zip(made, grads, strict=True):
            p.grad = grad.clone()
        return made

    def rival(make: Callable[..., torch.optim.Optimizer], average: Callable[..., None], **options: object) -> Run:
        held = parameters()
        masters = [p.detach().float().requires_grad_() for p in held] if mixed else held
        averages = [p.detach().clone() for p in masters]
        optimizer = make(masters, lr=1e-5, **options)
        for master, p in zip(masters, held, strict=True):
            master.grad = torch.empty_like(master) if mixed else p.grad

        @torch.no_grad()
        def run() -> None:
            if mixed:
                torch._foreach_copy_([m.grad for m in masters], [p.grad for p in held])
            torch.nn.utils.clip_grad_norm_(masters, 1.0)
            optimizer.step()
            average(averages, masters, 1e-4)
            if mixed:
                torch._foreach_copy_(held, masters)

        return run

    adamw = functools.partial(torch.optim.AdamW, capturable=device.type == "cuda")
    rivals: dict[str, Run | str] = {
        "default": rival(adamw, _average),
        "torch._foreach": rival(adamw, torch._foreach_lerp_, foreach=True),
        "fused + foreach EMA": rival(adamw, torch._foreach_lerp_, fused=True),
        "apex + foreach EMA": "apex has no kernel for the CPU",
    }
    if device.type == "cuda":
        rivals["apex + foreach EMA"] = optional(
            "apex.optimizers", lambda apex: rival(apex.FusedAdam, torch._foreach_lerp_)
        )
    ours = AdamWEMA(parameters(), lr=1e-5, max_norm=1.0, ema_decay=0.9999)
    moved = 2 + 4 * 8 + 2 + 2 if mixed else 4 + 4 * 8 + 4  # norm, four arrays, gradient, copy
    count = sum(w.numel() for w in weights)
    return Workload(ours.step, rivals, functools.partial(_check, weights, grads), count * moved)


def _average(averages: list[Tensor], parameters: list[Tensor], weight: float) -> None:
    for average, p in zip(averages, parameters, strict=True):
        average.lerp_(p, weight)


def _check(weights: list[Tensor], grads: list[Tensor]) -> None:
    """Compare two steps with the reference, on the first rows of every tensor."""
    results = []
    for kernel in (None, "reference"):
        some = [w[:8].clone().requires_grad_() for w in weights]
        small = AdamWEMA(some, lr=1e-3, max_norm=1.0, ema_decay=0.9999)
        for p, grad in zip(some, grads, strict=True):
            p.grad = grad[:8].clone()
        with use(kernel) if kernel else contextlib.nullcontext():
            small.step()
            small.step()
        results.append([t for p in some for t in small.state[p].values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
