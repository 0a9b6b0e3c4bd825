# SPDX-License-Identifier: Apache-2.0
"""Cross-attention in Triton: the device functions that its kernels share.

A matrix with D columns is a tuple of tiles, one per piece of its columns; the width of a piece is a power of two.
"""

# ruff: noqa: RUF005 (Triton has no unpacking)
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def zeros(M: tl.constexpr, PIECES: tl.constexpr):
    """[M, D] in fp32."""
    tiles = ()
    for i in tl.static_range(len(PIECES)):
        tiles = tiles + (tl.zeros((M, tl.constexpr(PIECES[i])), tl.float32),)
    return tiles


@triton.jit
def get(base, at, end, step, D: tl.constexpr, PIECES: tl.constexpr, UNIT: tl.constexpr):
    """Rows ``at`` of a matrix (``step``: units of elements from row to row); zero from row ``end`` on."""
    tiles = ()
    for i in tl.static_range(len(PIECES)):
        column = i * PIECES[0] + tl.arange(0, PIECES[i])
        inside = (at < end)[:, None] & (column < D)[None, :]
        pointers = base + (at.to(tl.int64) * step * UNIT)[:, None] + column[None, :]
        tiles = tiles + (tl.load(pointers, mask=inside, other=0.0),)
    return tiles


@triton.jit
def put(base, at, end, step, tiles, factor, D: tl.constexpr, PIECES: tl.constexpr, UNIT: tl.constexpr):
    """Store ``tiles`` times ``factor`` (a scalar, or [M, 1] with one value per row) to the rows ``at`` below
    ``end``."""
    for i in tl.static_range(len(PIECES)):
        column = i * PIECES[0] + tl.arange(0, PIECES[i])
        inside = (at < end)[:, None] & (column < D)[None, :]
        pointers = base + (at.to(tl.int64) * step * UNIT)[:, None] + column[None, :]
        tl.store(pointers, (tiles[i] * factor).to(base.dtype.element_ty), mask=inside)


@triton.jit
def product(a, b, PIECES: tl.constexpr):
    """a b^T, summed over the pieces of their columns."""
    x = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    for i in tl.static_range(1, len(PIECES)):
        x = tl.dot(a[i], tl.trans(b[i]), x, input_precision="ieee")
    return x


@triton.jit
def scaled_product(a, b, scale, x, PIECES: tl.constexpr):
    """scale a b^T + x, rounded after each piece of the columns, so that the sum is not one long chain of additions."""
    for i in tl.static_range(len(PIECES)):
        x += tl.dot(a[i], tl.trans(b[i]), input_precision="ieee") * scale
    return x


@triton.jit
def add_product(sums, weights, tiles, PIECES: tl.constexpr):
    """sums + weights tiles, one piece of columns at a time."""
    added = ()
    for i in tl.static_range(len(PIECES)):
        added = added + (tl.dot(weights, tiles[i], sums[i], input_precision="ieee"),)
    return added


@triton.jit
def zeros_across(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A zero matrix in fp32, in pieces of its rows and columns, row by row."""
    tiles = ()
    for i in tl.static_range(len(ROWS)):
        for j in tl.static_range(len(COLUMNS)):
            tiles = tiles + (tl.zeros((tl.constexpr(ROWS[i]), tl.constexpr(COLUMNS[j])), tl.float32),)
    return tiles


@triton.jit
def add_across(sums, tiles, weights, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """sums + tiles^T weights, where both are in pieces of their columns."""
    added = ()
    for i in tl.static_range(len(ROWS)):
        for j in tl.static_range(len(COLUMNS)):
            x = tl.dot(tl.trans(tiles[i]), weights[j], sums[i * len(COLUMNS) + j], input_precision="ieee")
            added = added + (x,)
    return added


@triton.jit
def put_across(base, end, step, tiles, factor, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store the transpose of ``tiles`` times ``factor`` to rows of D elements, ``step`` times D apart, below
    ``end``."""
    for i in tl.static_range(len(ROWS)):
        for j in tl.static_range(len(COLUMNS)):
            column = i * ROWS[0] + tl.arange(0, ROWS[i])
            at = j * COLUMNS[0] + tl.arange(0, COLUMNS[j])
            pointers = base + column[:, None] + (at.to(tl.int64) * step * D)[None, :]
            x = tiles[i * len(COLUMNS) + j] * factor
            tl.store(pointers, x.to(base.dtype.element_ty), mask=(column < D)[:, None] & (at < end)[None, :])


@triton.jit
def times_and_product(sums, factor, weights, tiles, PIECES: tl.constexpr):
    """sums * factor + weights tiles; the product is summed separately."""
    added = ()
    for i in tl.static_range(len(PIECES)):
        x = tl.dot(weights, tiles[i], input_precision="ieee")
        added = added + (tl.fma(sums[i], tl.broadcast_to(factor, x.shape), x),)
    return added


@triton.jit
def times(tiles, factor, PIECES: tl.constexpr):
    scaled = ()
    for i in tl.static_range(len(PIECES)):
        scaled = scaled + (tiles[i] * factor,)
    return scaled


@triton.jit
def rounded(tiles, like, PIECES: tl.constexpr):
    """``tiles`` in the dtype of the elements that ``like`` points to."""
    x = ()
    for i in tl.static_range(len(PIECES)):
        x = x + (tiles[i].to(like.dtype.element_ty),)
    return x


@triton.jit
def key_bias(mask, at, end, MASK: tl.constexpr):
    """The bias added to the scores of keys ``at``, times log2(e); -inf masks a key."""
    bias = tl.where(at < end, 0.0, float("-inf"))
    if MASK == 1:
        kept = tl.load(mask + at, mask=at < end, other=0)
        bias = tl.where(kept != 0, bias, float("-inf"))
    if MASK == 2:
        given = tl.load(mask + at, mask=at < end, other=0.0).to(tl.float32)
        scaled = tl.minimum(tl.maximum(given * 1.4426950408889634, -3.4028234e38), 3.4028234e38)  # log2 e
        bias += tl.where(tl.abs(given) < float("inf"), scaled, given)  # a finite bias stays finite
    return bias


@triton.jit
def finite(top):
    """The maximum that the softmax subtracts: 0 if all keys are masked."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def inverse(total):
    """1 / (sum of the weights): 0 if all keys are masked, so that the output and the gradients of the row are 0."""
    return tl.where(total == 0.0, 0.0, 1.0 / total)


@triton.jit
def place(rows, R, scale, H, outer, ROWS: tl.constexpr):
    """For a program: its head, its number among ``outer`` (int32) of the head's sample, the sample, the row of K and V
    (int64); and the scale, NaN if the row is not one of R."""
    program = tl.program_id(0)
    b = (program // H // outer).to(tl.int64)
    row = b
    if ROWS:
        row = tl.load(rows + b)
        there = tl.where(row < 0, 0, tl.where(row < R, 1, 0)) == 1
        row = tl.where(there, row, 0)
        scale = tl.where(there, scale, float("nan"))
    return (program % H).to(tl.int64), program // H % outer, b, row, scale


@triton.jit
def start(strides, b, h, UNIT: tl.constexpr):
    """The offset of (sample b, head h). Strides count units, so that the compiler knows the alignment of offsets."""
    return (b * strides[0] + h * strides[2]) * UNIT
