# SPDX-License-Identifier: Apache-2.0
"""``geglu``, forward and backward: the feed-forward of Stable Diffusion's transformer blocks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.registry import (
    COMPILED,
    DTYPES,
    Case,
    Run,
    Workload,
    agrees,
    compiled,
    forward_backward,
    generator,
    optional,
)
from fastdistill.ops import geglu

RIVALS = ("eager", COMPILED, "Liger")
SHAPES = [  # tokens, width, batch, device, headline
    (256, 5120, 2, "cpu", False),
    (1024, 2560, 2, "cpu", False),
    (4096, 1280, 32, "cuda", True),
    (1024, 2560, 32, "cuda", False),
    (256, 5120, 32, "cuda", False),
]


def cases() -> Iterator[Case]:
    for tokens, width, batch, device, headline in SHAPES:
        for dtype in DTYPES:
            build = functools.partial(_build, (batch, tokens, width), DTYPES[dtype])
            label = f"SD-1.5 {tokens}x{width} B={batch}"
            yield Case("geglu", label, dtype, device, build, RIVALS, headline and dtype == "bf16")


def eager(x: Tensor) -> Tensor:
    """As in diffusers' GEGLU."""
    a, g = x.chunk(2, dim=-1)
    return a * F.gelu(g)


def _liger(module: Any, x: Tensor, cotangent: Tensor) -> Run:
    """Liger has only the tanh form, which is cheaper; its first argument is the gate."""
    leaf = x.detach().requires_grad_()

    def run(x: Tensor) -> Tensor:
        a, g = x.chunk(2, dim=-1)
        result: Tensor = module.LigerGELUMulFunction.apply(g, a)
        return result

    return forward_backward(run, leaf, cotangent=cotangent)


def _build(sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Workload:
    g = generator(device)
    batch, tokens, width = sizes
    x = torch.randn(batch, tokens, 2 * width, generator=g, device=device).to(dtype).requires_grad_()
    cotangent = torch.randn(batch, tokens, width, generator=g, device=device).to(dtype)
    liger: Run | str = "Liger has no kernel for the CPU"
    if device.type == "cuda":
        liger = optional("liger_kernel.ops.geglu", lambda module: _liger(module, x, cotangent))
    ours = forward_backward(geglu, x, cotangent=cotangent)
    rivals = {
        "eager": forward_backward(eager, x, cotangent=cotangent),
        COMPILED: forward_backward(compiled(eager, device), x, cotangent=cotangent),
        "Liger": liger,
    }
    moved = 8 * cotangent.numel() * dtype.itemsize  # forward 3, backward 5
    return Workload(ours, rivals, agrees(ours, 4.0), moved)
