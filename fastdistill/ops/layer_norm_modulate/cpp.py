# SPDX-License-Identifier: Apache-2.0
"""A gated residual, layer norm and modulation in C++: ``csrc/layer_norm_modulate/cpu.cpp``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill.ops import _native
from fastdistill.ops.layer_norm_modulate.reference import spread

WIDTH = 1 << 14  # most channels of a row, which one program holds on a GPU


def refuse(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    y: Tensor,
    s: Sequence[Tensor],
    *statistics: Tensor,
) -> str | None:
    """Kernels need contiguous rows."""
    return _refuse([x, y, *s, *([] if h is None else [h])], (gate, scale, shift, weight, bias))


def refuse_backward(
    grad: Tensor,
    grad_s: Tensor | None,
    s: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    wanted: int,
    dx: Tensor,
    dh: Sequence[Tensor],
    small: Sequence[Tensor],
) -> str | None:
    """See ``refuse``; also, small gradients must be contiguous."""
    if not all(g.is_contiguous() for g in small):
        return "the gradients of what rows share must be contiguous"
    optional = [t for t in (grad_s, h) if t is not None]
    return _refuse([grad, s, dx, *dh, *optional], (gate, scale, weight, bias))


def _refuse(rows: Sequence[Tensor], given: Sequence[Tensor | None]) -> str | None:
    if not all(t.is_contiguous() and t.dtype == rows[0].dtype for t in rows):
        return "tensors with rows must be contiguous and of one dtype"
    if any(t is not None and t.shape[-1] > 1 and t.stride(-1) != 1 for t in given):
        return "neighboring channels must be side by side"
    if rows[0].numel() == 0:
        return "x is empty"
    width = rows[0].shape[-1]
    return None if width <= WIDTH else f"rows of {width} channels, more than {WIDTH}"


def _row(tensor: Tensor | None) -> tuple[int, int, int]:
    """Address, dtype, and stride between samples."""
    if tensor is None:
        return 0, 0, 0
    return tensor.data_ptr(), _native.DTYPES[tensor.dtype], tensor.stride(0) if tensor.dim() == 2 else 0


def _address(tensors: Sequence[Tensor | None]) -> int:
    """The address of the first tensor; 0 if there is none."""
    return tensors[0].data_ptr() if tensors and tensors[0] is not None else 0


def _sizes(x: Tensor, *of_samples: Tensor | None) -> tuple[int, int, int]:
    """Samples, rows per sample, width; one sample if there are no tensors per sample."""
    batch, width = x.shape[0] if any(t is not None for t in of_samples) else 1, x.shape[-1]
    return batch, x.numel() // (batch * width), width


def layer_norm_modulate(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    y: Tensor,
    s: Sequence[Tensor],
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """One parallel loop over rows; arguments as in the reference."""
    _native.cpu().layer_norm_modulate(
        x.data_ptr(), _address([h]), _native.DTYPES[x.dtype], _sizes(x, gate, scale, shift), eps,
        [_row(t) for t in (gate, scale, shift, weight, bias)], mean.data_ptr(), rstd.data_ptr(),
        torch.get_num_threads(), y.data_ptr(), _address(s),
    )  # fmt: skip


def layer_norm_modulate_backward(
    grad: Tensor,
    grad_s: Tensor | None,
    s: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    wanted: int,
    dx: Tensor,
    dh: Sequence[Tensor],
    small: Sequence[Tensor],
) -> None:
    """One parallel loop over rows, and one that adds the sums; arguments as in the reference."""
    outs = spread(wanted, small)
    _native.cpu().layer_norm_modulate_backward(
        s.data_ptr(), _address([h]), _native.DTYPES[s.dtype], _sizes(s, gate, scale, *outs[:3]),
        [_row(t) for t in (gate, scale, None, weight, bias)], mean.data_ptr(), rstd.data_ptr(),
        torch.get_num_threads(), grad.data_ptr(), _address([grad_s]), dx.data_ptr(), _address(dh),
        [_row(g) for g in outs],
    )  # fmt: skip
