# SPDX-License-Identifier: Apache-2.0
"""A residual, what is added to it and its bias in eager torch: the specification of the op's kernel."""

from __future__ import annotations

from torch import Tensor


def refuse(x: Tensor, h: Tensor, bias: Tensor, y: Tensor) -> str | None:
    """Kernels walk rows of channels."""
    if not all(t.is_contiguous() for t in (x, h, bias, y)):
        return "tensors must be contiguous"
    return None if y.numel() else "a tensor is empty"


def add_bias(x: Tensor, h: Tensor, bias: Tensor, y: Tensor) -> None:
    """Fill ``y`` [..., C] with x + h + bias, x and h like it, bias [C]; float32 inside."""
    y.copy_(x.float() + h.float() + bias.float())
