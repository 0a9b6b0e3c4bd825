# SPDX-License-Identifier: Apache-2.0
"""Group norm of a residual block in one op: the time bias before the statistics, then scale and shift, then SiLU.

    u = x + time_bias    n = (u - mean(u)) / sqrt(var(u) + eps)    y = silu((n weight + bias) (1 + scale) + shift)

mean and var are over the channels of a group and all positions (Wu and He, arXiv 1803.08494). ``time_bias`` is the
time embedding of Stable Diffusion (``ResnetBlock2D`` with ``time_embedding_norm="default"``), scale and shift are
those of ``"scale_shift"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops import _check, _native
from fastdistill.ops._backward import (
    again,
    apply,
    gradients,
    is_differentiated,
    kind_of,
    remember,
    wanted,
    with_its_kernel,
)
from fastdistill.ops._dispatch import Kernel, Kind, later, register
from fastdistill.ops.group_norm_silu import cpp, cuda, reference
from fastdistill.ops.group_norm_silu.layout import laid_out

_GIVEN = "Tensor x, Tensor? weight, Tensor? bias, Tensor? time_bias, Tensor? scale, Tensor? shift"
_group_norm_silu = register(
    "group_norm_silu",
    f"({_GIVEN}, int groups, float eps, bool silu, Tensor(a!) y, Tensor(b!) mean, Tensor(c!) rstd)",
    summary="silu((group_norm(x + time_bias) weight + bias) (1 + scale) + shift)",
    reference=reference.group_norm_silu,
    kernels=[
        Kernel("cuda", "cuda", cuda.group_norm_silu, cuda.reason, cuda.refuse),
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
        Kernel("cuda", "cuda", cuda.group_norm_silu_backward, cuda.reason, cuda.refuse_backward),
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
    """Group norm with a bias before it, and scale, shift and SiLU after it, forward and backward.

    Args:
        x: [B, C, *positions], float32, bfloat16 or float16, contiguous or channels last (other layouts are copied
            once).
        weight, bias: [C], of any of these dtypes, or None.
        groups: divides C.
        eps: added to the variance.
        time_bias: [B, C], added to every position before the statistics; any row stride, such as that of a chunk of a
            projection.
        scale, shift: [B, C], after weight and bias: z (1 + scale) + shift; any row stride.
        silu: whether z sigmoid(z) follows.

    Returns:
        A tensor like ``x``, in the same layout, differentiable with respect to every tensor; second derivatives
        (``create_graph=True``) are those of the eager reference. The variance is computed around the mean, and all
        sums in float32 or wider; the same bits in every run.

    Raises:
        InputError: the shapes, dtypes or devices do not match.
    """
    _check.tensors(x=x)
    given: tuple[Tensor | None, ...] = (weight, bias, time_bias, scale, shift)
    kind = _check.once(_checked, (x, *given), (groups, eps, silu))
    _check.constants(eps=eps)
    x, given = laid_out(x), _rows(given)
    if kind is not None and not wanted((x, *given)):
        return _forward(kind, x, given, groups, eps, silu)[0]
    result: Tensor = apply(kind, _GroupNormSilu, x, *given, groups, eps, silu)
    return result


_NAMES = ("weight", "bias", "time_bias", "scale", "shift")


def _checked(tensors: tuple[Any, ...], values: tuple[int, float, bool]) -> None:
    (groups, eps, silu), (x, *given), require = values, tensors, _check.require
    _check.dtype(x, "x", *_check.FLOATS)
    require(x.dim() >= 2, "x", "[batch, channels, *positions]", tuple(x.shape))
    batch, channels = x.shape[:2]
    divides = f"a divisor of the {channels} channels of x"
    _check.whole(groups, "groups", divides)
    require(channels % groups == 0 and groups <= max(channels, 1), "groups", divides, groups)
    require(_check.single(eps, "eps") >= 0, "eps", "a number >= 0", eps)
    require(isinstance(silu, bool), "silu", "True or False", silu)
    for name, tensor in zip(_NAMES, given, strict=True):
        if tensor is None:
            continue
        _check.tensors(**{name: tensor})
        if name in ("weight", "bias"):
            _check.shape(tensor, name, (channels,), f"one number a channel ({channels},)")
        else:
            _check.shape(tensor, name, (batch, channels), f"one number a sample and channel ({batch}, {channels})")
        _check.dtype(tensor, name, *_check.FLOATS)
        _check.device(tensor, name, x.device, "x")


def _rows(given: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The same tensors, with a stride of 1 between channels (copied if necessary)."""
    return tuple([t if t is None or t.stride(-1) == 1 or t.shape[-1] < 2 else t.contiguous() for t in given])


def _forward(
    kind: Kind | None, x: Tensor, given: Sequence[Tensor | None], groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))
    if x.numel():
        _group_norm_silu(kind, x, *given, groups, eps, silu, y, mean, rstd)
    return y, mean, rstd


def _by_reference(ctx: Any, mean: Tensor, x: Tensor, *given: Any) -> Tensor:
    y, mean, rstd = torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)
    arguments: tuple[Any, ...] = (x, *given, ctx.groups, ctx.eps, ctx.silu, y, mean, rstd)
    reference.group_norm_silu(*arguments)
    return y


class _GroupNormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: Kind | None, x: Tensor, *args: Any) -> Tensor:
        *given, groups, eps, silu = args
        y, mean, rstd = _forward(kind, x, given, groups, eps, silu)
        ctx.save_for_backward(x, *given, mean, rstd)
        remember(ctx, kind)
        ctx.groups, ctx.eps, ctx.silu = groups, eps, silu
        return y

    @staticmethod
    @with_its_kernel
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        kind, (x, *given, mean, rstd) = kind_of(ctx, grad), ctx.saved_tensors
        if is_differentiated():
            return None, *again(lambda *own: _by_reference(ctx, mean, *own), (x, *given), grad), None, None, None
        dx = torch.empty_like(x)
        if not _native.same_order(grad, x):
            grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
        small = gradients(given, ctx.needs_input_grad[2:7], x.numel() == 0)
        if x.numel():
            wanted = sum([1 << i for i, g in enumerate(small) if g is not None])
            held = [g for g in small if g is not None]
            _backward(kind, grad, x, *given, mean, rstd, ctx.groups, ctx.silu, wanted, dx, held)
        return None, dx, *small, None, None, None
