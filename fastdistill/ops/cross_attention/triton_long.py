# SPDX-License-Identifier: Apache-2.0
"""Cross-attention in Triton for keys that do not fit on chip at once: a loop over blocks of keys.

Grid      forward and gradient of Q: one program per head, tile of queries and sample; gradients of K and V: one per
          head, block of keys, chunk of queries and sample
Traffic   as in ``triton``, plus K and V once per tile of queries (from L2), and q and grad_out once per block of keys
Precision as in ``triton``; the softmax is rescaled when its maximum grows; a forward in fp32 adds partial sums over 16
          dimensions or keys, because the errors of one long chain of additions would accumulate
Limits    as in ``triton``
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastdistill.ops._triton import terms
from fastdistill.ops.cross_attention.triton_tiles import (
    add_product,
    finite,
    get,
    inverse,
    key_bias,
    place,
    product,
    put,
    scaled_product,
    start,
    times,
    times_and_product,
    zeros,
)


@triton.jit
def cross_attention_forward_long(
    q, k, v, mask, rows, out, N, L, R, H, scale, tiles, q_strides, k_strides, v_strides, out_strides,
    D: tl.constexpr, DIMS: tl.constexpr, KEYS: tl.constexpr, M: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    h, tile, b, row, scale = place(rows, R, scale, H, tiles, ROWS)
    k += start(k_strides, row, h, UNIT)
    v += start(v_strides, row, h, UNIT)
    mask += b * L
    query = tile * M + tl.arange(0, M)
    x = get(q + start(q_strides, b, h, UNIT), query, N, q_strides[1], D, DIMS, UNIT)
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    sums = zeros(M, DIMS)
    for first in range(0, L, KEYS):
        at = first + tl.arange(0, KEYS)
        keys, bias = get(k, at, L, k_strides[1], D, DIMS, UNIT), key_bias(mask, at, L, MASK)[None, :]
        if q.dtype.element_ty == tl.float32:
            s = scaled_product(x, keys, scale, tl.broadcast_to(bias, (M, KEYS)), DIMS)
        else:
            s = product(x, keys, DIMS) * scale + bias
        higher = tl.maximum(top, tl.max(s, 1))
        shrunk = tl.exp2(top - finite(higher))
        w = tl.exp2(s - finite(higher)[:, None])
        total = total * shrunk + tl.sum(w, 1)
        values = get(v, at, L, v_strides[1], D, DIMS, UNIT)
        if q.dtype.element_ty == tl.float32:
            sums = times_and_product(sums, shrunk[:, None], w, values, DIMS)
        else:
            sums = add_product(times(sums, shrunk[:, None], DIMS), w.to(q.dtype.element_ty), values, DIMS)
        top = higher
    share = inverse(total)
    if q.dtype.element_ty == tl.float32:
        share = tl.fma(share, tl.fma(-total, share, tl.full((M,), 1.0, tl.float32)), share)  # division errs by 2 ulp
    put(
        out + start(out_strides, b, h, UNIT), query, N, out_strides[1], sums, share[:, None], D, DIMS, UNIT
    )  # fmt: skip


@triton.jit
def cross_attention_backward_long_q(
    q, k, v, mask, rows, grad_out, grad_q, statistics, N, L, R, H, scale, factor, tiles,
    q_strides, k_strides, v_strides, g_strides, dq_strides, D: tl.constexpr, DIMS: tl.constexpr, KEYS: tl.constexpr,
    M: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, GRAD_Q: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """For each query, stored for K and V: the maximum of its scores, 1 / the sum of its weights (added to a large
    maximum, its logarithm would be lost to rounding) and delta = sum_j P_j dP_j. Then its gradient."""
    h, tile, b, row, scale = place(rows, R, scale, H, tiles, ROWS)
    k += start(k_strides, row, h, UNIT)
    v += start(v_strides, row, h, UNIT)
    mask += b * L
    query = tile * M + tl.arange(0, M)
    x = get(q + start(q_strides, b, h, UNIT), query, N, q_strides[1], D, DIMS, UNIT)
    g = get(grad_out + start(g_strides, b, h, UNIT), query, N, g_strides[1], D, DIMS, UNIT)
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    delta = tl.zeros((M,), tl.float32)
    for first in range(0, L, KEYS):
        at = first + tl.arange(0, KEYS)
        s = product(x, get(k, at, L, k_strides[1], D, DIMS, UNIT), DIMS) * scale + key_bias(mask, at, L, MASK)[None, :]
        higher = tl.maximum(top, tl.max(s, 1))
        shrunk = tl.exp2(top - finite(higher))
        w = tl.exp2(s - finite(higher)[:, None])
        total = total * shrunk + tl.sum(w, 1)
        p = product(g, get(v, at, L, v_strides[1], D, DIMS, UNIT), DIMS)
        delta = delta * shrunk + tl.sum(terms(w, p, q.dtype.element_ty == tl.float32), 1)
        top = higher
    top, share = finite(top), inverse(total)
    delta *= share
    kept = statistics + (b * H + h) * N * 3 + query
    tl.store(kept, top, mask=query < N)
    tl.store(kept + N, share, mask=query < N)
    tl.store(kept + 2 * N, delta, mask=query < N)
    if GRAD_Q:
        sums = zeros(M, DIMS)
        for first in range(0, L, KEYS):
            at = first + tl.arange(0, KEYS)
            keys = get(k, at, L, k_strides[1], D, DIMS, UNIT)
            w = tl.exp2(product(x, keys, DIMS) * scale + key_bias(mask, at, L, MASK)[None, :] - top[:, None])
            p = product(g, get(v, at, L, v_strides[1], D, DIMS, UNIT), DIMS)
            sums = add_product(sums, (w * (p - delta[:, None])).to(q.dtype.element_ty), keys, DIMS)
        tl.debug_barrier()  # load it again: keeping it over the loop would need one register too many
        share = factor * tl.load(kept + N, mask=query < N, other=0.0)[:, None]
        put(grad_q + start(dq_strides, b, h, UNIT), query, N, dq_strides[1], sums, share, D, DIMS, UNIT)


@triton.jit
def cross_attention_backward_long_kv(
    q, k, v, mask, rows, grad_out, grad_k, grad_v, statistics, N, L, R, H, scale, factor, chunks, span, blocks,
    q_strides, k_strides, v_strides, g_strides, D: tl.constexpr, DIMS: tl.constexpr, KEYS: tl.constexpr,
    M: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    h, part, b, row, scale = place(rows, R, scale, H, chunks * blocks, ROWS)
    chunk, block = part // blocks, part % blocks
    q += start(q_strides, b, h, UNIT)
    grad_out += start(g_strides, b, h, UNIT)
    statistics += (b * H + h) * N * 3
    at = block * KEYS + tl.arange(0, KEYS)
    keys = get(k + start(k_strides, row, h, UNIT), at, L, k_strides[1], D, DIMS, UNIT)
    values = get(v + start(v_strides, row, h, UNIT), at, L, v_strides[1], D, DIMS, UNIT)
    bias = key_bias(mask + b * L, at, L, MASK)
    key_sums, value_sums = zeros(KEYS, DIMS), zeros(KEYS, DIMS)
    first = chunk * span
    for begin in range(first, tl.minimum(first + span, N), M):
        query = begin + tl.arange(0, M)
        x = get(q, query, N, q_strides[1], D, DIMS, UNIT)
        g = get(grad_out, query, N, g_strides[1], D, DIMS, UNIT)
        delta = tl.load(statistics + 2 * N + query, mask=query < N, other=0.0)
        s = product(values, g, DIMS) - delta[None, :]
        top = tl.load(statistics + query, mask=query < N, other=float("inf"))  # weight 0 with any mask
        w = tl.exp2(product(keys, x, DIMS) * scale + bias[:, None] - top[None, :])
        w *= tl.load(statistics + N + query, mask=query < N, other=0.0)[None, :]
        value_sums = add_product(value_sums, w.to(q.dtype.element_ty), g, DIMS)
        key_sums = add_product(key_sums, (w * s).to(q.dtype.element_ty), x, DIMS)
    slot = ((b * chunks + chunk) * L * H + h) * D
    put(grad_k + slot, at, L, H, key_sums, factor, D, DIMS, D)
    put(grad_v + slot, at, L, H, value_sums, 1.0, D, DIMS, D)
