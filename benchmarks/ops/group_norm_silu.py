# SPDX-License-Identifier: Apache-2.0
"""``group_norm_silu``, forward and backward: the norms of a residual block; the second adds the time embedding."""

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
from benchmarks.shapes import Sizes
from fastdistill.ops import group_norm_silu

GROUPS, EPS = 32, 1e-5
RIVALS = ("eager", COMPILED, "apex")
SHAPES: list[tuple[Sizes, int, str, bool]] = [  # channels and positions of SD-1.5, batch, device, headline
    ((1280, 16, 16), 2, "cpu", False),
    ((320, 64, 64), 2, "cpu", False),
    ((320, 64, 64), 32, "cuda", True),
    ((640, 32, 32), 32, "cuda", False),
    ((1280, 16, 16), 32, "cuda", False),
    ((1280, 8, 8), 4, "cuda", False),
]


def cases() -> Iterator[Case]:
    for shape, batch, device, headline in SHAPES:
        for dtype in DTYPES:
            for last in (True, False):
                for time in (True, False):
                    kind = f"{' time bias' * time} {'NHWC' if last else 'NCHW'}"
                    label = f"SD-1.5 {'x'.join(map(str, shape))}{kind} B={batch}"
                    build = functools.partial(_build, shape, batch, DTYPES[dtype], last, time)
                    first = headline and dtype == "bf16" and last
                    yield Case("group_norm_silu", label, dtype, device, build, RIVALS, first)


def eager(x: Tensor, weight: Tensor, bias: Tensor, time_bias: Tensor | None) -> Tensor:
    """As in diffusers' ResnetBlock2D, in the dtype of x."""
    if time_bias is not None:
        x = x + time_bias[:, :, None, None]
    return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))


def _apex(module: Any, inputs: tuple[Any, ...], cotangent: Tensor) -> Run:
    x, weight, bias, time_bias = inputs
    norm = module.GroupNorm(GROUPS, x.shape[1], eps=EPS, device=x.device, dtype=x.dtype, act="silu")
    norm.weight, norm.bias = torch.nn.Parameter(weight.detach()), torch.nn.Parameter(bias.detach())

    def run(x: Tensor, w: Tensor, b: Tensor, time_bias: Tensor | None) -> Tensor:
        return norm(x if time_bias is None else x + time_bias[:, :, None, None])

    return forward_backward(run, x, norm.weight, norm.bias, time_bias, cotangent=cotangent)


def _build(shape: Sizes, batch: int, dtype: torch.dtype, last: bool, time: bool, device: torch.device) -> Workload:
    g = generator(device)
    layout = torch.channels_last if last else torch.contiguous_format

    def make(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=g, device=device).to(dtype)

    x, cotangent = (make(batch, *shape).to(memory_format=layout) for _ in range(2))
    weight, bias = make(shape[0]), make(shape[0])
    time_bias = make(batch, shape[0]).requires_grad_() if time else None
    inputs = (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), time_bias)

    def fused(x: Tensor, weight: Tensor, bias: Tensor, time_bias: Tensor | None) -> Tensor:
        return group_norm_silu(x, weight, bias, GROUPS, EPS, time_bias=time_bias)

    ours = forward_backward(fused, *inputs, cotangent=cotangent)
    apex: Run | str = "apex has no kernel for the CPU" if device.type == "cpu" else "apex takes NHWC alone"
    if device.type == "cuda" and last:
        apex = optional("apex.contrib.group_norm", lambda module: _apex(module, inputs, cotangent))
    rivals = {
        "eager": forward_backward(eager, *inputs, cotangent=cotangent),
        COMPILED: forward_backward(compiled(eager, device), *inputs, cotangent=cotangent),
        "apex": apex,
    }
    moved = 5 * x.numel() * x.element_size()  # forward 2, backward 3
    return Workload(ours, rivals, agrees(ours, 16.0), moved)
