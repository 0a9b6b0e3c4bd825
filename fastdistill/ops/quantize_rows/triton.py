# SPDX-License-Identifier: Apache-2.0
"""Rows in float8 with a scale for each row, in Triton.

Grid      one program per row, which keeps it in registers
Traffic   one read and one write per element: 3 bytes in bf16
Precision computed in fp32; the quotient is rounded once to e4m3 (to nearest even)
Limits    rows of up to 16384; GPUs with float8 (8.9 and later); 64-bit offsets; 2^31 programs
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdistill.ops._triton import FUSED, power_of_2


@triton.jit
def _gelu(x):
    """The tanh GELU: x sigmoid(2 u), without cancellation."""
    twice_u = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
    e = tl.exp(-tl.abs(twice_u))
    near = 1.0 / (1.0 + e)
    return x * tl.where(twice_u < 0.0, e * near, near)


@triton.jit
def _quantize_rows(x, q, scale, width, LEAST: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        values = _gelu(values)
    magnitudes = tl.abs(values)
    # A maximum on a GPU ignores NaN, which must stay visible: such a row has the scale infinity.
    largest = tl.max(tl.where(magnitudes == magnitudes, magnitudes, float("inf")), 0)
    largest = tl.where(largest > LEAST, largest, LEAST)
    tl.store(scale + row, largest * (1.0 / 448.0))
    tl.store(q + row * width + columns, (values * tl.div_rn(448.0, largest)).to(q.dtype.element_ty), mask=inside)


def quantize_rows(x: Tensor, gelu: bool, q: Tensor, scale: Tensor) -> None:
    """One launch; arguments as in the reference."""
    rows, width = x.shape
    block = max(power_of_2(width), 128)
    warps = min(max(block // 1024, 1), 16)
    _quantize_rows[(rows,)](x, q, scale, width, 2.0**-100, gelu, block, num_warps=warps, **FUSED)
