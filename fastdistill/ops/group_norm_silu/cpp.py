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
_NAMES = ("weight", "bias", "time_bias", "scale", "shift")

Given = Sequence[Tensor | None]  # weight, bias, time_bias, scale, shift


def refuse(x: Tensor, *args: Any) -> str | None:
    """Kernels support two layouts, and need contiguous rows of channels. Arguments as in the reference."""
    *given, groups, _, _, y, _, _ = args
    return _refuse(x, {"y": y}, given, groups)


def refuse_backward(grad: Tensor, x: Tensor, *args: Any) -> str | None:
    """See ``refuse``; also, small gradients must be contiguous."""
    *given, _, _, groups, _, _, dx, small = args
    for gradient in small:
        if not gradient.is_contiguous():
            return "the gradients of what has no positions must be contiguous"
    return _refuse(x, {"grad": grad, "dx": dx}, given, groups)


def _refuse(x: Tensor, like: dict[str, Tensor], given: Given, groups: int) -> str | None:
    if channels_last(x) is None:
        return f"x is neither contiguous nor channels last (strides {x.stride()})"
    for name, other in like.items():
        if other.dtype != x.dtype or not _native.same_order(other, x):
            return f"{name} must have the dtype and the strides of x"
    for name, tensor in zip(_NAMES, given, strict=True):
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"{name} must have neighboring channels side by side (strides {tensor.stride()})"
    if x.numel() == 0:
        return "x is empty"
    most = x.shape[1] // groups
    return None if most <= CHANNELS else f"a group has {most} channels, more than {CHANNELS}"


def rows(given: Given) -> list[tuple[int, int, int]]:
    """Address, dtype, and stride between samples of each."""
    types = _native.DTYPES
    return [
        (0, 0, 0) if t is None else (t.data_ptr(), types[t.dtype], t.stride(0) if t.dim() == 2 else 0) for t in given
    ]


def sizes_of(x: Tensor, groups: int) -> tuple[int, int, int, int]:
    """Batch, channels, positions, groups."""
    batch, channels = x.shape[:2]
    return batch, channels, x.numel() // (batch * channels), groups


def common(x: Tensor, given: Given, groups: int, silu: bool, eps: float, mean: Tensor, rstd: Tensor) -> tuple[Any, ...]:
    """The arguments that begin every call of a compiled kernel."""
    return (
        x.data_ptr(), _native.DTYPES[x.dtype], sizes_of(x, groups), silu, eps, rows(given), mean.data_ptr(),
        rstd.data_ptr(),
    )  # fmt: skip


def group_norm_silu(x: Tensor, *args: Any) -> None:
    """One parallel loop over groups; arguments as in the reference."""
    *given, groups, eps, silu, y, mean, rstd = args
    _native.cpu().group_norm_silu(
        *common(x, given, groups, silu, eps, mean, rstd), bool(channels_last(x)), torch.get_num_threads(), y.data_ptr()
    )


def group_norm_silu_backward(grad: Tensor, x: Tensor, *args: Any) -> None:
    """One parallel loop over groups, then the sums over samples; arguments as in the reference."""
    *given, mean, rstd, groups, silu, wanted, dx, small = args
    _native.cpu().group_norm_silu_backward(
        *common(x, given, groups, silu, 0.0, mean, rstd), bool(channels_last(x)), torch.get_num_threads(),
        grad.data_ptr(), dx.data_ptr(), rows(spread(wanted, small)),
    )  # fmt: skip
