# SPDX-License-Identifier: Apache-2.0
"""The end of a residual block in one pass: the residual, what was added to it, and the bias of that: y = x + h + bias.

For convolutions whose library would add the bias in a pass of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill.ops import _check, _native
from fastdistill.ops._backward import apply, remember, wanted
from fastdistill.ops._dispatch import Kernel, Kind, later, register
from fastdistill.ops.add_bias import reference

_add_bias = register(
    "add_bias",
    "(Tensor x, Tensor h, Tensor bias, Tensor(a!) y)",
    summary="x + h + bias of each channel, channels last",
    reference=reference.add_bias,
    kernels=[
        Kernel("triton", "cuda", later(f"{__name__}.triton", "add_bias"), _native.triton_reason, reference.refuse)
    ],
)


def add_bias(x: Tensor, h: Tensor, bias: Tensor) -> Tensor:
    """x + h + bias, forward and backward.

    Args:
        x, h: [B, C, *positions] in channels last, of one dtype, float32, bfloat16 or float16; another layout is copied.
        bias: [C], of any of these dtypes.

    Returns:
        A tensor like ``x``; differentiable, also a second time. float32 inside, rounded once.

    Raises:
        InputError: shapes, dtypes or devices that do not fit.
    """
    _check.tensors(x=x, h=h, bias=bias)
    kind = _check.once(_checked, (x, h, bias), None)
    x, h = (t.movedim(1, -1).contiguous() for t in (x, h))
    if kind is not None and not wanted((x, h, bias)):
        return _forward(kind, x, h, bias).movedim(-1, 1)
    result: Tensor = apply(kind, _AddBias, x, h, bias)
    return result.movedim(-1, 1)


def _checked(tensors: tuple[Tensor, ...], _: Any = None) -> None:
    x, h, bias = tensors
    _check.dtype(x, "x", *_check.FLOATS)
    _check.require(x.dim() >= 2, "x", "[batch, channels, *positions]", tuple(x.shape))
    _check.shape(h, "h", tuple(x.shape), f"the shape of x {tuple(x.shape)}")
    _check.dtype(h, "h", x.dtype)
    _check.shape(bias, "bias", (x.shape[1],), f"one number a channel ({x.shape[1]},)")
    _check.dtype(bias, "bias", *_check.FLOATS)
    for name, tensor in (("h", h), ("bias", bias)):
        _check.device(tensor, name, x.device, "x")


def _forward(kind: Kind | None, x: Tensor, h: Tensor, bias: Tensor) -> Tensor:
    """Of channels that lie last."""
    y = torch.empty_like(x)
    if y.numel():
        _add_bias(kind, x, h, bias.contiguous(), y)
    return y


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: Kind | None, x: Tensor, h: Tensor, bias: Tensor) -> Tensor:
        ctx.bias = bias.dtype
        remember(ctx, kind)
        return _forward(kind, x, h, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, x, h, bias = ctx.needs_input_grad
        total = grad.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.bias) if bias else None
        return None, grad if x else None, grad if h else None, total
