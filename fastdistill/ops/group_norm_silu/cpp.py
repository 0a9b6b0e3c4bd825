# SPDX-License-Identifier: Apache-2.0
"""Group norm, affine maps and SiLU in C++: ``csrc/group_norm_silu/cpu.cpp``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops import _native
from fastdistill.ops.group_norm_silu.layout import channels_last
from fastdistill.ops.group_norm_silu.reference import spread

CHANNELS = 1 << 14  # most channels per group: a thread or a program keeps a sum for each


def refuse(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    time_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    y: Tensor,
    *statistics: Tensor,
) -> str | None:
    """Kernels support two layouts, and need contiguous rows of channels."""
    return _refuse(x, {"y": y}, (weight, bias, time_bias, scale, shift), groups)


def refuse_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    time_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    silu: bool,
    wanted: int,
    dx: Tensor,
    small: Sequence[Tensor],
) -> str | None:
    """See ``refuse``; also, small gradients must be contiguous."""
    if not all(g.is_contiguous() for g in small):
        return "the gradients of what has no positions must be contiguous"
    return _refuse(x, {"grad": grad, "dx": dx}, (weight, bias, time_bias, scale, shift), groups)


def _refuse(x: Tensor, like: dict[str, Tensor], given: tuple[Tensor | None, ...], groups: int) -> str | None:
    if channels_last(x) is None:
        return f"x is neither contiguous nor channels last (strides {x.stride()})"
    for name, other in like.items():
        if not _native.same_order(other, x) or other.dtype != x.dtype:
            return f"{name} must have the dtype and the strides of x"
    for name, tensor in zip(("weight", "bias", "time_bias", "scale", "shift"), given, strict=True):
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"{name} must have neighboring channels side by side (strides {tensor.stride()})"
    if x.numel() == 0:
        return "x is empty"
    most = x.shape[1] // groups
    return None if most <= CHANNELS else f"a group has {most} channels, more than {CHANNELS}"


def _row(tensor: Tensor | None) -> tuple[int, int, int]:
    """Address, dtype, and stride between samples."""
    if tensor is None:
        return 0, 0, 0
    return tensor.data_ptr(), _native.DTYPES[tensor.dtype], tensor.stride(0) if tensor.dim() == 2 else 0


def _common(
    x: Tensor, groups: int, silu: bool, eps: float, given: tuple[Tensor | None, ...], mean: Tensor, rstd: Tensor
) -> tuple[Any, ...]:
    batch, channels = x.shape[:2]
    sizes = batch, channels, x.numel() // (batch * channels), groups
    return (
        x.data_ptr(), _native.DTYPES[x.dtype], sizes, bool(channels_last(x)), silu, eps, [_row(t) for t in given],
        mean.data_ptr(), rstd.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    time_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """One parallel loop over groups; arguments as in the reference."""
    given = weight, bias, time_bias, scale, shift
    _native.cpu().group_norm_silu(*_common(x, groups, silu, eps, given, mean, rstd), y.data_ptr())


def group_norm_silu_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    time_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    silu: bool,
    wanted: int,
    dx: Tensor,
    small: Sequence[Tensor],
) -> None:
    """One parallel loop over groups, then the sums over samples; arguments as in the reference."""
    given = weight, bias, time_bias, scale, shift
    _native.cpu().group_norm_silu_backward(
        *_common(x, groups, silu, 0.0, given, mean, rstd), grad.data_ptr(), dx.data_ptr(),
        [_row(g) for g in spread(wanted, small)],
    )  # fmt: skip
