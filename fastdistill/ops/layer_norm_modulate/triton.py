# SPDX-License-Identifier: Apache-2.0
"""A gated residual, layer norm and modulation in Triton.

Grid      forward one program per row, or per 2 or 4 short ones; backward one per chunk of rows; the sums of the chunks
          are added in order
Traffic   forward x read, y written; with a residual also h read and s written. Backward s and grad read, dx written;
          with a residual also grad_s and h read and dh written
Precision a row and a chunk's sums in fp32, squares around the mean; chunks added in fp64; outputs rounded once
Limits    64-bit offsets; rows of at most 2^14 channels; a gradient for weight or bias needs one more launch
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistill.ops._triton import FUSED, cdiv, norm_over_samples, optional, power_of_2, terms
from fastdistill.ops.layer_norm_modulate.reference import spread

ROWS, FEW = 32, 8  # rows per chunk; FEW if there would be fewer than PROGRAMS chunks
PROGRAMS = 512
HELD, MOST, MANY = 32, 4, 4096  # forward: numbers of several rows that a thread holds, most rows, fewest programs
AHEAD = 2  # rows of a chunk that are prefetched, if they fit into SHARED bytes
SHARED = 1 << 16
THREADS = tl.constexpr(128)  # minimum threads per program


@triton.jit
def _affine(sample, c, inside, given, strides, GIVEN: tl.constexpr):
    """For each channel: gate, 1 + scale, shift, weight and bias."""
    gate, scale, shift, weight, bias = given
    return (
        optional(gate, sample * strides[0] + c, inside, GIVEN & 1, 1.0),
        1.0 + optional(scale, sample * strides[1] + c, inside, GIVEN & 2, 0.0),
        optional(shift, sample * strides[2] + c, inside, GIVEN & 4, 0.0),
        optional(weight, c, inside, GIVEN & 8, 1.0),
        optional(bias, c, inside, GIVEN & 16, 0.0),
    )


@triton.jit
def _row_sum(v, ROWS: tl.constexpr):
    """The sum of a row, or of each of several: [ROWS, 1]."""
    return tl.sum(v) if ROWS == 1 else tl.sum(v, 1, keep_dims=True)


@triton.jit
def _layer_norm_forward(
    x, h, y, s, mean, rstd, given, strides, eps, rows, D, chunks, GIVEN: tl.constexpr, RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    sample, first = row // chunks, tl.program_id(0) % chunks * ROWS
    if ROWS > 1:
        row = sample * rows + first
    inside, at = c < D, row * D + c
    gate, scale, shift, w, b = _affine(sample, c, inside, given, strides, GIVEN)
    exists = True
    if ROWS > 1:  # side by side
        i = tl.arange(0, ROWS)
        row, exists, at = row + i, i < rows - first, at[None, :] + i[:, None] * D
        inside = exists[:, None] & inside[None, :]
        gate, scale, shift, w, b = gate[None, :], scale[None, :], shift[None, :], w[None, :], b[None, :]
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        total = (v + gate * tl.load(h + at, mask=inside, other=0.0).to(tl.float32)).to(s.dtype.element_ty)
        tl.store(s + at, total, mask=inside)
        v = total.to(tl.float32)  # as rounded
    n = tl.cast(D, tl.float32)
    middle = _row_sum(v, ROWS) / n
    middle += _row_sum(tl.where(inside, v - middle, 0.0), ROWS) / n  # corrects the rounding of the first sum
    d = tl.where(inside, v - middle, 0.0)
    r = 1.0 / tl.sqrt(_row_sum(terms(d, d, BLOCK <= THREADS), ROWS) / n + eps)
    if ROWS > 1:
        tl.store(mean + row, tl.reshape(middle, (ROWS,)), mask=exists)
        tl.store(rstd + row, tl.reshape(r, (ROWS,)), mask=exists)
    else:
        tl.store(mean + row, middle)
        tl.store(rstd + row, r)
    tl.store(y + at, (d * r * (w * scale) + (b * scale + shift)).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _layer_norm_backward(
    grad, grad_s, s, h, dx, dh, mean, rstd, given, strides, partials, rows, D, chunks, GIVEN: tl.constexpr,
    RESIDUAL: tl.constexpr, MORE: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A chunk's gradients, and its sums of dy, dy n and h ds."""
    sample, chunk, c = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks, tl.arange(0, BLOCK)
    inside = c < D
    gate, scale, _, w, _ = _affine(sample, c, inside, given, strides, GIVEN)
    factor = w * scale
    ones = tl.full((BLOCK,), 0.0, tl.float32)
    products, gates = ones, ones
    n = tl.cast(D, tl.float32)
    for first in tl.range(chunk * ROWS, tl.minimum(chunk * ROWS + ROWS, rows), num_stages=STAGES):
        row = sample * rows + first
        at = row * D + c
        dy = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(s + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(rstd + row)
        v = tl.where(inside, (v - tl.load(mean + row)) * r, 0.0)
        dn = terms(dy, factor, BLOCK <= THREADS)
        ds = r * (dn - tl.sum(dn) / n - v * (tl.sum(terms(dn, v, BLOCK <= THREADS)) / n))
        if MORE:
            ds += tl.load(grad_s + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, ds.to(dx.dtype.element_ty), mask=inside)
        ones += dy
        products += dy * v
        if RESIDUAL:
            tl.store(dh + at, (gate * ds).to(dh.dtype.element_ty), mask=inside)
            gates += tl.load(h + at, mask=inside, other=0.0).to(tl.float32) * ds
    to = partials + tl.program_id(0).to(tl.int64) * 3 * D + c
    tl.store(to, ones, mask=inside)
    tl.store(to + D, products, mask=inside)
    if RESIDUAL:
        tl.store(to + 2 * D, gates, mask=inside)


@triton.jit
def _layer_norm_merge(
    partials, given, strides, sums, outs, D, chunks, batch, GIVEN: tl.constexpr, WANTED: tl.constexpr,
    LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of a sample's gate, scale and shift, and its contribution to those of weight and bias."""
    blocks = tl.cdiv(D, BLOCK)
    sample, c = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    ones = tl.full((LANES, BLOCK), 0.0, tl.float64)
    products, gates = ones, ones
    for first in range(0, chunks, LANES):
        k = first + tl.arange(0, LANES)
        inside = (k < chunks)[:, None] & (c < D)[None, :]
        at = partials + ((sample * chunks + k) * 3 * D)[:, None] + c[None, :]
        ones += tl.load(at, mask=inside, other=0.0).to(tl.float64)
        products += tl.load(at + D, mask=inside, other=0.0).to(tl.float64)
        if WANTED & 1:
            gates += tl.load(at + 2 * D, mask=inside, other=0.0).to(tl.float64)
    dgate, dscale, dshift = outs
    dy, dyn = tl.sum(ones, 0).to(tl.float32), tl.sum(products, 0).to(tl.float32)
    at, inside = sample * D + c, c < D
    _, scale, _, w, b = _affine(sample, c, inside, given, strides, GIVEN)
    if WANTED & 1:
        tl.store(dgate + at, tl.sum(gates, 0).to(tl.float32).to(dgate.dtype.element_ty), mask=inside)
    if WANTED & 2:
        tl.store(dscale + at, (w * dyn + b * dy).to(dscale.dtype.element_ty), mask=inside)
    if WANTED & 4:
        tl.store(dshift + at, dy.to(dshift.dtype.element_ty), mask=inside)
    if WANTED & 8:
        tl.store(sums + at, scale * dyn, mask=inside)
        tl.store(sums + tl.cast(batch, tl.int64) * D + at, scale * dy, mask=inside)


def _given(x: Tensor, *given: Tensor | None) -> tuple[tuple[Tensor, ...], tuple[int, ...], int]:
    """The tensors, with x as placeholder for None; strides of the first three; a bit for each given tensor."""
    tensors = tuple(x if t is None else t for t in given)
    strides = tuple(t.stride(0) if t.dim() == 2 else 0 for t in tensors[:3])
    return tensors, strides, sum(1 << i for i, t in enumerate(given) if t is not None)


def _cut(x: Tensor) -> tuple[int, int, int, int]:
    """Batch, rows per sample, channels, and the channels rounded up to a power of two."""
    batch, width = x.shape[0], x.shape[-1]
    return batch, x.numel() // (batch * width), width, power_of_2(width)


def _warps(block: int, backward: bool) -> int:
    """For rows of 1152 on an H200: few warps need less synchronization. One warp forward was 2 us faster yet, but needs
    twice the registers."""
    return (4 if block <= 2048 else 8) if backward else max(1, block // 1024)


def layer_norm_modulate(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    y: Tensor,
    s: Sequence[Tensor],
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """One launch; arguments as in the reference."""
    batch, rows, width, block = _cut(x)
    tensors, strides, given = _given(x, gate, scale, shift, weight, bias)
    residual, warps = h is not None, _warps(block, False)
    length = min(max(HELD * 32 * warps // block, 1), MOST)
    length = length if batch * cdiv(rows, length) >= MANY else 1
    chunks = cdiv(rows, length)
    _layer_norm_forward[(batch * chunks,)](
        x, h if residual else x, y, s[0] if residual else y, mean, rstd, tensors, strides, eps, rows, width, chunks,
        given, residual, length, block, num_warps=warps, **FUSED,
    )  # fmt: skip


def layer_norm_modulate_backward(
    grad: Tensor,
    grad_s: Tensor | None,
    s: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    wanted: int,
    dx: Tensor,
    dh: Sequence[Tensor],
    small: Sequence[Tensor],
) -> None:
    """One launch, one more for gradients summed over rows, and one for those summed over samples."""
    batch, rows, width, block = _cut(s)
    read = 2 + (h is not None) + (grad_s is not None)
    stages = 1 + AHEAD if AHEAD * read * block * s.element_size() <= SHARED else 1
    tensors, strides, given = _given(s, gate, scale, None, weight, bias)
    outs, _, _ = _given(s, *spread(wanted, small))
    length = ROWS if batch * cdiv(rows, ROWS) >= PROGRAMS else FEW
    chunks = cdiv(rows, length)
    partials = torch.empty((batch, chunks, 3, width), dtype=torch.float32, device=s.device)
    residual, more = h is not None, grad_s is not None
    _layer_norm_backward[(batch * chunks,)](
        grad, grad_s if more else grad, s, h if residual else s, dx, dh[0] if residual else dx, mean, rstd, tensors,
        strides, partials, rows, width, chunks, given, residual, more, length, stages, block,
        num_warps=_warps(block, True), **FUSED,
    )  # fmt: skip
    if not wanted:
        return
    weights, biases = wanted & 8, wanted & 16
    wanted |= wanted >> 1 & 8  # from here on the bit of weight also stands for bias
    shared = torch.empty((2, batch, width), dtype=torch.float32, device=s.device) if wanted & 8 else partials
    _layer_norm_merge[(batch * cdiv(width, 64),)](
        partials, tensors, strides, shared, outs[:3], width, chunks, batch, given, wanted, 8, 64, num_warps=4, **FUSED
    )
    if wanted & 8:
        norm_over_samples[(cdiv(width, 64),)](
            shared, outs[3], outs[4], width, batch, weights, biases, 16, 64, num_warps=4, **FUSED
        )
