# SPDX-License-Identifier: Apache-2.0
"""Attention in eager torch: the specification that every backend is held against before it may be chosen.

out = softmax(scale Q K^T) V
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[B, N, H, D] in the tensors' own precision; differentiable. Memory for all weights, N L a head."""
    weights = (torch.einsum("bnhd,blhd->bhnl", q, k) * scale).softmax(-1)
    return torch.einsum("bhnl,blhd->bnhd", weights, v)
