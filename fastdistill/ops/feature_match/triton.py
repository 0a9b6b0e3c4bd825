# SPDX-License-Identifier: Apache-2.0
"""Feature matching in Triton: all taps in one launch, and one small launch that adds the partial sums in order.

Grid      one program a chunk of one or sixteen steps of 2048 elements, over all taps; the addresses of the taps are
          kernel arguments, so nothing is copied to the device and a CUDA graph holds them
Traffic   mse and huber with gradient: student + teacher read, gradient written, once (12 bytes an element in fp32,
          6 in bf16); normalized_mse reads twice; 16-byte accesses, unmasked but in a tap's last chunk
Precision elements and the sum of a chunk in fp32 (a tree), chunks added in fp64 in their order; gradients rounded once
Limits    any n >= 0 (64-bit); dense taps of equal strides; TAPS of one pair of dtypes share a launch
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistill.ops.feature_match.reference import HUBER, NORMALIZED_MSE

STEP = 2048  # elements that a program holds at once
CHUNKS = 8192  # more chunks of one step than this, and a program takes sixteen steps: fewer partial sums to add
TAPS = 16  # of a launch: an address takes 8 bytes of its 4 kilobytes of arguments
WARPS = 8


@triton.jit
def _tap(chunk, addresses, sizes, COUNT: tl.constexpr, CHUNK: tl.constexpr):
    """The tap that a chunk belongs to: its address, its elements, its number and the chunk's first element."""
    first = tl.full((), 0, tl.int64)
    address, n, tap, start = first, first, first, first
    for i in tl.static_range(COUNT):
        here = chunk >= first
        address = tl.where(here, addresses[i].to(tl.int64), address)
        n = tl.where(here, sizes[i], n)
        tap = tl.where(here, i, tap)
        start = tl.where(here, first, start)
        first += tl.cdiv(tl.cast(sizes[i], tl.int64), CHUNK)
    return address, n, tap, (chunk - start) * CHUNK


@triton.jit
def _pointer(address, like, offset, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(like.dtype.element_ty))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)  # the cast has lost it
    return pointer + offset


@triton.jit
def _chunk(
    student, teacher, gradient, factor, delta, left, SUM: tl.constexpr, GRADIENT: tl.constexpr, NORM: tl.constexpr,
    HUBER: tl.constexpr, MASKED: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The chunk's sums of (s - t)^2 and t^2, and its gradient written."""
    lane = tl.arange(0, STEP)
    differences = tl.full((STEP,), 0.0, tl.float32)
    squares = tl.full((STEP,), 0.0, tl.float32)
    for start in range(0, CHUNK, STEP):
        e = start + lane
        if MASKED:
            s = tl.load(student + e, mask=e < left, other=0.0).to(tl.float32)
            t = tl.load(teacher + e, mask=e < left, other=0.0).to(tl.float32)
        else:
            s = tl.load(student + e).to(tl.float32)
            t = tl.load(teacher + e).to(tl.float32)
        d = s - t
        c = d
        if HUBER:  # clamped; NaN stays
            c = tl.where(d < -delta, -delta, tl.where(d > delta, delta, d))
        if SUM:
            if HUBER:
                differences += c * (d - 0.5 * c)
            else:
                differences += d * d
        if NORM:
            squares += t * t
        if GRADIENT:
            value = (factor * c).to(gradient.dtype.element_ty)
            if MASKED:
                tl.store(gradient + e, value, mask=e < left)
            else:
                tl.store(gradient + e, value)
    return tl.sum(differences), tl.sum(squares)


@triton.jit
def _match(
    students, teachers, gradients, sizes, weights, grad_scale, denominators, partials, delta, COUNT: tl.constexpr,
    SUM: tl.constexpr, GRADIENT: tl.constexpr, NORM: tl.constexpr, HUBER: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    address, n, tap, offset = _tap(chunk, students, sizes, COUNT, CHUNK)
    student = _pointer(address, students[0], offset, ALIGNED)
    address, _, _, _ = _tap(chunk, teachers, sizes, COUNT, CHUNK)
    teacher = _pointer(address, teachers[0], offset, ALIGNED)
    address, _, _, _ = _tap(chunk, gradients, sizes, COUNT, CHUNK)
    gradient = _pointer(address, gradients[0], offset, ALIGNED)
    factor = tl.full((), 0.0, tl.float32)
    if GRADIENT:
        denominator = n.to(tl.float64)
        if NORM:
            denominator *= tl.load(denominators + tap)
        scale = tl.load(grad_scale).to(tl.float64) * tl.load(weights + tap).to(tl.float64)
        if not HUBER:
            scale *= 2.0
        factor = (scale / denominator).to(tl.float32)
    left = n - offset
    if left >= CHUNK:
        difference, square = _chunk(
            student, teacher, gradient, factor, delta, left, SUM, GRADIENT, NORM, HUBER, False, CHUNK, STEP
        )  # fmt: skip
    else:
        difference, square = _chunk(
            student, teacher, gradient, factor, delta, left, SUM, GRADIENT, NORM, HUBER, True, CHUNK, STEP
        )  # fmt: skip
    if SUM:
        tl.store(partials + 2 * chunk, difference)
        if NORM:
            tl.store(partials + 2 * chunk + 1, square)


@triton.jit
def _finish(
    partials, sizes, weights, parameter, loss, taps, denominators, COUNT: tl.constexpr, NORM: tl.constexpr,
    FIRST: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Each tap's distance from its chunks in order, what its gradient is divided by, and the loss so far."""
    lane = tl.arange(0, LANES).to(tl.int64)
    first = tl.full((), 0, tl.int64)
    total = tl.full((), 0.0, tl.float64)
    if not FIRST:
        total += tl.load(loss).to(tl.float64)
    for i in tl.static_range(COUNT):
        last = first + tl.cdiv(tl.cast(sizes[i], tl.int64), CHUNK)
        difference = tl.full((LANES,), 0.0, tl.float64)
        square = tl.full((LANES,), 0.0, tl.float64)
        for start in range(first, last, LANES):
            at = start + lane
            difference += tl.load(partials + 2 * at, mask=at < last, other=0.0).to(tl.float64)
            if NORM:
                square += tl.load(partials + 2 * at + 1, mask=at < last, other=0.0).to(tl.float64)
        count = tl.maximum(tl.cast(sizes[i], tl.int64), 1).to(tl.float64)
        denominator = tl.full((), 1.0, tl.float64)
        if NORM:
            denominator = tl.sum(square) / count + parameter
        value = (tl.sum(difference) / (count * denominator)).to(tl.float32)
        tl.store(taps + i, value)
        tl.store(denominators + i, denominator)
        total += tl.load(weights + i).to(tl.float64) * value.to(tl.float64)
        first = last
    tl.store(loss, total.to(tl.float32))


def _groups(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """Neighboring taps [first, last) of one pair of dtypes, at most TAPS."""
    first = 0
    for i in range(1, len(student) + 1):
        same = i < len(student) and (student[i].dtype, teacher[i].dtype) == (student[first].dtype, teacher[first].dtype)
        if not same or i - first == TAPS:
            yield first, i
            first = i


def _cut(sizes: tuple[int, ...]) -> tuple[int, int]:
    """Elements of a chunk, and how many chunks there are."""
    chunk = STEP if sum(sizes) <= CHUNKS * STEP else 16 * STEP
    return chunk, sum(triton.cdiv(n, chunk) for n in sizes)


def feature_match(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weights: Tensor,
    grad_scale: Tensor,
    distance: int,
    parameter: float,
    loss: Tensor,
    taps: Tensor,
    grads: Sequence[Tensor],
) -> None:
    """Two launches a group of taps (three for normalized_mse with a gradient); arguments as the reference's."""
    norm, huber = distance == NORMALIZED_MSE, distance == HUBER
    for first, last in _groups(student, teacher):
        s, t, g = tuple(student[first:last]), tuple(teacher[first:last]), tuple(grads[first:last])
        sizes = tuple(x.numel() for x in s)
        chunk, chunks, count = *_cut(sizes), len(s)
        partials = torch.empty(2 * max(chunks, 1), dtype=torch.float32, device=loss.device)
        denominators = torch.empty(TAPS, dtype=torch.float64, device=loss.device)
        aligned = all(x.data_ptr() % 16 == 0 for x in (*s, *t, *g))
        tables = s, t, g or s, sizes, weights[first:last], grad_scale, denominators, partials, parameter, count
        if chunks:
            _match[(chunks,)](*tables, True, bool(g) and not norm, norm, huber, aligned, chunk, STEP, num_warps=WARPS)
        _finish[(1,)](
            partials, sizes, weights[first:last], parameter, loss, taps[first:last], denominators, count, norm,
            first == 0, chunk, 1024, num_warps=WARPS,
        )  # fmt: skip
        if chunks and g and norm:
            _match[(chunks,)](*tables, False, True, norm, huber, aligned, chunk, STEP, num_warps=WARPS)


@triton.jit
def _scale(gradients, sizes, factor, COUNT: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr):
    by = tl.load(factor)
    if by != 1.0:
        chunk = tl.program_id(0).to(tl.int64)
        address, n, _, offset = _tap(chunk, gradients, sizes, COUNT, CHUNK)
        gradient = _pointer(address, gradients[0], offset, ALIGNED)
        lane = tl.arange(0, CHUNK)
        inside = lane < n - offset
        value = tl.load(gradient + lane, mask=inside, other=0.0).to(tl.float32) * by
        tl.store(gradient + lane, value.to(gradients[0].dtype.element_ty), mask=inside)


def scale_gradients(grads: Sequence[Tensor], factor: Tensor) -> None:
    """One launch a group of gradients of one dtype; nothing is touched where the factor is 1."""
    for first, last in _groups(grads, grads):
        g = tuple(grads[first:last])
        sizes = tuple(x.numel() for x in g)
        if chunks := sum(triton.cdiv(n, STEP) for n in sizes):
            aligned = all(x.data_ptr() % 16 == 0 for x in g)
            _scale[(chunks,)](g, sizes, factor, len(g), aligned, STEP, num_warps=WARPS)
