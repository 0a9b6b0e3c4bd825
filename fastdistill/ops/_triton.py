# SPDX-License-Identifier: Apache-2.0
"""Shared code of the Triton kernels: the GPU for which tiles are chosen, optional small tensors, and random numbers.

The arithmetic of the random numbers is that of ``csrc/philox.h``, operation by operation, so that the integers are
equal and the normals have the same bits (every multiply-add is an explicit ``fma``; the compiler can contract
nothing).
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistill.errors import FastdistillError

_target: contextvars.ContextVar[int] = contextvars.ContextVar("fastdistill_target", default=9)


def capability(tensor: Tensor) -> int:
    """Major compute capability of the tensor's GPU, which selects tiles; that of ``target`` if it is on no GPU."""
    return torch.cuda.get_device_capability(tensor.device)[0] if tensor.is_cuda else _target.get()


@contextlib.contextmanager
def target(major: int) -> Iterator[None]:
    """Inside, kernels for tensors on no GPU (compiled ahead of time) use the tiles of this compute capability."""
    token = _target.set(major)
    try:
        yield
    finally:
        _target.reset(token)


#: An option of every launch, because Triton's default changes: multiply-adds are fused where exact bits do not matter.
FUSED = {"enable_fp_fusion": True}


def cdiv(n: int, by: int) -> int:
    """n / by, rounded up. Triton's own function also works in kernels, but is a hundred times as slow on the host."""
    return -(-n // by)


def power_of_2(n: int) -> int:
    """The smallest power of two that is >= n, for n > 0."""
    return 1 << (n - 1).bit_length()


Launch = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]  # kernel, grid, arguments, options


def launch_all(launches: list[Launch], *, in_place: bool) -> None:
    """Launch kernels one after another. ``in_place``: they overwrite their inputs, so all are compiled and loaded
    before the first one runs; if one fails to compile or load, nothing has changed."""
    if in_place and len(launches) > 1:
        for kernel, grid, args, options in launches:
            compiled = kernel.warmup(*args, grid=grid, **options)
            if compiled is not None:  # not interpreted
                _ = compiled.run  # loads it
    for number, (kernel, grid, args, options) in enumerate(launches):
        try:
            kernel[grid](*args, **options)
        except Exception as error:
            if in_place and number:
                raise FastdistillError(f"a launch failed after others of the call had run: {error}") from error
            raise


CHOICE: tl.constexpr = tl.constexpr(0)
NOISE: tl.constexpr = tl.constexpr(1)
PERMUTATION: tl.constexpr = tl.constexpr(2)


@triton.jit
def philox_words(seed, step, sample, block, stream):
    """Four uint32 words of each block (int64, scalar or vector); ``seed``, ``step``, ``sample`` are int64 scalars."""
    low = block.to(tl.uint32)
    zero = low ^ low
    high = zero + ((block >> 32) & 0xFFFF).to(tl.uint32) + (stream << 16)
    return tl.philox(seed, low, high, zero + sample.to(tl.uint32), zero + step.to(tl.uint32))


@triton.jit
def below(word, n):
    """Word -> integer in [0, n), int64."""
    return ((tl.cast(word, tl.uint64) * tl.cast(n, tl.uint64)) >> 32).to(tl.int64)


@triton.jit
def _minus_two_log(word):
    """-2 ln u, u = (word >> 9 + 1/2) 2^-23: u = 2^e m with m in [sqrt(1/2), sqrt(2)), ln(1 + f) = f + f^2 Q(f)."""
    u = tl.fma((word >> 9).to(tl.int32).to(tl.float32), 1.1920928955078125e-07, 5.9604644775390625e-08)
    shifted = u.to(tl.int32, bitcast=True) - 0x3F3504F3
    e = (shifted >> 23).to(tl.float32)
    f = ((shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    q = tl.fma(f, 0.08734843, -0.14307522)
    q = tl.fma(q, f, 0.14917974)
    q = tl.fma(q, f, -0.16570508)
    q = tl.fma(q, f, 0.19962072)
    q = tl.fma(q, f, -0.25001755)
    q = tl.fma(q, f, 0.33333950)
    q = tl.fma(q, f, -0.49999992)
    tail = tl.fma(f * f, q, e * -2.12194440e-4) + f
    return -2.0 * tl.fma(e, 0.693359375, tail)


@triton.jit
def box_muller(word1, word2):
    """Two normals from two words: sqrt(-2 ln u1) (cos 2 pi u2, sin 2 pi u2)."""
    quadrant = (word2 + 0x20000000).to(tl.int32, bitcast=True)
    past = ((word2 << 2).to(tl.int32, bitcast=True) >> 11).to(tl.float32)
    f = tl.fma(past, 4.76837158203125e-07, 2.384185791015625e-07)
    z = f * f
    sine = f * tl.fma(tl.fma(tl.fma(z, -0.00459225360, 0.0796758897), z, -0.645962937), z, 1.57079631)
    cosine = tl.fma(tl.fma(tl.fma(z, -0.0204260771, 0.253606310), z, -1.23369795), z, 1.0)
    swap = (quadrant & 0x40000000) != 0
    even, odd = tl.where(swap, sine, cosine), tl.where(swap, cosine, sine)
    even = tl.where((quadrant + 0x40000000) < 0, -even, even)
    odd = tl.where(quadrant < 0, -odd, odd)
    r = tl.sqrt_rn(_minus_two_log(word1))
    return r * even, r * odd


@triton.jit
def normals(seed, step, sample, first, BLOCK: tl.constexpr):
    """The noise of elements [first, first + BLOCK) of a sample, float32; ``first`` and BLOCK are multiples of 4."""
    block = first // 4 + tl.arange(0, BLOCK // 4).to(tl.int64)
    w0, w1, w2, w3 = philox_words(seed, step, sample, block, NOISE)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def _feistel(value, half, seed, epoch):
    zero = value ^ value
    mask = ((zero + 1) << half) - 1
    left, right = value >> half, value & mask
    for round in tl.static_range(6):
        high = zero + ((PERMUTATION << 16) + round)
        word, _, _, _ = tl.philox(seed, right, high, zero + epoch.to(tl.uint32), zero + (epoch >> 32).to(tl.uint32))
        left, right = right, left ^ (word & mask)
    return (left << half) | right


@triton.jit
def permute(at, n, half, seed, epoch):
    """A keyed permutation of [0, n), n <= 2**32: six Feistel rounds on ``half`` bits a side, repeated until below n."""
    last = tl.cast(n - 1, tl.uint32)
    value = _feistel(at.to(tl.uint32), half, seed, epoch)
    while value > last:
        value = _feistel(value, half, seed, epoch)
    return value.to(tl.int64)


@triton.jit
def optional(pointer, at, inside, GIVEN: tl.constexpr, DEFAULT: tl.constexpr):
    """The values of a tensor as float32; a constant if no tensor was given."""
    if GIVEN:
        value = tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)
    else:
        value = tl.full(inside.shape, DEFAULT, tl.float32)
    return value


@triton.jit
def terms(a, b, ALONE: tl.constexpr):
    """a b, to be summed over threads. ALONE: a thread may hold only one term of the sum (possible without tensor cores
    and in small blocks). Then the product must not be fused into the first addition: each thread would round its
    neighbour's product but not its own, so the copies of the sum would differ."""
    return tl.fma(a, b, 0.0) if ALONE else a * b


@triton.jit
def norm_over_samples(
    sums, dweight, dbias, C, batch, WEIGHT: tl.constexpr, BIAS: tl.constexpr, LANES: tl.constexpr, BC: tl.constexpr
):
    """The gradients of weight and bias: the contributions of the samples, added in order."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    weights = tl.full((LANES, BC), 0.0, tl.float64)
    biases = weights
    for first in range(0, batch, LANES):
        sample = first + tl.arange(0, LANES).to(tl.int64)
        inside = (sample < batch)[:, None] & (c < C)[None, :]
        at = sums + (sample * C)[:, None] + c[None, :]
        weights += tl.load(at, mask=inside, other=0.0).to(tl.float64)
        biases += tl.load(at + tl.cast(batch, tl.int64) * C, mask=inside, other=0.0).to(tl.float64)
    if WEIGHT:
        tl.store(dweight + c, tl.sum(weights, 0).to(tl.float32).to(dweight.dtype.element_ty), mask=c < C)
    if BIAS:
        tl.store(dbias + c, tl.sum(biases, 0).to(tl.float32).to(dbias.dtype.element_ty), mask=c < C)
