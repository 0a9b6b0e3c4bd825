# SPDX-License-Identifier: Apache-2.0
"""x + h + bias in eager torch: the specification of the op's kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def refuse(x: Tensor | None, h: Tensor, bias: Tensor, y: Tensor) -> str | None:
    """Kernels need contiguous rows of channels."""
    if not all(t.is_contiguous() for t in (x, h, bias, y) if t is not None):
        return "tensors must be contiguous"
    return None if y.numel() else "a tensor is empty"


def refuse_gradient(grad: Tensor, total: Tensor) -> str | None:
    """See ``refuse``; there may be gaps between rows."""
    if grad.stride(1) != 1 or not total.is_contiguous():
        return "numbers of a row must be side by side"
    return None if grad.numel() else "a tensor is empty"


def add_bias(x: Tensor | None, h: Tensor, bias: Tensor, y: Tensor) -> None:
    """Fill ``y`` [..., C] with x + h + bias; x and h have its shape, bias is [C]. Computed in float32."""
    total = h.float() if x is None else x.float() + h.float()
    y.copy_(total + bias.float())


def bias_gradient(grad: Tensor, total: Tensor) -> None:
    """Fill ``total`` [C] with the sum of the rows of ``grad`` [N, C]; computed in float32."""
    total.copy_(grad.sum(0, dtype=torch.float32))
