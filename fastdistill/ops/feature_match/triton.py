# SPDX-License-Identifier: Apache-2.0
"""Feature matching in Triton: all taps in one launch, and one small launch that adds the partial sums in order.

Grid      one program per chunk of one or sixteen steps of 2048 elements, over all taps; the addresses of the taps are
          kernel arguments, so nothing is copied to the device and a CUDA graph keeps them. For cosine a chunk ends
          with its sample, and one program per sample adds the sums
Traffic   mse and huber with gradient: student + teacher read, gradient written, once (12 bytes per element in fp32,
          6 in bf16); normalized_mse and cosine read twice; 16-byte accesses, masked only in a tap's last chunk (for
          cosine in a sample's last chunk, and only if samples have a multiple of 16 elements)
Precision elements and the sum of a chunk in fp32 (a tree), chunks added in fp64 in their order; gradients rounded once
Limits    any n >= 0 (64-bit); dense taps of equal strides; TAPS of one pair of dtypes share a launch; samples of cosine
          are blocks of memory, and those below 2048 elements leave lanes idle
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistill.ops._triton import FUSED, Launch, cdiv, launch_all
from fastdistill.ops.feature_match import reference

STEP = 2048  # elements that a program holds at once
CHUNKS = 8192  # if there are more chunks of one step, a chunk has sixteen steps: fewer partial sums to add
TAPS = 16  # per launch: an address needs 8 bytes of the 4 kilobytes for arguments
WARPS = 8
NORMALIZED: tl.constexpr = tl.constexpr(reference.NORMALIZED_MSE)
HUBER: tl.constexpr = tl.constexpr(reference.HUBER)
COSINE: tl.constexpr = tl.constexpr(reference.COSINE)


@triton.jit
def _tap(chunk, addresses, sizes, samples, COUNT: tl.constexpr, CHUNK: tl.constexpr, SPLIT: tl.constexpr):
    """The tap of a chunk: its address, its index, its samples; and the chunk's sample (counted over all taps), first
    element, and number of elements from there to the end of the sample."""
    first = tl.full((), 0, tl.int64)
    address, size, count, tap, start, before, sample = first, first, first, first, first, first, first
    for i in tl.static_range(COUNT):
        here = chunk >= first
        address = tl.where(here, addresses[i].to(tl.int64), address)
        size = tl.where(here, sizes[i], size)
        count = tl.where(here, samples[i], count)
        tap = tl.where(here, i, tap)
        start = tl.where(here, first, start)
        sample = tl.where(here, before, sample)
        first += tl.cast(samples[i], tl.int64) * tl.cdiv(tl.cast(sizes[i], tl.int64), CHUNK)
        before += samples[i]
    offset = (chunk - start) * CHUNK
    left = size - offset
    if SPLIT:
        each = tl.cdiv(size, CHUNK)
        within = (chunk - start) // each
        left += within * each * CHUNK
        offset = within * size + (size - left)
        sample += within
    return address, tap, count, sample, offset, left


@triton.jit
def _pointer(address, like, offset, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(like.dtype.element_ty))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)  # the cast dropped this hint
    return pointer + offset


@triton.jit
def _chunk(
    student, teacher, gradient, factor, parameter, left, SUM: tl.constexpr, GRADIENT: tl.constexpr, KIND: tl.constexpr,
    MASKED: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Sum the terms, t^2 and s^2 of the chunk (the compiler removes unused sums), and write its gradient."""
    lane = tl.arange(0, STEP)
    terms = tl.full((STEP,), 0.0, tl.float32)
    teachers, students = terms, terms
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
        if KIND == HUBER:  # clamped; keeps NaN
            c = tl.where(d < -parameter, -parameter, tl.where(d > parameter, parameter, d))
        if SUM:
            if KIND == HUBER:
                terms += c * (d - 0.5 * c)
            elif KIND == COSINE:
                terms += s * t
                students += s * s
            else:
                terms += d * d
            teachers += t * t
        if GRADIENT:
            slope = factor * c
            if KIND == COSINE:
                slope = factor * s + parameter * t
            value = slope.to(gradient.dtype.element_ty)
            if MASKED:
                tl.store(gradient + e, value, mask=e < left)
            else:
                tl.store(gradient + e, value)
    return tl.sum(terms), tl.sum(teachers), tl.sum(students)


@triton.jit
def _feature_match(
    students, teachers, gradients, sizes, samples, weights, grad_scale, found, partials, parameter,
    COUNT: tl.constexpr, SUM: tl.constexpr, GRADIENT: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    split: tl.constexpr = KIND == COSINE
    address, tap, count, sample, offset, left = _tap(chunk, students, sizes, samples, COUNT, CHUNK, split)
    student = _pointer(address, students[0], offset, ALIGNED)
    address, _, _, _, _, _ = _tap(chunk, teachers, sizes, samples, COUNT, CHUNK, split)
    teacher = _pointer(address, teachers[0], offset, ALIGNED)
    address, _, _, _, _, _ = _tap(chunk, gradients, sizes, samples, COUNT, CHUNK, split)
    gradient = _pointer(address, gradients[0], offset, ALIGNED)
    factor, other = tl.full((), 0.0, tl.float32), parameter
    if GRADIENT:
        scale = tl.load(grad_scale).to(tl.float64) * tl.load(weights + tap).to(tl.float64)
        if KIND == COSINE:
            scale /= count.to(tl.float64)
            factor = (scale * tl.load(found + 3 * sample + 1)).to(tl.float32)
            other = (scale * tl.load(found + 3 * sample + 2)).to(tl.float32)
        else:
            denominator = (offset + left).to(tl.float64)  # the tap's elements
            if KIND == NORMALIZED:
                denominator *= tl.load(found + tap)
            if KIND != HUBER:
                scale *= 2.0
            factor = (scale / denominator).to(tl.float32)
    if left >= CHUNK:
        term, of_teacher, of_student = _chunk(
            student, teacher, gradient, factor, other, left, SUM, GRADIENT, KIND, False, CHUNK, STEP
        )  # fmt: skip
    else:
        term, of_teacher, of_student = _chunk(
            student, teacher, gradient, factor, other, left, SUM, GRADIENT, KIND, True, CHUNK, STEP
        )  # fmt: skip
    if SUM:
        tl.store(partials + 3 * chunk, term)
        if KIND == NORMALIZED or KIND == COSINE:  # noqa: SIM109 (Triton has no `in`)
            tl.store(partials + 3 * chunk + 1, of_teacher)
        if KIND == COSINE:
            tl.store(partials + 3 * chunk + 2, of_student)


@triton.jit
def _feature_match_cosine(
    partials, sizes, samples, eps, found, COUNT: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr
):
    """From a sample's chunks in order: 1 - c with c = s.t / (S T), S = max(|s|, eps), T = max(|t|, eps), and the
    factors of its gradient, c / S^2 for s and -1 / (S T) for t."""
    sample = tl.program_id(0).to(tl.int64)
    chunks = tl.full((), 0, tl.int64)
    before, first, each = chunks, chunks, chunks
    for i in tl.static_range(COUNT):
        here = sample >= before
        each = tl.where(here, tl.cdiv(tl.cast(sizes[i], tl.int64), CHUNK), each)
        first = tl.where(here, chunks + (sample - before) * each, first)
        chunks += tl.cast(samples[i], tl.int64) * tl.cdiv(tl.cast(sizes[i], tl.int64), CHUNK)
        before += samples[i]
    lane = tl.arange(0, LANES).to(tl.int64)
    product = tl.full((LANES,), 0.0, tl.float64)
    teachers, students = product, product
    for start in range(first, first + each, LANES):
        at, inside = start + lane, start + lane < first + each
        product += tl.load(partials + 3 * at, mask=inside, other=0.0).to(tl.float64)
        teachers += tl.load(partials + 3 * at + 1, mask=inside, other=0.0).to(tl.float64)
        students += tl.load(partials + 3 * at + 2, mask=inside, other=0.0).to(tl.float64)
    floor = tl.full((), 0.0, tl.float64) + eps
    s, t = tl.sqrt(tl.sum(students)), tl.sqrt(tl.sum(teachers))
    clamped = s < floor
    s, t = tl.where(clamped, floor, s), tl.where(t < floor, floor, t)  # NaN stays
    c = tl.sum(product) / (s * t)
    tl.store(found + 3 * sample, 1.0 - c)
    tl.store(found + 3 * sample + 1, tl.where(clamped, 0.0, c / (s * s)))
    tl.store(found + 3 * sample + 2, -1.0 / (s * t))


@triton.jit
def _feature_match_finish(
    partials, sizes, weights, parameter, loss, taps, denominators, COUNT: tl.constexpr, NORM: tl.constexpr,
    FIRST: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Each tap's distance from its chunks in order, the divisor of its gradient, and the loss so far."""
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
            difference += tl.load(partials + 3 * at, mask=at < last, other=0.0).to(tl.float64)
            if NORM:
                square += tl.load(partials + 3 * at + 1, mask=at < last, other=0.0).to(tl.float64)
        count = tl.maximum(tl.cast(sizes[i], tl.int64), 1).to(tl.float64)
        if NORM:
            denominator = tl.sum(square) / count + parameter
            tl.store(denominators + i, denominator)
            count *= denominator
        value = (tl.sum(difference) / count).to(tl.float32)
        tl.store(taps + i, value)
        total += tl.load(weights + i).to(tl.float64) * value.to(tl.float64)
        first = last
    tl.store(loss, total.to(tl.float32))


def _groups(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """Ranges [first, last) of consecutive taps with one pair of dtypes, at most TAPS each."""
    first = 0
    for i in range(1, len(student) + 1):
        same = i < len(student) and (student[i].dtype, teacher[i].dtype) == (student[first].dtype, teacher[first].dtype)
        if not same or i - first == TAPS:
            yield first, i
            first = i


def _cut(sizes: tuple[int, ...], samples: tuple[int, ...]) -> tuple[int, int]:
    """Elements per chunk, and the number of chunks."""
    elements = sum(n * rows for n, rows in zip(sizes, samples, strict=True))
    chunk = 16 * STEP if elements > CHUNKS * STEP and max(sizes) >= 16 * STEP else STEP
    return chunk, sum(rows * cdiv(n, chunk) for n, rows in zip(sizes, samples, strict=True))


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
    """Two launches per group of taps (three for normalized_mse with a gradient, four for cosine); arguments as in
    the reference."""
    norm, cosine = distance == reference.NORMALIZED_MSE, distance == reference.COSINE
    two_passes = norm or cosine
    launches: list[Launch] = []
    options = {"num_warps": WARPS, **FUSED}
    for first, last in _groups(student, teacher):
        s, t, g = tuple(student[first:last]), tuple(teacher[first:last]), tuple(grads[first:last])
        samples = tuple(len(x) if x.numel() else 0 for x in s) if cosine else (1,) * len(s)
        sizes = tuple(x.numel() // max(rows, 1) for x, rows in zip(s, samples, strict=True))
        chunk, chunks, count = *_cut(sizes, samples), len(s)
        partials = torch.empty(3 * max(chunks, 1), dtype=torch.float32, device=loss.device)
        found = torch.empty(3 * max(sum(samples), 1), dtype=torch.float64, device=loss.device)
        aligned = all(x.data_ptr() % 16 == 0 for x in (*s, *t, *g))
        w, counted = weights[first:last], taps[first:last]
        tables: tuple[Any, ...] = (s, t, g or s, sizes, samples, w, grad_scale, found, partials, parameter, count)
        if chunks:
            args = *tables, True, bool(g) and not two_passes, distance, aligned, chunk, STEP
            launches.append((_feature_match, (chunks,), args, options))
        if chunks and cosine:
            args = partials, sizes, samples, parameter, found, count, chunk, 128
            launches.append((_feature_match_cosine, (sum(samples),), args, {"num_warps": 1, **FUSED}))
        terms, many, each = (found, samples, 1) if cosine else (partials, sizes, chunk)
        args = terms, many, w, parameter, loss, counted, found, count, norm, first == 0, each, 1024
        launches.append((_feature_match_finish, (1,), args, options))
        if chunks and g and two_passes:
            launches.append(
                (_feature_match, (chunks,), (*tables, False, True, distance, aligned, chunk, STEP), options)
            )
    written_over = {t.data_ptr() for t in teacher} & {g.data_ptr() for g in grads}
    launch_all(launches, in_place=bool(written_over))


@triton.jit
def _feature_match_scale(
    gradients, sizes, samples, factor, COUNT: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr
):
    by = tl.load(factor)
    if by != 1.0:
        chunk = tl.program_id(0).to(tl.int64)
        address, _, _, _, offset, left = _tap(chunk, gradients, sizes, samples, COUNT, CHUNK, False)
        gradient = _pointer(address, gradients[0], offset, ALIGNED)
        lane = tl.arange(0, CHUNK)
        inside = lane < left
        value = tl.load(gradient + lane, mask=inside, other=0.0).to(tl.float32) * by
        tl.store(gradient + lane, value.to(gradients[0].dtype.element_ty), mask=inside)


def scale_gradients(grads: Sequence[Tensor], factor: Tensor) -> None:
    """One launch per group of gradients of one dtype; does nothing if the factor is 1."""
    launches: list[Launch] = []
    for first, last in _groups(grads, grads):
        g = tuple(grads[first:last])
        sizes = tuple(x.numel() for x in g)
        if chunks := sum(cdiv(n, STEP) for n in sizes):
            aligned = all(x.data_ptr() % 16 == 0 for x in g)
            args = g, sizes, (1,) * len(g), factor, len(g), aligned, STEP
            launches.append((_feature_match_scale, (chunks,), args, {"num_warps": WARPS, **FUSED}))
    launch_all(launches, in_place=True)
