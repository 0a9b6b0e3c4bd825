# SPDX-License-Identifier: Apache-2.0
"""Norm, AdamW and average in Triton: one launch for all gradients, two for all parameters of one kind.

Grid      one program per chunk of 8192 elements; the table of addresses and the parameter of each chunk are in device
          memory, copied there once for the same addresses
Traffic   fp32 gradients: norm 4 bytes per element; update 28, + 8 with an average, + 2 with a copy, + 4 with zeroing;
          16-byte accesses if all tensors start at multiples of 16 bytes; only a parameter's last chunk is masked
Precision elements and the sum of a chunk in fp32 (a tree), chunks in fp64 in their order, constants in fp64
Limits    any n >= 0 (64-bit); a kind is a dtype of gradient and copy, with or without average, aligned or not; during
          the capture of a CUDA graph only addresses of an earlier call are possible
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistill.ops._triton import FUSED, Launch, cdiv, launch_all
from fastdistill.ops.adamw_ema import cpp, cuda, table
from fastdistill.ops.adamw_ema.table import CHUNK, Table

STEP = 2048  # elements that a program of the norm holds at once
UPDATED = 1024  # the same for the update: four per thread, so that arrays of 4 and of 2 bytes have the same layout
WARPS = 8
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
ROWS = 128  # parameters whose constants a program computes
CONSTANTS = 16  # floats per row: those of ``AdamWConstants``, and whether the step is taken


@triton.jit
def _at(row, word, TYPE: tl.constexpr, offset, ALIGNED: tl.constexpr):
    """A pointer to element ``offset`` of an array; word ``word`` of the row is its address."""
    pointer = tl.load(row + word).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)  # the cast dropped this hint
    return pointer + offset


@triton.jit
def _number(row, word, mask):
    return tl.load(row + word, mask=mask, other=0).to(tl.float64, bitcast=True)


@triton.jit
def _get(pointer, inside, MASKED: tl.constexpr):
    return tl.load(pointer, mask=inside, other=0.0) if MASKED else tl.load(pointer)


@triton.jit
def _put(pointer, value, inside, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer, value, mask=inside)
    else:
        tl.store(pointer, value)


@triton.jit
def _chunk_square_sum(grad, left, MASKED: tl.constexpr, STEP: tl.constexpr):
    sums = tl.full((STEP,), 0.0, tl.float32)
    for start in range(0, left, STEP):
        e = start + tl.arange(0, STEP)
        g = _get(grad + e, e < left, MASKED).to(tl.float32)
        sums += g * g
    return tl.sum(sums)


@triton.jit
def _adamw_ema_square_sum(
    rows, owners, partials, TYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr
):
    chunk = tl.program_id(0)
    row = rows + 4 * tl.load(owners + chunk)
    offset = (chunk - tl.load(row + 1)) * CHUNK
    left = tl.load(row) - offset
    grad = _at(row, 2, TYPE, offset, ALIGNED)
    if left >= CHUNK:  # noqa: SIM108 (Triton knows no such expression)
        total = _chunk_square_sum(grad, CHUNK, False, STEP)
    else:
        total = _chunk_square_sum(grad, left, True, STEP)
    tl.store(partials + chunk, total)


@triton.jit
def _adamw_ema_finish(partials, count, total, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    sums = tl.full((LANES,), 0.0, tl.float64)
    for start in range(0, count, LANES):
        at = start + lane
        sums += tl.load(partials + at, mask=at < count, other=0.0).to(tl.float64)
    tl.store(total, tl.sum(sums))


@triton.jit
def _adamw_ema_prepare(
    rows, count, square_sum, grad_scale, found_inf, ema_weight, skipped, max_norm, constants, FIRST: tl.constexpr,
    SCALED: tl.constexpr, FOUND: tl.constexpr, AVERAGE: tl.constexpr, WARMUP: tl.constexpr, LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute the constants of each parameter, and increase its step or the count of skipped steps."""
    index = tl.program_id(0) * LANES + tl.arange(0, LANES)
    mask = index < count
    row = rows + 16 * index
    total = tl.load(square_sum)
    scale = tl.full((), 1.0, tl.float64)
    if SCALED:
        scale = tl.load(grad_scale).to(tl.float64)
    finite = (total - total) == 0.0
    if FOUND:
        finite = finite & (tl.load(found_inf) == 0.0)
    clip = tl.cast(max_norm, tl.float64) / (tl.sqrt(total) / scale + 1e-6)
    factor = tl.where(clip < 1.0, clip, 1.0) / scale

    step = tl.load(row + 10, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    rate = tl.load(row + 11, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    t = tl.load(step, mask=mask, other=0.0).to(tl.float64) + 1.0
    lr = tl.load(rate, mask=mask, other=0.0).to(tl.float64)
    beta1, beta2 = _number(row, 12, mask), _number(row, 13, mask)
    to = constants + WIDTH * index
    tl.store(to + 0, factor.to(tl.float32), mask=mask)
    tl.store(to + 1, (1.0 - lr * _number(row, 15, mask)).to(tl.float32), mask=mask)
    tl.store(to + 2, (1.0 - beta1).to(tl.float32), mask=mask)
    tl.store(to + 3, beta2.to(tl.float32), mask=mask)
    tl.store(to + 4, (1.0 - beta2).to(tl.float32), mask=mask)
    tl.store(to + 5, (lr / (1.0 - tl.exp(t * tl.log(beta1)))).to(tl.float32), mask=mask)
    tl.store(to + 6, (1.0 / tl.sqrt(1.0 - tl.exp(t * tl.log(beta2)))).to(tl.float32), mask=mask)
    tl.store(to + 7, _number(row, 14, mask).to(tl.float32), mask=mask)
    if AVERAGE:
        weight = tl.load(ema_weight).to(tl.float64)
        if WARMUP:
            weight = tl.maximum(9.0 / (9.0 + t), weight)
        tl.store(to + 8, weight.to(tl.float32), mask=mask)
    taken = tl.where(finite, 1.0, 0.0)
    tl.store(to + 9, taken, mask=mask)
    tl.store(step, (t - 1.0 + taken).to(tl.float32), mask=mask)
    if FIRST and tl.program_id(0) == 0:
        tl.store(skipped, tl.load(skipped) + (1.0 - taken).to(tl.int64))


@triton.jit
def _update_chunk(
    arrays, constants, left, WITH_COPY: tl.constexpr, AVERAGE: tl.constexpr, ZERO: tl.constexpr, MASKED: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Update ``left`` elements. Pointers and constants are kept in registers, because stores could alias the table."""
    grad, param, exp_avg, exp_avg_sq, average, copy = arrays
    factor, keep, rest1, beta2, rest2, rate, correction, eps, move = constants
    for start in range(0, left, STEP):
        e = start + tl.arange(0, STEP)
        inside = e < left
        g = _get(grad + e, inside, MASKED).to(tl.float32) * factor
        m = _get(exp_avg + e, inside, MASKED)
        m += rest1 * (g - m)
        v = _get(exp_avg_sq + e, inside, MASKED) * beta2 + g * g * rest2
        p = _get(param + e, inside, MASKED) * keep - rate * tl.div_rn(m, tl.sqrt_rn(v) * correction + eps)
        _put(param + e, p, inside, MASKED)
        _put(exp_avg + e, m, inside, MASKED)
        _put(exp_avg_sq + e, v, inside, MASKED)
        if AVERAGE:
            a = _get(average + e, inside, MASKED)
            _put(average + e, a + move * (p - a), inside, MASKED)
        if WITH_COPY:
            _put(copy + e, p.to(copy.dtype.element_ty), inside, MASKED)
        if ZERO:
            _put(grad + e, tl.full((STEP,), 0.0, grad.dtype.element_ty), inside, MASKED)


@triton.jit
def _adamw_ema_update(
    rows, owners, constants, GRAD: tl.constexpr, COPY: tl.constexpr, WITH_COPY: tl.constexpr, AVERAGE: tl.constexpr,
    ALIGNED: tl.constexpr, ZERO: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    owner = tl.load(owners + chunk)
    row, c = rows + 16 * owner, constants + WIDTH * owner
    offset = (chunk - tl.load(row + 1)) * CHUNK
    left = tl.minimum(tl.load(row) - offset, CHUNK)
    grad = _at(row, 2, GRAD, offset, ALIGNED)
    if tl.load(c + 9) != 0.0:
        numbers = (
            tl.load(c), tl.load(c + 1), tl.load(c + 2), tl.load(c + 3), tl.load(c + 4), tl.load(c + 5), tl.load(c + 6),
            tl.load(c + 7), tl.load(c + 8),
        )  # fmt: skip
        arrays = (
            grad,
            _at(row, 4, tl.float32, offset, ALIGNED),
            _at(row, 5, tl.float32, offset, ALIGNED),
            _at(row, 6, tl.float32, offset, ALIGNED),
            _at(row, 7, tl.float32, offset, ALIGNED),
            _at(row, 8, COPY, offset, ALIGNED),
        )
        if left == CHUNK:
            _update_chunk(arrays, numbers, CHUNK, WITH_COPY, AVERAGE, ZERO, False, STEP)
        else:
            _update_chunk(arrays, numbers, left, WITH_COPY, AVERAGE, ZERO, True, STEP)
    elif ZERO:
        for start in range(0, left, STEP):
            e = start + tl.arange(0, STEP)
            tl.store(grad + e, tl.full((STEP,), 0.0, GRAD), mask=e < left)


def _kinds(count: int, kind: Callable[[int], Any]) -> Iterator[tuple[Any, list[int]]]:
    """For each kind the indices of its tensors."""
    members: dict[Any, list[int]] = {}
    for i in range(count):
        members.setdefault(kind(i), []).append(i)
    yield from members.items()


def _aligned(tensors: Sequence[Tensor]) -> bool:
    return all(t.data_ptr() % 16 == 0 for t in tensors)


def _gradient_tables(grads: Sequence[Tensor]) -> list[tuple[Any, Table]]:
    """For each kind of gradient: its dtype, whether it is aligned, and the table."""

    def kind(i: int) -> Any:
        return _TYPES[grads[i].dtype], _aligned([grads[i]])

    return [(key, table.gradients([grads[i] for i in members])) for key, members in _kinds(len(grads), kind)]


def grad_square_sum(grads: Sequence[Tensor], total: Tensor) -> None:
    """One launch per kind of gradient, and one that adds the sums of chunks in order."""
    tables = _gradient_tables(grads)
    counts = [table.chunks(rows) for _, rows in tables]
    partials = torch.empty(sum(counts), dtype=torch.float32, device=total.device)
    first = 0
    for (kind, rows), count in zip(tables, counts, strict=True):
        if count:
            words = table.on_device(rows, total.device)
            _adamw_ema_square_sum[(count,)](*words, partials[first:], *kind, CHUNK, STEP, num_warps=WARPS, **FUSED)
        first += count
    _adamw_ema_finish[(1,)](partials, len(partials), total, 1024, num_warps=WARPS, **FUSED)


def _tables(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor],
    copies: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Sequence[Tensor],
    group: Sequence[int],
    hyper: Sequence[float],
) -> list[tuple[Any, Table]]:
    """For each kind of parameter: dtypes of gradient and copy, has a copy, has an average, is aligned; and a table."""
    arrays = [x for x in (params, grads, exp_avgs, exp_avg_sqs, averages, copies) if x]
    rows = table.parameters(params, grads, exp_avgs, exp_avg_sqs, averages, copies, steps, lr, group, hyper)

    def kind(i: int) -> Any:
        copied, averaged = (bool(x) and x[i].numel() > 0 for x in (copies, averages))
        copy = _TYPES[copies[i].dtype] if copied else tl.bfloat16
        return _TYPES[grads[i].dtype], copy, copied, averaged, _aligned([x[i] for x in arrays])

    return [(key, table.selected(rows, members)) for key, members in _kinds(len(params), kind)]


def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor],
    copies: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Sequence[Tensor],
    square_sum: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    ema_weight: Tensor | None,
    skipped: Tensor,
    group: Sequence[int],
    hyper: Sequence[float],
    max_norm: float,
    ema_warmup: bool,
    zero_grads: bool,
) -> None:
    """Two launches per kind of parameter; arguments as in the reference."""
    tables = _tables(params, grads, exp_avgs, exp_avg_sqs, averages, copies, steps, lr, group, hyper)
    scalars = [x if x is not None else square_sum for x in (grad_scale, found_inf, ema_weight)]
    given = grad_scale is not None, found_inf is not None
    device = square_sum.device
    launches: list[Launch] = []
    for number, (kind, rows) in enumerate(tables):
        words, owners = table.on_device(rows, device)
        constants = torch.empty(len(rows), CONSTANTS, dtype=torch.float32, device=device)
        args: tuple[Any, ...] = (
            words, len(rows), square_sum, *scalars, skipped, max_norm, constants, number == 0, *given, kind[3],
            ema_warmup, ROWS, CONSTANTS,
        )  # fmt: skip
        launches.append((_adamw_ema_prepare, (cdiv(len(rows), ROWS),), args, {"num_warps": 4, **FUSED}))
        if count := table.chunks(rows):
            args = words, owners, constants, *kind, zero_grads, CHUNK, UPDATED, CONSTANTS
            launches.append((_adamw_ema_update, (count,), args, {"num_warps": WARPS, **FUSED}))
    launch_all(launches, in_place=True)


def refuse(*args: Any) -> str | None:
    """Like the C++ kernel; also, no table of addresses can be copied to the device during the capture of a graph."""
    return cuda.refuse(*args) or _unseen(lambda: _tables(*args[:8], *args[13:15]), args[8])


def refuse_square_sum(grads: Sequence[Tensor], total: Tensor) -> str | None:
    """See ``refuse``."""
    return cpp.refuse_square_sum(grads, total) or _unseen(lambda: _gradient_tables(grads), total)


def _unseen(tables: Callable[[], list[tuple[Any, Table]]], scalar: Tensor) -> str | None:
    if not (scalar.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    seen = all(table.is_on_device(rows, scalar.device) for _, rows in tables())
    return None if seen else "a CUDA graph is captured, and these addresses were not seen before it"
