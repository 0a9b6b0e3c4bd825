# SPDX-License-Identifier: Apache-2.0
"""The end of a residual block in one pass: y = x + h + bias, with the residual x and the output h of a convolution.

For convolutions that would add their bias in a separate pass (cuDNN). ``with_bias`` is for matrix products that have
added their bias: it computes the gradient of the bias, the sum over rows, in one memory-bound pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill.ops import _check, _native
from fastdistill.ops._backward import apply, is_differentiated, kind_of, remember, wanted, with_its_kernel
from fastdistill.ops._dispatch import Kernel, Kind, later, register
from fastdistill.ops.add_bias import reference

_add_bias = register(
    "add_bias",
    "(Tensor? x, Tensor h, Tensor bias, Tensor(a!) y)",
    summary="x + h + bias of each channel, channels last",
    reference=reference.add_bias,
    kernels=[
        Kernel("triton", "cuda", later(f"{__name__}.triton", "add_bias"), _native.triton_reason, reference.refuse)
    ],
)
_bias_gradient = register(
    "bias_gradient",
    "(Tensor grad, Tensor(a!) total)",
    summary="the sum of rows",
    reference=reference.bias_gradient,
    kernels=[
        Kernel(
            "triton", "cuda", later(f"{__name__}.triton", "bias_gradient"), _native.triton_reason,
            reference.refuse_gradient,
        )
    ],
)  # fmt: skip


def add_bias(x: Tensor, h: Tensor, bias: Tensor) -> Tensor:
    """x + h + bias, forward and backward.

    Args:
        x, h: [B, C, *positions], channels last (other layouts are copied), both float32, bfloat16 or float16.
        bias: [C], of any of these dtypes.

    Returns:
        A tensor like ``h``, differentiable twice. Computed in float32, rounded once.

    Raises:
        InputError: the shapes, dtypes or devices do not match.
    """
    _check.tensors(x=x, h=h, bias=bias)
    return _added(x, h, bias)


def plus_bias(h: Tensor, bias: Tensor) -> Tensor:
    """h + bias: ``add_bias`` without x."""
    _check.tensors(h=h, bias=bias)
    return _added(None, h, bias)


def _added(x: Tensor | None, h: Tensor, bias: Tensor) -> Tensor:
    kind = _check.once(_checked, (x, h, bias), None)
    x, h = None if x is None else x.movedim(1, -1).contiguous(), h.movedim(1, -1).contiguous()
    if kind is not None and not wanted((x, h, bias)):
        return _forward(kind, x, h, bias).movedim(-1, 1)
    result: Tensor = apply(kind, _AddBias, x, h, bias)
    return result.movedim(-1, 1)


def _checked(tensors: tuple[Any, ...], _: Any = None) -> None:
    x, h, bias = tensors
    first, x = ("h", h) if x is None else ("x", x)
    _check.dtype(x, first, *_check.FLOATS)
    _check.require(x.dim() >= 2, first, "[batch, channels, *positions]", tuple(x.shape))
    _check.shape(h, "h", tuple(x.shape), f"the shape of x {tuple(x.shape)}")
    _check.dtype(h, "h", x.dtype)
    _check.shape(bias, "bias", (x.shape[1],), f"one number a channel ({x.shape[1]},)")
    _check.dtype(bias, "bias", *_check.FLOATS)
    for name, tensor in (("h", h), ("bias", bias)):
        _check.device(tensor, name, x.device, first)


def _forward(kind: Kind | None, x: Tensor | None, h: Tensor, bias: Tensor) -> Tensor:
    """For channels last."""
    y = torch.empty_like(h)
    if y.numel():
        _add_bias(kind, x, h, bias.contiguous(), y)
    return y


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: Kind | None, x: Tensor | None, h: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        remember(ctx, kind)
        return _forward(kind, x, h, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, x, h, bias = ctx.needs_input_grad
        return None, grad if x else None, grad if h else None, _summed(ctx, grad) if bias else None


def with_bias(h: Tensor, bias: Tensor) -> Tensor:
    """h [..., C] unchanged, with a gradient for ``bias`` [C]: the sum of the gradient of h over the rows. ``bias`` must
    have been added to h as a constant (``bias.detach()``)."""
    result: Tensor = _WithBias.apply(h, bias)
    return result


class _WithBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        remember(ctx, None)
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, bias = ctx.needs_input_grad
        return grad if h else None, _summed(ctx, grad) if bias else None


def _summed(ctx: Any, grad: Tensor) -> Tensor:
    """The sum over all but the last dimension, in the dtype of the bias."""
    rows = grad.flatten(0, -2)
    if is_differentiated() or not rows.numel() or rows.dtype not in _check.FLOATS:
        return rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32)).to(ctx.dtype)
    total: Tensor = _sum(ctx, rows if rows.stride(1) == 1 else rows.contiguous())
    return total


@with_its_kernel
def _sum(ctx: Any, rows: Tensor) -> Tensor:
    total = rows.new_empty(rows.shape[1], dtype=ctx.dtype)
    _bias_gradient(kind_of(ctx, rows), rows, total)
    return total
