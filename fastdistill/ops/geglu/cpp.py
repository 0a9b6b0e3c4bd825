# SPDX-License-Identifier: Apache-2.0
"""GEGLU in C++: ``csrc/geglu/cpu.cpp``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill.ops import _native


def refuse(x: Tensor, tanh: bool, y: Tensor) -> str | None:
    """Kernels need contiguous rows."""
    return _refuse(x, y)


def refuse_backward(grad: Tensor, x: Tensor, tanh: bool, dx: Tensor, dbias: Sequence[Tensor] = ()) -> str | None:
    """See ``refuse``."""
    if not all(total.is_contiguous() for total in dbias):
        return "the gradient of the bias must be contiguous"
    return _refuse(grad, x, dx)


def _refuse(*tensors: Tensor) -> str | None:
    if not all(t.is_contiguous() and t.dtype == tensors[0].dtype for t in tensors):
        return "tensors must be contiguous and of one dtype"
    return None if all(t.numel() for t in tensors) else "a tensor is empty"


def _launch(x: Tensor, tanh: bool, y: int, grad: int, dx: int) -> None:
    width = x.shape[-1] // 2
    rows = x.numel() // (2 * width)
    _native.cpu().geglu(x.data_ptr(), _native.DTYPES[x.dtype], rows, width, tanh, y, grad, dx, torch.get_num_threads())


def geglu(x: Tensor, tanh: bool, y: Tensor) -> None:
    """One parallel loop over rows; arguments as in the reference."""
    _launch(x, tanh, y.data_ptr(), 0, 0)


def geglu_backward(grad: Tensor, x: Tensor, tanh: bool, dx: Tensor, dbias: Sequence[Tensor] = ()) -> None:
    """One parallel loop over rows, then torch sums its output for the bias; arguments as in the reference."""
    _launch(x, tanh, 0, grad.data_ptr(), dx.data_ptr())
    for total in dbias:
        total.copy_(dx.view(-1, dx.shape[-1]).sum(0, dtype=torch.float32))
