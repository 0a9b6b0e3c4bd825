# SPDX-License-Identifier: Apache-2.0
"""Group norm, affine maps and SiLU in Triton, over tiles of channels by positions, in either layout.

Grid      one program per tile of a sample; between the passes one program per sample and group merges the sums of the
          tiles in order. A group that fits into one program needs one launch in total (``_group_norm_whole``)
Traffic   forward x read twice, y written; backward x and grad read twice, dx written: in bf16 6 and 10 bytes per
          element. (Slices of the batch that stay in the L2 cache between the reads were slower on an H200: 511 us
          compared with 417 for 32 x 320 x 64 x 64, forward and backward)
Precision a tile's mean and sum of squares around it in fp32, merged in fp64 (Chan et al. 1979); outputs rounded once
Limits    64-bit offsets; 2^14 channels per group; a gradient for weight or bias needs one more launch
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistill.ops._triton import FUSED, cdiv, norm_over_samples, optional, power_of_2, terms
from fastdistill.ops.group_norm_silu.layout import channels_last
from fastdistill.ops.group_norm_silu.reference import spread
from fastdistill.ops.group_norm_silu.triton_tiles import affine, output, slopes, tile, whole_group

TILE = 8192  # elements
WHOLE = 16384  # most elements of a group in one program, padded to a power of two; half of it in the backward
SUMS = 512  # partial sums that a program holds at once
WARPS = 8


@triton.jit
def _group_norm_moments(
    x, partials, C, P, chunks, LAST: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, ALONE: tl.constexpr
):  # fmt: skip
    """Mean of each channel over the tile, and the sum of squares around it."""
    sample, chunk, c, p, at = tile(C, P, chunks, LAST, BC, BP)
    inside = (c < C)[:, None] & (p < P)[None, :]
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(v, 1) / tl.cast(tl.minimum(P - chunk * BP, BP), tl.float32)
    d = tl.where(inside, v - mean[:, None], 0.0)
    to = partials + (sample * chunks + chunk) * 2 * C + c
    tl.store(to, mean, mask=c < C)
    tl.store(to + C, tl.sum(terms(d, d, ALONE), 1), mask=c < C)


@triton.jit
def _group_norm_merge_moments(
    partials, mean, rstd, time_bias, stride, eps, C, P, G, chunks, TIME: tl.constexpr, BP: tl.constexpr,
    CHANNELS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation of a group, from the moments of its tiles and channels."""
    sample, lane = (tl.program_id(0) // G).to(tl.int64), tl.arange(0, CHANNELS)
    of_group, c = lane < C // G, tl.program_id(0) % G * (C // G) + lane
    added = optional(time_bias, sample * stride + c, of_group, TIME, 0.0).to(tl.float64)
    n = tl.cast(C // G, tl.float64) * tl.cast(P, tl.float64)
    total = tl.full((LANES, CHANNELS), 0.0, tl.float64)
    for first in range(0, chunks, LANES):
        k = first + tl.arange(0, LANES)
        inside = (k < chunks)[:, None] & of_group[None, :]
        at = ((sample * chunks + k) * 2 * C)[:, None] + c[None, :]
        here = tl.load(partials + at, mask=inside, other=0.0).to(tl.float64) + added[None, :]
        total += tl.where(inside, here * tl.minimum(P - k * BP, BP).to(tl.float64)[:, None], 0.0)
    middle = tl.sum(total) / n
    total = tl.full((LANES, CHANNELS), 0.0, tl.float64)
    for first in range(0, chunks, LANES):
        k = first + tl.arange(0, LANES)
        inside = (k < chunks)[:, None] & of_group[None, :]
        at = ((sample * chunks + k) * 2 * C)[:, None] + c[None, :]
        d = tl.load(partials + at, mask=inside, other=0.0).to(tl.float64) + added[None, :] - middle
        squares = tl.load(partials + at + C, mask=inside, other=0.0).to(tl.float64)
        total += tl.where(inside, squares + d * d * tl.minimum(P - k * BP, BP).to(tl.float64)[:, None], 0.0)
    tl.store(mean + tl.program_id(0), middle.to(tl.float32))
    tl.store(rstd + tl.program_id(0), (1.0 / tl.sqrt(tl.sum(total) / n + eps)).to(tl.float32))


@triton.jit
def _group_norm_output(
    x, y, mean, rstd, given, strides, C, P, G, chunks, GIVEN: tl.constexpr, SILU: tl.constexpr, LAST: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    sample, _, c, p, at = tile(C, P, chunks, LAST, BC, BP)
    inside, group = (c < C)[:, None] & (p < P)[None, :], sample * G + c // (C // G)
    t, w, b, s, h = affine(sample, c, c < C, given, strides, GIVEN)
    middle = tl.load(mean + group, mask=c < C, other=0.0) - t
    r = tl.load(rstd + group, mask=c < C, other=0.0)
    v = tl.load(x + at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    z = output(v, middle, r, w, b, s, h, SILU)
    tl.store(y + at, z.to(y.dtype.element_ty), mask=inside, eviction_policy="evict_first")


@triton.jit
def _group_norm_whole(
    x, y, mean, rstd, given, strides, eps, C, P, G, GIVEN: tl.constexpr, SILU: tl.constexpr, LAST: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """A group from x to y in one program."""
    sample, c, of_group, at, inside = whole_group(C, P, G, LAST, BC, BP)
    n = tl.cast(C // G, tl.float32) * tl.cast(P, tl.float32)
    t, w, b, s, h = affine(sample, c, of_group, given, strides, GIVEN)
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    middle = tl.sum(tl.where(inside, v + t[:, None], 0.0)) / n
    d = tl.where(inside, v - (middle - t)[:, None], 0.0)
    middle += tl.sum(d) / n  # corrects the rounding of the first sum
    d = tl.where(inside, v - (middle - t)[:, None], 0.0)
    r = 1.0 / tl.sqrt(tl.sum(terms(d, d, ALONE)) / n + eps)
    tl.store(mean + tl.program_id(0), middle)
    tl.store(rstd + tl.program_id(0), r)
    z = output(v, middle - t, tl.full((BC,), 0.0, tl.float32) + r, w, b, s, h, SILU)
    tl.store(y + at, z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _group_gradients(
    ones, products, normals, sample, c, of_group, C, P, n, batch, r, w, b, s, sums, outs, WANTED: tl.constexpr
):  # fmt: skip
    """From the sums of dz, dz n and n of each channel (fp64): the means of dn and dn n, and the small gradients."""
    dtime_bias, dscale, dshift = outs
    w, b, s = w.to(tl.float64), b.to(tl.float64), s.to(tl.float64)
    mean = tl.sum(tl.where(of_group, ones * w * s, 0.0)) / n
    mean_n = tl.sum(tl.where(of_group, products * w * s, 0.0)) / n
    at = sample * C + c
    if WANTED & 1:
        tl.store(sums + at, (s * products).to(tl.float32), mask=of_group)
        tl.store(sums + tl.cast(batch, tl.int64) * C + at, (s * ones).to(tl.float32), mask=of_group)
    if WANTED & 4:
        value = r * (w * s * ones - P * mean - normals * mean_n)
        tl.store(dtime_bias + at, value.to(tl.float32).to(dtime_bias.dtype.element_ty), mask=of_group)
    if WANTED & 8:
        tl.store(dscale + at, (w * products + b * ones).to(tl.float32).to(dscale.dtype.element_ty), mask=of_group)
    if WANTED & 16:
        tl.store(dshift + at, ones.to(tl.float32).to(dshift.dtype.element_ty), mask=of_group)
    return mean.to(tl.float32), mean_n.to(tl.float32)


@triton.jit
def _group_norm_sums(
    x, grad, partials, mean, rstd, given, strides, C, P, G, chunks, GIVEN: tl.constexpr, SILU: tl.constexpr,
    LAST: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """The sums of dz, dz n and n of each channel over the tile."""
    sample, chunk, c, p, at = tile(C, P, chunks, LAST, BC, BP)
    inside, group = (c < C)[:, None] & (p < P)[None, :], sample * G + c // (C // G)
    t, w, b, s, h = affine(sample, c, c < C, given, strides, GIVEN)
    middle = tl.load(mean + group, mask=c < C, other=0.0) - t
    r = tl.load(rstd + group, mask=c < C, other=0.0)
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    n, dz = slopes(v, g, middle, r, w, b, s, h, SILU, ALONE)
    to = partials + (sample * chunks + chunk) * 3 * C + c
    tl.store(to, tl.sum(dz, 1), mask=c < C)
    tl.store(to + C, tl.sum(terms(dz, n, ALONE), 1), mask=c < C)
    tl.store(to + 2 * C, tl.sum(tl.where(inside, n, 0.0), 1), mask=c < C)


@triton.jit
def _group_norm_merge_sums(
    partials, means, rstd, given, strides, sums, outs, C, P, G, chunks, batch, GIVEN: tl.constexpr,
    WANTED: tl.constexpr, CHANNELS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    sample, lane = (tl.program_id(0) // G).to(tl.int64), tl.arange(0, CHANNELS)
    of_group, c = lane < C // G, tl.program_id(0) % G * (C // G) + lane
    ones = tl.full((LANES, CHANNELS), 0.0, tl.float64)
    products, normals = ones, ones
    for first in range(0, chunks, LANES):
        k = first + tl.arange(0, LANES)
        inside = (k < chunks)[:, None] & of_group[None, :]
        at = partials + ((sample * chunks + k) * 3 * C)[:, None] + c[None, :]
        ones += tl.load(at, mask=inside, other=0.0).to(tl.float64)
        products += tl.load(at + C, mask=inside, other=0.0).to(tl.float64)
        if WANTED & 4:
            normals += tl.load(at + 2 * C, mask=inside, other=0.0).to(tl.float64)
    _, w, b, s, _ = affine(sample, c, of_group, given, strides, GIVEN)
    n = tl.cast(C // G, tl.float64) * tl.cast(P, tl.float64)
    mean, mean_n = _group_gradients(
        tl.sum(ones, 0), tl.sum(products, 0), tl.sum(normals, 0), sample, c, of_group, C, P, n, batch,
        tl.load(rstd + tl.program_id(0)), w, b, s, sums, outs, WANTED,
    )  # fmt: skip
    tl.store(means + 2 * tl.program_id(0), mean)
    tl.store(means + 2 * tl.program_id(0) + 1, mean_n)


@triton.jit
def _group_norm_gradient(
    x, grad, dx, means, mean, rstd, given, strides, C, P, G, chunks, GIVEN: tl.constexpr, SILU: tl.constexpr,
    LAST: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    sample, _, c, p, at = tile(C, P, chunks, LAST, BC, BP)
    inside, group = (c < C)[:, None] & (p < P)[None, :], sample * G + c // (C // G)
    t, w, b, s, h = affine(sample, c, c < C, given, strides, GIVEN)
    middle = tl.load(mean + group, mask=c < C, other=0.0) - t
    r = tl.load(rstd + group, mask=c < C, other=0.0)
    first = tl.load(means + 2 * group, mask=c < C, other=0.0)
    second = tl.load(means + 2 * group + 1, mask=c < C, other=0.0)
    v = tl.load(x + at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    g = tl.load(grad + at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    n, dz = slopes(v, g, middle, r, w, b, s, h, SILU, False)
    d = r[:, None] * (dz * (w * s)[:, None] - first[:, None] - n * second[:, None])
    tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside, eviction_policy="evict_first")


@triton.jit
def _group_norm_whole_backward(
    x, grad, dx, mean, rstd, given, strides, sums, outs, C, P, G, batch, GIVEN: tl.constexpr, WANTED: tl.constexpr,
    SILU: tl.constexpr, LAST: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """All gradients of a group in one program, except those that are summed over samples."""
    sample, c, of_group, at, inside = whole_group(C, P, G, LAST, BC, BP)
    t, w, b, s, h = affine(sample, c, of_group, given, strides, GIVEN)
    r = tl.load(rstd + tl.program_id(0))
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    rs = tl.full((BC,), 0.0, tl.float32) + r
    n, dz = slopes(v, g, tl.load(mean + tl.program_id(0)) - t, rs, w, b, s, h, SILU, ALONE)
    ones = tl.sum(dz, 1).to(tl.float64)
    products = tl.sum(terms(dz, n, ALONE), 1).to(tl.float64)
    normals = tl.sum(tl.where(inside, n, 0.0), 1).to(tl.float64)
    count = tl.cast(C // G, tl.float64) * tl.cast(P, tl.float64)
    first, second = _group_gradients(
        ones, products, normals, sample, c, of_group, C, P, count, batch, r, w, b, s, sums, outs, WANTED
    )  # fmt: skip
    d = r * (dz * (w * s)[:, None] - first - n * second)
    tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)


class _Shape:
    """How x is divided: channels and positions of a tile or of a whole group."""

    def __init__(
        self, batch: int, channels: int, positions: int, groups: int, last: bool, whole: int, tile: int, sums: int
    ) -> None:
        self.batch, self.channels, self.positions, self.groups, self.last = batch, channels, positions, groups, last
        power = power_of_2
        self.group = power(self.channels // groups)
        self.whole = self.group * power(self.positions) <= whole
        if self.whole:
            self.bc, self.bp = self.group, power(self.positions)
        elif self.last:
            self.bc = min(power(self.channels), 64)
            self.bp = min(power(self.positions), tile // self.bc)
        else:
            self.bp = min(power(self.positions), 1024)
            self.bc = min(power(self.channels), tile // self.bp) if self.positions < 1 << 27 else 1
        # Whether a thread may hold one position of a channel: 256 are side by side, or as many rows of 8 channels.
        self.alone = self.bc * self.bp <= 2048 if self.last else self.bp <= 256
        self.chunks = cdiv(self.positions, self.bp)
        self.lanes = min(power(self.chunks), max(sums // self.group, 1))
        self.tiles = (self.batch * cdiv(self.channels, self.bc) * self.chunks,)
        self.merges = (self.batch * groups,)


_shape = functools.lru_cache(1024)(_Shape)


def _shape_of(x: Tensor, groups: int, whole: int) -> _Shape:
    batch, channels = x.shape[:2]
    return _shape(batch, channels, x.numel() // (batch * channels), groups, bool(channels_last(x)), whole, TILE, SUMS)


def _given(x: Tensor, *given: Tensor | None) -> tuple[tuple[Tensor, ...], tuple[int, int, int], int]:
    """The tensors, with x as placeholder for None; strides of the last three; a bit for each given tensor."""
    tensors = tuple(x if t is None else t for t in given)
    strides = tuple(t.stride(0) if t.dim() == 2 else 0 for t in tensors[2:])
    return tensors, strides, sum(1 << i for i, t in enumerate(given) if t is not None)  # type: ignore[return-value]


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    time_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """One launch if a group fits into a program, else three; arguments as in the reference."""
    cut = _shape_of(x, groups, WHOLE)
    tensors, strides, given = _given(x, weight, bias, time_bias, scale, shift)
    size = cut.channels, cut.positions
    if cut.whole:
        _group_norm_whole[(cut.batch * groups,)](
            x, y, mean, rstd, tensors, strides, eps, *size, groups, given, silu, cut.last, cut.bc, cut.bp,
            cut.alone, num_warps=WARPS, **FUSED,
        )  # fmt: skip
        return
    partials = torch.empty((cut.batch, cut.chunks, 2, cut.channels), dtype=torch.float32, device=x.device)
    _group_norm_moments[cut.tiles](
        x, partials, *size, cut.chunks, cut.last, cut.bc, cut.bp, cut.alone, num_warps=WARPS, **FUSED
    )
    _group_norm_merge_moments[cut.merges](
        partials, mean, rstd, tensors[2], strides[0], eps, *size, groups, cut.chunks, bool(given & 4), cut.bp,
        cut.group, cut.lanes, num_warps=4, **FUSED,
    )  # fmt: skip
    _group_norm_output[cut.tiles](
        x, y, mean, rstd, tensors, strides, *size, groups, cut.chunks, given, silu, cut.last, cut.bc, cut.bp,
        num_warps=WARPS, **FUSED,
    )  # fmt: skip


def group_norm_silu_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    time_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    silu: bool,
    wanted: int,
    dx: Tensor,
    small: Sequence[Tensor],
) -> None:
    """One launch if a group fits into a program, else three; one more for weight and bias."""
    cut = _shape_of(x, groups, WHOLE // 2)
    tensors, strides, given = _given(x, weight, bias, time_bias, scale, shift)
    weights, biases = wanted & 1, wanted & 2
    outs, _, _ = _given(x, *spread(wanted, small))
    wanted |= wanted >> 1 & 1  # from here on the bit of weight also stands for bias
    size = cut.channels, cut.positions
    shared = torch.empty((2, cut.batch, cut.channels), dtype=torch.float32, device=x.device) if wanted & 1 else x[None]
    if cut.whole:
        _group_norm_whole_backward[(cut.batch * groups,)](
            x, grad, dx, mean, rstd, tensors, strides, shared, outs[2:], *size, groups, cut.batch, given, wanted, silu,
            cut.last, cut.bc, cut.bp, cut.alone, num_warps=WARPS, **FUSED,
        )  # fmt: skip
    else:
        partials = torch.empty((cut.batch, cut.chunks, 3, cut.channels), dtype=torch.float32, device=x.device)
        means = torch.empty((cut.batch, groups, 2), dtype=torch.float32, device=x.device)
        common, kind = (mean, rstd, tensors, strides), (given, silu, cut.last, cut.bc, cut.bp)
        _group_norm_sums[cut.tiles](
            x, grad, partials, *common, *size, groups, cut.chunks, *kind, cut.alone, num_warps=WARPS, **FUSED
        )
        _group_norm_merge_sums[cut.merges](
            partials, means, rstd, tensors, strides, shared, outs[2:], *size, groups, cut.chunks, cut.batch, given,
            wanted, cut.group, cut.lanes, num_warps=4, **FUSED,
        )  # fmt: skip
        _group_norm_gradient[cut.tiles](
            x, grad, dx, means, *common, *size, groups, cut.chunks, *kind, num_warps=WARPS, **FUSED
        )
    if wanted & 1:
        norm_over_samples[(cdiv(cut.channels, 64),)](
            shared, outs[0], outs[1], cut.channels, cut.batch, weights, biases, 16, 64, num_warps=4, **FUSED
        )
