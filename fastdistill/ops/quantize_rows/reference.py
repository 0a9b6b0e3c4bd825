# SPDX-License-Identifier: Apache-2.0
"""Rows in float8 with a scale for each row, in eager torch: the specification of the op's kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistill.ops.geglu.reference import gelu_and_slope

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
LEAST = 2.0**-100  # lower limit of a row's largest magnitude, so that the scale and its inverse are finite


def refuse(x: Tensor, gelu: bool, q: Tensor, scale: Tensor) -> str | None:
    """Kernels take contiguous rows."""
    if not all(t.is_contiguous() for t in (x, q, scale)):
        return "tensors must be contiguous"
    return None if x.numel() else "a tensor is empty"


def quantize_rows(x: Tensor, gelu: bool, q: Tensor, scale: Tensor) -> None:
    """Fill ``q`` [N, C] with the rows of x divided by their scales, and ``scale`` [N, 1] with the largest magnitude of
    each row divided by 448; with ``gelu``, of the tanh GELU of x. Computed in float32."""
    values = x.float()
    if gelu:
        values = gelu_and_slope(values, tanh=True)[0]  # torch's formula cancels far below 0
    magnitudes = values.abs().nan_to_num(nan=math.inf, posinf=math.inf)
    largest = magnitudes.amax(1, keepdim=True).clamp_min(LEAST)
    scale.copy_(largest * (1 / LARGEST))
    q.copy_(values * (torch.full_like(largest, LARGEST) / largest))  # number / tensor rounds twice
