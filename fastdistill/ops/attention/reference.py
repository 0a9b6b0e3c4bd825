# SPDX-License-Identifier: Apache-2.0
"""Attention in eager torch: the specification with which each backend is compared before it may be chosen.

out = softmax(scale Q K^T) V
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[B, N, H, D] in the dtype of the tensors; differentiable. Needs memory for all weights, N L per head."""
    weights = (torch.einsum("bnhd,blhd->bhnl", q, k) * scale).softmax(-1)
    return torch.einsum("bhnl,blhd->bnhd", weights, v)
