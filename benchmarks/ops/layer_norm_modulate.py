# SPDX-License-Identifier: Apache-2.0
"""``layer_norm_modulate``, forward and backward: AdaLN of PixArt and DiT, with and without the residual."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.registry import COMPILED, DTYPES, Case, Run, Workload, agrees, compiled, generator
from fastdistill.ops import layer_norm_modulate, residual_layer_norm_modulate

EPS = 1e-6
RIVALS = ("eager", COMPILED)
SHAPES = [  # model, tokens, width, batch, device, headline
    ("DiT-XL/2", 256, 1152, 4, "cpu", False),
    ("PixArt-XL/2", 1024, 1152, 4, "cpu", False),
    ("PixArt-XL/2", 1024, 1152, 32, "cuda", True),
    ("DiT-XL/2", 256, 1152, 64, "cuda", False),
]


def cases() -> Iterator[Case]:
    for model, tokens, width, batch, device, headline in SHAPES:
        for dtype in DTYPES:
            for residual in (False, True):
                build = functools.partial(_build, (batch, tokens, width), DTYPES[dtype], residual)
                label = f"{model} {tokens}x{width}{' residual' * residual} B={batch}"
                yield Case("layer_norm_modulate", label, dtype, device, build, RIVALS, headline and dtype == "bf16")


def eager(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    """As in diffusers' BasicTransformerBlock."""
    return (F.layer_norm(x, x.shape[-1:], None, None, EPS) * (1 + scale) + shift,)


def eager_residual(x: Tensor, h: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    s = x + gate * h
    return (*eager(s, scale, shift), s)


def ours(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    return (layer_norm_modulate(x, scale, shift, eps=EPS),)


def _both_ways(function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], cotangent: Tensor) -> Run:
    """One forward, and the backward of all outputs."""

    def run() -> tuple[Tensor, ...]:
        outputs = function(*inputs)
        return (*outputs, *torch.autograd.grad(outputs, inputs, [cotangent] * len(outputs)))

    return run


def _build(sizes: tuple[int, int, int], dtype: torch.dtype, residual: bool, device: torch.device) -> Workload:
    g = generator(device)
    batch, _, width = sizes

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device).to(dtype).requires_grad_()

    x, cotangent = make(*sizes), make(*sizes).detach()
    chunks = make(batch, 6, width).detach().chunk(6, dim=1)
    gate, scale, shift = (t.requires_grad_() for t in chunks[:3])
    if residual:
        inputs: tuple[Tensor, ...] = (x, make(*sizes), gate, scale, shift)
        fused, literal = residual_layer_norm_modulate, eager_residual
    else:
        inputs = (x, scale, shift)
        fused, literal = ours, eager
    run = _both_ways(fused, inputs, cotangent)
    rivals = {
        "eager": _both_ways(literal, inputs, cotangent),
        COMPILED: _both_ways(compiled(literal, device), inputs, cotangent),
    }
    moved = (10 if residual else 5) * x.numel() * dtype.itemsize  # 4 + 6 or 2 + 3
    return Workload(run, rivals, agrees(run, 16.0), moved)
