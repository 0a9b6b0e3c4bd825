# SPDX-License-Identifier: Apache-2.0
"""The gradients of cross-attention in CUDA for Hopper: ``csrc/cross_attention/cuda.cu``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.ops import _native
from fastdistill.ops._dispatch import forced

#: By head dim the fewest keys that it takes, and the most: below, Triton's tiles fit as well.
KEYS = {40: (65, 80), 64: (65, 80), 72: (65, 120), 80: (65, 80), 160: (1, 80)}
#: Head dims of blocks of one warpgroup, two a multiprocessor (the others have two, and it has one): Triton's kernel was
#: faster on an H200 than two warpgroups, and one is unmeasured, so these run when they are asked for.
SMALL = 40, 64
MULTIPROCESSORS = 132  # of the largest GPU; a constant, as sums are cut by it
_ALIGNED = 8  # elements of 16 bytes


def reason() -> str | None:
    """Why the kernel cannot run in this installation, or None."""
    if (why := _native.cuda_reason()) is not None:
        return why
    if not _native.cuda().cross_attention_backward_built():
        return "the extension fastdistill._cuda was not built for sm_90"
    return None


def refuse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: Tensor | None, scale: float, grad_out: Tensor,
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor,
) -> str | None:  # fmt: skip
    if q.is_cuda and torch.cuda.get_device_capability(q.device) != (9, 0):
        return "its GPU is not a Hopper"
    if q.dtype == torch.float32:
        return "float32, where it takes bfloat16 and float16"
    dim, keys = q.shape[3], k.shape[1]
    if dim not in KEYS:
        return f"a head dim of {dim}, where it takes {', '.join(map(str, KEYS))}"
    if dim in SMALL and forced() != "cuda":
        return f"a head dim of {dim}, for which Triton's kernel is the first choice"
    fewest, most = KEYS[dim]
    if not fewest <= keys <= most:
        return f"{keys} keys, where it takes {fewest} to {most}"
    if not (q.numel() and grad_q.numel() and grad_k.numel()):
        return "not all gradients are asked for"
    if not (grad_k.is_contiguous() and grad_v.is_contiguous()):
        return "grad_k and grad_v must be contiguous"
    for tensor in (q, k, v, grad_out, grad_q):
        *outer, inner = tensor.stride()
        if inner != 1 or any(s % _ALIGNED for s in outer) or tensor.data_ptr() % 16:
            return f"heads that do not start at multiples of 16 bytes (strides {tensor.stride()})"
    return None


def chunks_of(B: int, N: int, H: int, D: int) -> tuple[int, int]:
    """Queries of a chunk, and chunks of a sample, by which a GPU is full for the least time: that of a block's tiles,
    and of two more for K, V and its sums."""
    queries, blocks = (64, 2 * MULTIPROCESSORS) if D in SMALL else (128, MULTIPROCESSORS)
    tiles, heads = -(-N // queries), B * H
    counts = range(1, min(tiles, blocks) + 1)
    chunks = min(counts, key=lambda n: (-(-heads * n // blocks) * (-(-tiles // n) + 2), n))
    span = -(-tiles // chunks)
    return span * queries, -(-tiles // span)


def cross_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: Tensor | None, scale: float, grad_out: Tensor,
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor,
) -> None:  # fmt: skip
    """One launch, and one that adds where K and V have several chunks or samples a row; arguments as the
    reference's."""
    (B, N, H, D), (R, L) = q.shape, k.shape[:2]
    span, chunks = chunks_of(B, N, H, D)
    partial = chunks > 1 or rows is not None
    partials = torch.empty((2, B * chunks, L, H, D) if partial else 0, dtype=torch.float32, device=q.device)
    kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    mask_dtype = _native.DTYPES[mask.dtype] if mask is not None and kind == 2 else 0
    mask, rows = (None if t is None else t.contiguous() for t in (mask, rows))
    _native.cuda().cross_attention_backward(
        *((t.data_ptr(), *t.stride()[:3]) for t in (q, k, v, grad_out, grad_q)),
        mask.data_ptr() if mask is not None else 0, kind, mask_dtype,
        rows.data_ptr() if rows is not None else 0, grad_k.data_ptr(), grad_v.data_ptr(),
        partials.data_ptr() if partial else 0, B, N, H, D, L, R, chunks, span, scale, _native.DTYPES[q.dtype],
        _native.queue(q),
    )  # fmt: skip
