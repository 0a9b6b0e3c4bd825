# SPDX-License-Identifier: Apache-2.0
"""Cross-attention in Triton: all keys of a sample on chip, the softmax in one pass, nothing saved for the backward.

A tile's side is split into at most two powers of two (77 keys = 64 + 16, 40 dimensions = 32 + 16): so there is little
wasted computation, and no memory is padded. ``triton_long`` handles keys that do not fit on chip at once.

Grid      one program per head, chunk of queries and sample, heads fastest because they share cache lines; the sum: one
          program per 1024 elements of a row
Traffic   forward: q read, out written; backward: q and grad_out read, grad_q written, once each; K, V once per chunk;
          gradients of K and V: one fp32 partial sum per chunk, written and read once (none if there is one chunk)
Precision scores, softmax and sums in fp32; weights rounded to the dtype for the products; fp32 products exact (no TF32)
Limits    1..512 keys, head dim 1..256, any strides if a head's elements are contiguous (else one copy); 64-bit offsets;
          chunks depend on shape, presence of a mask, and alignment. Partial sums are added in order: the same bits
"""

# ruff: noqa: RUF005 (Triton has no unpacking)
from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistill.ops._triton import FUSED, capability, cdiv, power_of_2
from fastdistill.ops.cross_attention.triton_long import (
    cross_attention_backward_long_kv,
    cross_attention_backward_long_q,
    cross_attention_forward_long,
)
from fastdistill.ops.cross_attention.triton_tiles import (
    add_across,
    add_product,
    finite,
    get,
    inverse,
    key_bias,
    place,
    product,
    put,
    put_across,
    rounded,
    start,
    times,
    zeros,
    zeros_across,
)

LOG2E = 1.4426950408889634
PROGRAMS = 512  # at least, if possible: several for each multiprocessor of a large GPU
ADDED = 1024  # elements of a row per program of the sum


@triton.jit
def _keys_and_values(
    k, v, mask, L, k_step, v_step, D: tl.constexpr, KEYS: tl.constexpr, DIMS: tl.constexpr, MASK: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    keys, values, biases = (), (), ()
    for i in tl.static_range(len(KEYS)):
        at = i * KEYS[0] + tl.arange(0, KEYS[i])
        keys = keys + (get(k, at, L, k_step, D, DIMS, UNIT),)
        values = values + (get(v, at, L, v_step, D, DIMS, UNIT),)
        if MASK == 0 and i + 1 < len(KEYS):  # full
            biases = biases + (tl.zeros((tl.constexpr(KEYS[i]),), tl.float32),)
        else:
            biases = biases + (key_bias(mask, at, L, MASK),)
    return keys, values, biases


@triton.jit
def _softmax(x, keys, biases, scale, M: tl.constexpr, KEYS: tl.constexpr, DIMS: tl.constexpr):
    """exp2(scores - their maximum) for each piece of the keys, and 1 / their sum."""
    scores = ()
    top = tl.full((M,), float("-inf"), tl.float32)
    for i in tl.static_range(len(KEYS)):
        s = product(x, keys[i], DIMS) * scale + biases[i][None, :]
        top = tl.maximum(top, tl.max(s, 1))
        scores = scores + (s,)
    top = finite(top)
    total = tl.zeros((M,), tl.float32)
    weights = ()
    for i in tl.static_range(len(KEYS)):
        w = tl.exp2(scores[i] - top[:, None])
        total += tl.sum(w, 1)
        weights = weights + (w,)
    return weights, inverse(total)


@triton.jit
def _cross_attention_forward(
    q, k, v, mask, rows, out, N, L, R, H, scale, chunks, span, q_strides, k_strides, v_strides, out_strides,
    D: tl.constexpr, DIMS: tl.constexpr, KEYS: tl.constexpr, M: tl.constexpr, MASK: tl.constexpr,
    ROWS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    h, chunk, b, row, scale = place(rows, R, scale, H, chunks, ROWS)
    q += start(q_strides, b, h, UNIT)
    out += start(out_strides, b, h, UNIT)
    k += start(k_strides, row, h, UNIT)
    v += start(v_strides, row, h, UNIT)
    keys, values, biases = _keys_and_values(
        k, v, mask + b * L, L, k_strides[1], v_strides[1], D, KEYS, DIMS, MASK, UNIT
    )  # fmt: skip
    first = chunk * span
    for begin in range(first, tl.minimum(first + span, N), M):
        query = begin + tl.arange(0, M)
        x = get(q, query, N, q_strides[1], D, DIMS, UNIT)
        weights, share = _softmax(x, keys, biases, scale, M, KEYS, DIMS)
        sums = zeros(M, DIMS)
        for i in tl.static_range(len(KEYS)):
            sums = add_product(sums, weights[i].to(q.dtype.element_ty), values[i], DIMS)
        put(out, query, N, out_strides[1], sums, share[:, None], D, DIMS, UNIT)


@triton.jit
def _cross_attention_backward(
    q, k, v, mask, rows, grad_out, grad_q, grad_k, grad_v, N, L, R, H, scale, factor, chunks, span,
    q_strides, k_strides, v_strides, g_strides, dq_strides, D: tl.constexpr, DIMS: tl.constexpr, KEYS: tl.constexpr,
    M: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, GRAD_Q: tl.constexpr, GRAD_KV: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """With P the softmax and dP = dO V^T: dS = P (dP - sum_j P_j dP_j), dQ = scale dS K, dK = scale dS^T Q,
    dV = P^T dO. Keys are rows here, so that P^T and dS^T have the layout for the products over queries."""
    h, chunk, b, row, scale = place(rows, R, scale, H, chunks, ROWS)
    q += start(q_strides, b, h, UNIT)
    grad_out += start(g_strides, b, h, UNIT)
    grad_q += start(dq_strides, b, h, UNIT)
    at = tl.arange(0, KEYS)
    keys = get(k + start(k_strides, row, h, UNIT), at, L, k_strides[1], D, DIMS, UNIT)
    values = get(v + start(v_strides, row, h, UNIT), at, L, v_strides[1], D, DIMS, UNIT)
    bias = key_bias(mask + b * L, at, L, MASK)
    key_sums, value_sums = zeros(KEYS, DIMS), zeros(KEYS, DIMS)
    first = chunk * span
    for begin in range(first, tl.minimum(first + span, N), M):
        query = begin + tl.arange(0, M)
        x = get(q, query, N, q_strides[1], D, DIMS, UNIT)
        g = get(grad_out, query, N, g_strides[1], D, DIMS, UNIT)
        w = product(keys, x, DIMS) * scale + bias[:, None]
        w = tl.exp2(w - finite(tl.max(w, 0))[None, :])
        w *= inverse(tl.sum(w, 0))[None, :]
        if GRAD_KV:
            value_sums = add_product(value_sums, w.to(q.dtype.element_ty), g, DIMS)
        s = product(values, g, DIMS)
        s = (w * (s - tl.sum(w * s, 0)[None, :])).to(q.dtype.element_ty)
        if GRAD_KV:
            key_sums = add_product(key_sums, s, x, DIMS)
        if GRAD_Q:
            sums = add_product(zeros(M, DIMS), tl.trans(s), keys, DIMS)
            put(grad_q, query, N, dq_strides[1], sums, factor, D, DIMS, UNIT)
    if GRAD_KV:
        slot = ((b * chunks + chunk) * L * H + h) * D
        put(grad_k + slot, at, L, H, key_sums, factor, D, DIMS, D)
        put(grad_v + slot, at, L, H, value_sums, 1.0, D, DIMS, D)


@triton.jit
def _cross_attention_backward_rows(
    q, k, v, mask, rows, grad_out, grad_q, grad_k, grad_v, N, L, R, H, scale, factor, chunks, span,
    q_strides, k_strides, v_strides, g_strides, dq_strides, D: tl.constexpr, DIMS: tl.constexpr, KEYS: tl.constexpr,
    M: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, GRAD_Q: tl.constexpr, GRAD_KV: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """The backward with queries as rows: a warp has whole rows, so a row sum needs only a few shuffles. The transposes
    of dK and dV are accumulated; Hopper's tensor cores can read Q and dO transposed from shared memory for this."""
    h, chunk, b, row, scale = place(rows, R, scale, H, chunks, ROWS)
    q += start(q_strides, b, h, UNIT)
    grad_out += start(g_strides, b, h, UNIT)
    grad_q += start(dq_strides, b, h, UNIT)
    k += start(k_strides, row, h, UNIT)
    v += start(v_strides, row, h, UNIT)
    keys, values, biases = _keys_and_values(
        k, v, mask + b * L, L, k_strides[1], v_strides[1], D, KEYS, DIMS, MASK, UNIT
    )  # fmt: skip
    key_sums, value_sums = zeros_across(DIMS, KEYS), zeros_across(DIMS, KEYS)
    first = chunk * span
    for begin in range(first, tl.minimum(first + span, N), M):
        query = begin + tl.arange(0, M)
        x = get(q, query, N, q_strides[1], D, DIMS, UNIT)
        g = get(grad_out, query, N, g_strides[1], D, DIMS, UNIT)
        weights, share = _softmax(x, keys, biases, scale, M, KEYS, DIMS)
        weights = times(weights, share[:, None], KEYS)
        if GRAD_KV:  # before dP is computed, which needs as many registers as the weights
            value_sums = add_across(value_sums, g, rounded(weights, q, KEYS), DIMS, KEYS)
        products, changes = (), ()
        delta = tl.zeros((M,), tl.float32)
        for i in tl.static_range(len(KEYS)):
            p = product(g, values[i], DIMS)
            delta += tl.sum(weights[i] * p, 1)
            products = products + (p,)
        for i in tl.static_range(len(KEYS)):
            changes = changes + (weights[i] * (products[i] - delta[:, None]),)
        changes = rounded(changes, q, KEYS)
        if GRAD_KV:
            key_sums = add_across(key_sums, x, changes, DIMS, KEYS)
        if GRAD_Q:
            sums = zeros(M, DIMS)
            for i in tl.static_range(len(KEYS)):
                sums = add_product(sums, changes[i], keys[i], DIMS)
            query = begin | tl.arange(0, M)  # recomputed: keeping it would need registers
            put(grad_q, query, N, dq_strides[1], sums, factor, D, DIMS, UNIT)
    if GRAD_KV:
        slot = ((b * chunks + chunk) * L * H + h) * D
        put_across(grad_k + slot, L, H, key_sums, factor, D, DIMS, KEYS)
        put_across(grad_v + slot, L, H, value_sums, 1.0, D, DIMS, KEYS)


@triton.jit
def _cross_attention_add(
    partials, grad_k, grad_v, rows, samples, chunks, size, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """The gradient of one row of K or V: adds the chunks of its samples in order."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    grad = grad_k
    if tl.program_id(2) == 1:
        partials += tl.cast(samples, tl.int64) * chunks * size
        grad = grad_v
    total = tl.zeros((BLOCK,), tl.float32)
    if ROWS:
        for b in range(samples):
            if tl.load(rows + b) == row:
                for chunk in range(b * chunks, (b + 1) * chunks):
                    total += tl.load(partials + tl.cast(chunk, tl.int64) * size + at, mask=inside, other=0.0)
    else:
        for chunk in range(chunks):
            total += tl.load(partials + (row * chunks + chunk) * size + at, mask=inside, other=0.0)
    tl.store(grad + row * size + at, total.to(grad.dtype.element_ty), mask=inside)


class _Plan(NamedTuple):
    """Tiling of a call: pieces of the head dim; pieces of the keys, or the block size of a loop over them; queries per
    tile; warps; tiles of queries in shared memory; whether the backward has queries as rows."""

    dims: tuple[int, ...]
    keys: tuple[int, ...]
    loop: bool
    M: int
    warps: int
    stages: int = 2
    rows: bool = False


def pieces(n: int) -> tuple[int, ...]:
    """At most two powers of two (each at least 16) with the smallest sum that is >= n; the larger first."""
    one = max(16, power_of_2(n))
    rest = max(16, power_of_2(max(n - one // 2, 1)))
    return (one // 2, rest) if one > 16 and one // 2 + rest < one else (one,)


@functools.lru_cache(4096)
def _plan(
    L: int, D: int, dtype: torch.dtype, capability: int, backward: bool = False, masked: bool = False, unit: int = 8
) -> _Plan:  # fmt: skip
    """The largest tiles without register spills (``make kernels-report``), for the GPU's major compute capability.

    If products read their operands from shared memory (9, 10), tiles are larger; otherwise warps hold copies. On Hopper
    (9) several blocks of four warps are better than one of eight, because each waits only for its own products; tiles
    of 64 x 32 leave registers for two or three. With a mask (more than 64 keys) or narrow accesses, registers do not
    suffice for a backward with queries as rows.
    """
    dims, shared = pieces(D), capability in (9, 10)
    wide = sum(dims)
    if dtype == torch.float32:  # without tensor cores
        return _Plan(dims if backward else (16,) * cdiv(D, 16), (16,), True, 16, 4 if D <= 96 else 8)
    if not backward:
        keys = pieces(L)
        if wide <= 160 and sum(keys) <= 128 and wide * sum(keys) <= 12800:
            return _Plan(dims, keys, False, 128, 8) if capability == 10 else _Plan(dims, keys, False, 64, 4)
        if capability == 9 and unit == 8:
            return _loop(dims, 96)
        if shared:
            return _Plan(dims, (64,), True, 64, 8)
        return _Plan(dims, (64,), True, 64, 4) if wide <= 96 or D == 128 else _Plan(dims, (32,), True, 32, 4)
    if capability == 9 and unit == 8:
        keys, one = pieces(L), max(16, power_of_2(L))
        if D <= 64 and sum(keys) <= (64 if masked else 80):
            return _Plan((64,), keys, False, 64, 4, 3, True)  # a transposed product has at least 64 rows
        if D <= 64 and sum(keys) <= 96:
            return _Plan((64,), keys, False, 128, 8, 3, True)
        if 64 < D <= 128 and one <= 64:
            return _Plan((128,), (one,), False, 128, 8, 2, True)
        if wide <= 160:
            return _Plan(dims, (64,), True, 32, 4)
    if L <= 128 and wide <= (96 if shared else 64):  # with fewer rows of keys several warps hold copies
        return _Plan(dims, (128,), False, 64 if shared else 32, 8)
    if shared and wide <= 160:
        return _Plan(dims, (128 if wide <= 96 else 64,), True, 64, 8)
    if wide <= 128:
        return _Plan(dims, (64,), True, 32, 8) if wide <= 80 else _Plan((128,), (64,), True, 64, 8)
    return _Plan((256,), (32,), True, 32, 4)


def _loop(dims: tuple[int, ...], most: int) -> _Plan:
    """A loop over keys with queries as rows, on Hopper; over 64 keys at a time if the head dim has at most this
    width."""
    return _Plan(dims, (64 if sum(dims) <= most else 32,), True, 64, 4)


def _plan_of_q(plan: _Plan, capability: int, unit: int) -> _Plan:
    """Of the gradient of Q if the gradients of K and V have this plan, a loop. (In float32 the unit is at most 4.)"""
    return _loop(plan.dims, 64) if capability == 9 and unit == 8 and sum(plan.dims) <= 160 else plan


def _unit(D: int, *tensors: Tensor) -> int:
    """Elements of the widest access (at most 16 bytes) that divides every stride and the head dim."""
    return math.gcd(16 // tensors[0].itemsize, D, *[s for t in tensors for s in t.stride()[:3]])


def _strides(tensor: Tensor, unit: int) -> tuple[int, ...]:
    batch, row, head, _ = tensor.stride()
    return batch // unit, row // unit, head // unit


def _contiguous_heads(*tensors: Tensor) -> list[Tensor]:
    return [t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous() for t in tensors]


def _spans(B: int, N: int, H: int, M: int) -> tuple[int, int]:
    """Queries per chunk and chunks per sample. They depend only on shape and plan, because they determine the sums."""
    tiles = cdiv(N, M)
    span = max(1, min(tiles, B * H * tiles // PROGRAMS)) * M
    return span, cdiv(N, span)


def _masking(mask: Tensor | None, rows: Tensor | None, q: Tensor) -> tuple[Tensor, Tensor, int]:
    kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    return q if mask is None else mask.contiguous(), q if rows is None else rows.contiguous(), kind


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: Tensor | None, scale: float, out: Tensor
) -> None:
    """One launch; arguments as in the reference."""
    (B, N, H, D), L = q.shape, k.shape[1]
    if not q.numel():
        return
    q, k, v = _contiguous_heads(q, k, v)
    unit = _unit(D, q, k, v, out)
    plan = _plan(L, D, q.dtype, capability(q), unit=unit)
    masked, indexed, kind = _masking(mask, rows, q)
    span, chunks = (plan.M, cdiv(N, plan.M)) if plan.loop else _spans(B, N, H, plan.M)
    strides = [_strides(t, unit) for t in (q, k, v, out)]
    common = q, k, v, masked, indexed, out, N, L, len(k), H, scale * LOG2E, chunks
    grid, constants = (B * H * chunks,), (plan.M, kind, rows is not None, unit)
    options = {"num_warps": plan.warps, "num_stages": plan.stages, **FUSED}
    if plan.loop:
        cross_attention_forward_long[grid](*common, *strides, D, plan.dims, plan.keys[0], *constants, **options)
    else:
        _cross_attention_forward[grid](*common, span, *strides, D, plan.dims, plan.keys, *constants, **options)


def cross_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: Tensor | None, scale: float, grad_out: Tensor,
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor,
) -> None:  # fmt: skip
    """One launch, and one that adds partial sums if a row of K and V has several chunks or samples; arguments as in
    the reference."""
    (B, N, H, D), (R, L) = q.shape, k.shape[:2]
    of_q, of_kv = grad_q.numel() > 0, grad_k.numel() > 0
    if not q.numel():
        grad_k.zero_()
        grad_v.zero_()
        return
    q, k, v, grad_out = _contiguous_heads(q, k, v, grad_out)
    dq = grad_q if of_q else q
    unit = _unit(D, q, k, v, grad_out, dq)
    plan = _plan(L, D, q.dtype, capability(q), True, mask is not None, unit)
    masked, indexed, kind = _masking(mask, rows, q)
    span, chunks = _spans(B, N, H, plan.M)
    partial = of_kv and (chunks > 1 or rows is not None)
    partials = torch.empty((2, B * chunks, L, H, D) if partial else 0, dtype=torch.float32, device=q.device)
    sums = partials.unbind() if partial else (grad_k, grad_v)
    strides = [_strides(t, unit) for t in (q, k, v, grad_out)]
    sizes = N, L, R, H, scale * LOG2E, scale
    constants = plan.M, kind, rows is not None
    options = {"num_warps": plan.warps, "num_stages": plan.stages, **FUSED}
    if not plan.loop:
        kernel = _cross_attention_backward_rows if plan.rows else _cross_attention_backward
        keys = plan.keys if plan.rows else plan.keys[0]
        kernel[(B * H * chunks,)](
            q, k, v, masked, indexed, grad_out, dq, *sums, *sizes, chunks, span, *strides, _strides(dq, unit), D,
            plan.dims, keys, *constants, of_q, of_kv, unit, **options,
        )  # fmt: skip
    else:
        of_queries = _plan_of_q(plan, capability(q), unit)
        tiles, blocks, block = cdiv(N, of_queries.M), cdiv(L, plan.keys[0]), plan.keys[0]
        statistics = torch.empty((B, H, 3, N), dtype=torch.float32, device=q.device)
        cross_attention_backward_long_q[(B * H * tiles,)](
            q, k, v, masked, indexed, grad_out, dq, statistics, *sizes, tiles, *strides, _strides(dq, unit), D,
            plan.dims, of_queries.keys[0], of_queries.M, *constants[1:], of_q, unit,
            num_warps=of_queries.warps, num_stages=of_queries.stages, **FUSED,
        )  # fmt: skip
        if of_kv:
            cross_attention_backward_long_kv[(B * H * chunks * blocks,)](
                q, k, v, masked, indexed, grad_out, *sums, statistics, *sizes, chunks, span, blocks, *strides, D,
                plan.dims, block, *constants, unit, **options,
            )  # fmt: skip
    if partial:
        size = L * H * D
        _cross_attention_add[(R, cdiv(size, ADDED), 2)](
            partials, grad_k, grad_v, indexed, B, chunks, size, rows is not None, ADDED, **FUSED
        )
