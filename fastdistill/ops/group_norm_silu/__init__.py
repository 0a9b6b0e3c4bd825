# SPDX-License-Identifier: Apache-2.0
"""Group norm of a residual block in one op: the step's bias before the statistics, scale and shift after, SiLU last.

    u = x + time_bias    n = (u - mean(u)) / sqrt(var(u) + eps)    y = silu((n weight + bias) (1 + scale) + shift)

mean and var over the channels of a group and all positions (Wu and He, arXiv 1803.08494); ``time_bias`` is Stable
Diffusion's time embedding (``ResnetBlock2D`` with ``time_embedding_norm="default"``), scale and shift are those of
``"scale_shift"``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill.ops import _check, _native
from fastdistill.ops._dispatch import Kernel, later, register
from fastdistill.ops.group_norm_silu import cpp, reference
from fastdistill.ops.group_norm_silu.layout import laid_out

_GIVEN = "Tensor x, Tensor? weight, Tensor? bias, Tensor? time_bias, Tensor? scale, Tensor? shift"
_group_norm_silu = register(
    "group_norm_silu",
    f"({_GIVEN}, int groups, float eps, bool silu, Tensor(a!) y, Tensor(b!) mean, Tensor(c!) rstd)",
    summary="silu((group_norm(x + time_bias) weight + bias) (1 + scale) + shift)",
    reference=reference.group_norm_silu,
    kernels=[
        Kernel("triton", "cuda", later(f"{__name__}.triton", "group_norm_silu"), _native.triton_reason, cpp.refuse),
        Kernel("cpp", "cpu", cpp.group_norm_silu, _native.cpu_reason, cpp.refuse),
    ],
)
_backward = register(
    "group_norm_silu_backward",
    f"(Tensor grad, {_GIVEN}, Tensor mean, Tensor rstd, int groups, bool silu, int wanted, Tensor(a!) dx,"
    " Tensor(b!)[] small)",
    summary="gradients of group_norm_silu",
    reference=reference.group_norm_silu_backward,
    kernels=[
        Kernel(
            "triton", "cuda", later(f"{__name__}.triton", "group_norm_silu_backward"), _native.triton_reason,
            cpp.refuse_backward,
        ),
        Kernel("cpp", "cpu", cpp.group_norm_silu_backward, _native.cpu_reason, cpp.refuse_backward),
    ],
)  # fmt: skip


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float = 1e-5,
    *,
    time_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """Group norm with what stands before and after it in a residual block, forward and backward.

    Args:
        x: [B, C, *positions], float32, bfloat16 or float16; contiguous or channels last, neither is copied (another
            layout is, once).
        weight, bias: [C], of any of these dtypes, or None.
        groups: divides C.
        eps: added to the variance.
        time_bias: [B, C], added to every position before the statistics; any row stride, as chunks of a projection
            have it.
        scale, shift: [B, C], after weight and bias: z (1 + scale) + shift; any row stride.
        silu: whether z sigmoid(z) follows.

    Returns:
        A tensor like ``x``, its layout too; differentiable once with respect to every tensor. Statistics and all sums
        in float32 or wider, around the mean; the same bits on every run.

    Raises:
        InputError: shapes, dtypes or devices that do not fit.
    """
    _check.tensors(x=x)
    _check.once(_checked, tuple(t for t in (x, weight, bias, time_bias, scale, shift) if t is not None), (
        groups, eps, *(t is not None for t in (weight, bias, time_bias, scale, shift)),
    ))  # fmt: skip
    result: Tensor = _GroupNormSilu.apply(x, weight, bias, time_bias, scale, shift, groups, eps, silu)
    return result


def _checked(tensors: tuple[Tensor, ...], values: tuple[Any, ...]) -> None:
    groups, eps, *given = values
    x, *rest = tensors
    require = _check.require
    _check.dtype(x, "x", *_check.FLOATS)
    require(x.dim() >= 2, "x", "[batch, channels, *positions]", tuple(x.shape))
    batch, channels = x.shape[:2]
    require(groups > 0 and channels % groups == 0, "groups", f"a divisor of the {channels} channels of x", groups)
    require(eps >= 0, "eps", "a number >= 0", eps)
    names = [n for n, g in zip(("weight", "bias", "time_bias", "scale", "shift"), given, strict=True) if g]
    for name, tensor in zip(names, rest, strict=True):
        if name in ("weight", "bias"):
            _check.shape(tensor, name, (channels,), f"one number a channel ({channels},)")
        else:
            _check.shape(tensor, name, (batch, channels), f"one number a sample and channel ({batch}, {channels})")
        _check.dtype(tensor, name, *_check.FLOATS)
        _check.device(tensor, name, x.device, "x")


def _rows(tensor: Tensor | None) -> Tensor | None:
    """The same with neighboring channels side by side in memory."""
    return tensor if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] < 2 else tensor.contiguous()


class _GroupNormSilu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        time_bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        groups: int,
        eps: float,
        silu: bool,
    ) -> Tensor:
        x = laid_out(x)
        given = tuple(map(_rows, (weight, bias, time_bias, scale, shift)))
        y = torch.empty_like(x)
        mean, rstd = x.new_empty(2, x.shape[0], groups, dtype=torch.float32)
        if x.numel():
            _group_norm_silu(x, *given, groups, eps, silu, y, mean, rstd)
        ctx.save_for_backward(x, *given, mean, rstd)
        ctx.groups, ctx.silu = groups, silu
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *given, mean, rstd = ctx.saved_tensors
        dx = torch.empty_like(x)
        if not _native.same_order(grad, x):
            grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
        make = torch.empty_like if x.numel() else torch.zeros_like
        needed = zip(given, ctx.needs_input_grad[1:6], strict=True)
        small = [make(t, memory_format=torch.contiguous_format) if need else None for t, need in needed]
        if x.numel():
            wanted = sum(1 << i for i, g in enumerate(small) if g is not None)
            held = [g for g in small if g is not None]
            _backward(grad, x, *given, mean, rstd, ctx.groups, ctx.silu, wanted, dx, held)
        return dx, *small, None, None, None
