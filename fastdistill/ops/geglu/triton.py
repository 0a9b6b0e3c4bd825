# SPDX-License-Identifier: Apache-2.0
"""GEGLU in Triton.

Grid      one program per ``BLOCK`` columns of a row; if the gradient is summed, of up to 128 rows, and another kernel
          adds the programs' sums in order
Traffic   forward 3 accesses per element of y, backward 5: 6 and 10 bytes in bf16; the sums 2 % more
Precision computed in fp32, rounded once; sums in fp32 over the rows of a program, in fp64 over programs
Limits    64-bit offsets; 2^31 programs
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistill.ops._triton import FUSED, cdiv, norm_over_samples

BLOCK, WARPS = 512, 2  # the fastest of five pairs for rows of 1280 on an H200
MOST_ROWS, PROGRAMS = 128, 4096  # for sums: most rows per program, minimum number of programs (if rows suffice)


@triton.jit
def _gelu(g, TANH: tl.constexpr):
    """gelu(g) and its derivative."""
    if TANH:
        twice_u = 1.5957691216057308 * g * (1.0 + 0.044715 * g * g)
        e = tl.exp(-tl.abs(twice_u))
        near = 1.0 / (1.0 + e)
        far = e * near  # 1 - near, without cancellation
        s = tl.where(twice_u < 0.0, far, near)
        value = g * s
        slope = s + g * near * far * 1.5957691216057308 * (1.0 + 0.134145 * g * g)
    else:
        # 1 - Phi(|g|) = e^(-g^2 / 2) t P(t), t = 1 / (1 + 0.23 |g|), as in csrc/activations.h: fewer instructions than
        # erf, with which the kernel computed for as long as it moved data.
        size = tl.minimum(tl.abs(g), 1e30)
        t = 1.0 / (1.0 + 0.23 * size)
        p = 0.2791156449 - 0.0762817742 * t
        p = p * t - 0.2532405614
        p = p * t + 0.2710405169
        p = p * t - 0.01037977821
        p = p * t + 0.1091846186
        p = p * t + 0.08861670587
        p = p * t + 0.09194460268
        e = tl.exp2(-0.7213475204444817 * g * g)
        above = e * (p * t)
        slope = tl.where(g < 0.0, above, 1.0 - above) + 0.3989422804014327 * g * e
        value = tl.maximum(g, 0.0) - size * above
    return value, slope


@triton.jit
def _place(width, BLOCK: tl.constexpr):
    """For a program: the offset of its row in y, its columns, and which columns are inside the row."""
    blocks = tl.cdiv(width, BLOCK)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return (tl.program_id(0) // blocks).to(tl.int64) * width, columns, columns < width


@triton.jit
def _geglu_forward(x, y, width, TANH: tl.constexpr, BLOCK: tl.constexpr):
    first, columns, inside = _place(width, BLOCK)
    a = tl.load(x + 2 * first + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(x + 2 * first + width + columns, mask=inside, other=0.0).to(tl.float32)
    value, _ = _gelu(g, TANH)
    tl.store(y + first + columns, (a * value).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _geglu_backward(grad, x, dx, width, TANH: tl.constexpr, BLOCK: tl.constexpr):
    first, columns, inside = _place(width, BLOCK)
    d = tl.load(grad + first + columns, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(x + 2 * first + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(x + 2 * first + width + columns, mask=inside, other=0.0).to(tl.float32)
    value, slope = _gelu(g, TANH)
    to = dx + 2 * first + columns
    tl.store(to, (d * value).to(dx.dtype.element_ty), mask=inside)
    tl.store(to + width, (d * a * slope).to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _geglu_backward_summed(
    grad, x, dx, partials, rows, width, chunks, ROWS: tl.constexpr, TANH: tl.constexpr, BLOCK: tl.constexpr
):
    """The gradient of a program's rows, and its sums over these rows."""
    blocks = tl.cdiv(width, BLOCK)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    chunk, inside = (tl.program_id(0) // blocks).to(tl.int64), columns < width
    values = tl.full((BLOCK,), 0.0, tl.float32)
    gates = values
    for row in range(chunk * ROWS, tl.minimum(chunk * ROWS + ROWS, rows)):
        first = row * width
        d = tl.load(grad + first + columns, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(x + 2 * first + columns, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(x + 2 * first + width + columns, mask=inside, other=0.0).to(tl.float32)
        value, slope = _gelu(g, TANH)
        da, dg = d * value, d * a * slope
        values += da
        gates += dg
        to = dx + 2 * first + columns
        tl.store(to, da.to(dx.dtype.element_ty), mask=inside)
        tl.store(to + width, dg.to(dx.dtype.element_ty), mask=inside)
    to = partials + chunk * width + columns
    tl.store(to, values, mask=inside)
    tl.store(to + tl.cast(chunks, tl.int64) * width, gates, mask=inside)


def _grid(x: Tensor) -> tuple[tuple[int], int]:
    width = x.shape[-1] // 2
    return (x.numel() // (2 * width) * cdiv(width, BLOCK),), width


def geglu(x: Tensor, tanh: bool, y: Tensor) -> None:
    """One launch; arguments as in the reference."""
    grid, width = _grid(x)
    _geglu_forward[grid](x, y, width, tanh, BLOCK, num_warps=WARPS, **FUSED)


def geglu_backward(grad: Tensor, x: Tensor, tanh: bool, dx: Tensor, dbias: Sequence[Tensor] = ()) -> None:
    """One launch, or two with sums; arguments as in the reference."""
    grid, width = _grid(x)
    if not dbias:
        _geglu_backward[grid](grad, x, dx, width, tanh, BLOCK, num_warps=WARPS, **FUSED)
        return
    rows, blocks, (total,) = x.numel() // (2 * width), cdiv(width, BLOCK), dbias
    each = min(1 << max(rows * blocks // PROGRAMS, 1).bit_length() - 1, MOST_ROWS)
    chunks = cdiv(rows, each)
    partials = torch.empty((2, chunks, width), dtype=torch.float32, device=x.device)
    _geglu_backward_summed[(chunks * blocks,)](
        grad, x, dx, partials, rows, width, chunks, each, tanh, BLOCK, num_warps=WARPS, **FUSED
    )
    norm_over_samples[(cdiv(width, 16),)](
        partials, total, total[width:], width, chunks, True, True, 128, 16, num_warps=4, **FUSED
    )
