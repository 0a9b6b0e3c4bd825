# SPDX-License-Identifier: Apache-2.0
"""Group norm in Triton: the device functions that its kernels share, on tiles of channels by positions."""

from __future__ import annotations

import triton
import triton.language as tl

from fastdistill.ops._triton import optional, terms


@triton.jit
def within(C, P, LAST: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):
    """The offsets [BC, BP] of a tile's elements from its first element; below 2^31."""
    c, p = tl.arange(0, BC)[:, None], tl.arange(0, BP)[None, :]
    return p * C + c if LAST else c * P + p  # chosen at compile time


@triton.jit
def tile(C, P, chunks, LAST: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):
    """For a program: sample, chunk, channels [BC], positions [BP] and offsets of elements [BC, BP] in x."""
    blocks = tl.cdiv(C, BC)
    rest = tl.program_id(0) // blocks
    sample, chunk, c, p = (
        (rest // chunks).to(tl.int64),
        rest % chunks,
        tl.program_id(0) % blocks * BC,
        rest % chunks * BP,
    )
    first = sample * C * P
    first += p.to(tl.int64) * C + c if LAST else c.to(tl.int64) * P + p
    return sample, chunk, c + tl.arange(0, BC), p + tl.arange(0, BP), first + within(C, P, LAST, BC, BP)


@triton.jit
def whole_group(C, P, G, LAST: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):
    """For a program with a whole group: sample, channels and their mask, offsets of elements and their mask."""
    sample, c = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G * (C // G)
    of_group = tl.arange(0, BC) < C // G
    first = sample * C * P
    first += c if LAST else c.to(tl.int64) * P
    inside = of_group[:, None] & (tl.arange(0, BP) < P)[None, :]
    return sample, c + tl.arange(0, BC), of_group, first + within(C, P, LAST, BC, BP), inside


@triton.jit
def affine(sample, c, inside, given, strides, GIVEN: tl.constexpr):
    """For each channel: time_bias, weight, bias, 1 + scale and shift."""
    weight, bias, time_bias, scale, shift = given
    return (
        optional(time_bias, sample * strides[0] + c, inside, GIVEN & 4, 0.0),
        optional(weight, c, inside, GIVEN & 1, 1.0),
        optional(bias, c, inside, GIVEN & 2, 0.0),
        1.0 + optional(scale, sample * strides[1] + c, inside, GIVEN & 8, 0.0),
        optional(shift, sample * strides[2] + c, inside, GIVEN & 16, 0.0),
    )


@triton.jit
def output(v, middle, r, w, b, s, h, SILU: tl.constexpr):
    """y of a tile. For each channel, ``middle`` is the mean minus the time bias, ``r`` 1 / standard deviation."""
    z = (v - middle[:, None]) * (r * w * s)[:, None] + (b * s + h)[:, None]
    if SILU:
        z = z / (1.0 + tl.exp(-z))
    return z


@triton.jit
def slopes(v, g, middle, r, w, b, s, h, SILU: tl.constexpr, ALONE: tl.constexpr):
    """n and dz of a tile; ``ALONE`` as for ``terms``."""
    n = (v - middle[:, None]) * r[:, None]
    if SILU:
        z = n * (w * s)[:, None] + (b * s + h)[:, None]
        gate = 1.0 / (1.0 + tl.exp(-z))
        g = terms(g * gate, 1.0 + z * (1.0 - gate), ALONE)
    return n, g
