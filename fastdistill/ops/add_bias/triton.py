# SPDX-License-Identifier: Apache-2.0
"""x + h + bias in Triton, and the gradient of the bias.

Grid      one program per 64 channels of 64 positions; for the gradient per 64 channels of 64 to 1024 rows, whose sums
          another kernel adds in order
Traffic   3 accesses per element (6 bytes in bf16); for the gradient one
Precision computed in fp32, rounded once; sums in fp32 over the rows of a program, in fp64 over programs
Limits    64-bit offsets; 2^31 programs
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistill.ops._triton import FUSED, cdiv

ROWS, CHANNELS, WARPS = 64, 64, 4
PROGRAMS, MOST_ROWS = 1024, 1024  # for sums: minimum number of programs (if there are enough rows), most rows of one


@triton.jit
def _add_bias(x, h, bias, y, rows, C, GIVEN: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    pieces = tl.cdiv(C, CHANNELS)
    row = (tl.program_id(0) // pieces).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % pieces * CHANNELS + tl.arange(0, CHANNELS)
    inside = (row < rows)[:, None] & (c < C)[None, :]
    at = row[:, None] * C + c[None, :]
    total = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
    if GIVEN:
        total = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + total
    total += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _bias_gradient(grad, partials, rows, stride, C, EACH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    pieces = tl.cdiv(C, CHANNELS)
    chunk = (tl.program_id(0) // pieces).to(tl.int64)
    c = tl.program_id(0) % pieces * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.full((ROWS, CHANNELS), 0.0, tl.float32)
    for first in range(0, EACH, ROWS):
        row = chunk * EACH + first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (c < C)[None, :]
        total += tl.load(grad + row[:, None] * stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(partials + chunk * C + c, tl.sum(total, 0), mask=c < C)


@triton.jit
def _bias_gradient_merge(partials, total, chunks, C, LANES: tl.constexpr, CHANNELS: tl.constexpr):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    found = tl.full((LANES, CHANNELS), 0.0, tl.float64)
    for first in range(0, chunks, LANES):
        chunk = first + tl.arange(0, LANES).to(tl.int64)
        inside = (chunk < chunks)[:, None] & (c < C)[None, :]
        found += tl.load(partials + chunk[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float64)
    tl.store(total + c, tl.sum(found, 0).to(tl.float32).to(total.dtype.element_ty), mask=c < C)


def add_bias(x: Tensor | None, h: Tensor, bias: Tensor, y: Tensor) -> None:
    """One launch; arguments as in the reference."""
    channels = bias.shape[0]
    rows = y.numel() // channels
    grid = (cdiv(rows, ROWS) * cdiv(channels, CHANNELS),)
    given = x is not None
    _add_bias[grid](x if given else h, h, bias, y, rows, channels, given, ROWS, CHANNELS, num_warps=WARPS, **FUSED)


def bias_gradient(grad: Tensor, total: Tensor) -> None:
    """Two launches; arguments as in the reference."""
    rows, channels = grad.shape
    pieces = cdiv(channels, CHANNELS)
    each = min(max(1 << max(rows * pieces // PROGRAMS, 1).bit_length() - 1, ROWS), MOST_ROWS)
    chunks = cdiv(rows, each)
    partials = torch.empty((chunks, channels), dtype=torch.float32, device=grad.device)
    _bias_gradient[(chunks * pieces,)](
        grad, partials, rows, grad.stride(0), channels, each, ROWS, CHANNELS, num_warps=WARPS, **FUSED
    )
    _bias_gradient_merge[(cdiv(channels, 16),)](partials, total, chunks, channels, 128, 16, num_warps=WARPS, **FUSED)
