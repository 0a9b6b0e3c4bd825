# SPDX-License-Identifier: Apache-2.0
"""Cross-attention and its gradients in CUDA for Hopper: ``csrc/cross_attention/cuda.cu``."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastdistill.ops import _native
from fastdistill.ops._dispatch import forced

#: For each head dim the minimum and maximum number of keys. For fewer keys Triton's tiles fit as well.
KEYS = {40: (65, 80), 64: (65, 80), 72: (65, 120), 80: (65, 80), 160: (1, 80)}
#: Head dims for which a block has one warpgroup, and a multiprocessor two blocks (otherwise two, and one block). On an
#: H200 two warpgroups were slower than Triton; one has not been measured. So these run only if ``use`` selects them.
SMALL = 40, 64
#: Head dims for which the forward comes before Triton's; for others only ``use`` selects it. It has not been measured.
FORWARD: tuple[int, ...] = ()
#: For each head dim the blocks of the forward that a multiprocessor runs at a time.
FORWARD_BLOCKS = {40: 4, 64: 4, 72: 3, 80: 3, 160: 2}
#: Head dims, of 40 and 64, for which matrices in shared memory are swizzled, not padded. Neither has been measured.
SWIZZLED: tuple[int, ...] = ()
MULTIPROCESSORS = 132  # of the largest GPU; a constant, because the chunks of sums depend on it
#: Chunks whose blocks are a cluster, which adds up their sums of K and V.
CLUSTERS = 1, 2, 4, 8
_ALIGNED = 8  # elements in 16 bytes


def reason() -> str | None:
    """Why the kernel cannot run in this installation, or None."""
    if (why := _native.cuda_reason()) is not None:
        return why
    if not _native.cuda().cross_attention_built():
        return "the extension fastdistill._cuda was not built for sm_90"
    return None


def refuse_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: Tensor | None, scale: float, out: Tensor
) -> str | None:
    if (why := _refuse(q, k)) is not None:
        return why
    if q.shape[3] not in FORWARD and forced() != "cuda":
        return f"a head dim of {q.shape[3]}, for which Triton's kernel is the first choice"
    return _unaligned(q, k, v, out)


def refuse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: Tensor | None, scale: float, grad_out: Tensor,
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor,
) -> str | None:  # fmt: skip
    if (why := _refuse(q, k)) is not None:
        return why
    if q.shape[3] in SMALL and forced() != "cuda":
        return f"a head dim of {q.shape[3]}, for which Triton's kernel is the first choice"
    if not (q.numel() and grad_q.numel() and grad_k.numel()):
        return "not all gradients are asked for"
    if not (grad_k.is_contiguous() and grad_v.is_contiguous()):
        return "grad_k and grad_v must be contiguous"
    return _unaligned(q, k, v, grad_out, grad_q)


def _refuse(q: Tensor, k: Tensor) -> str | None:
    if q.is_cuda and torch.cuda.get_device_capability(q.device) != (9, 0):
        return "its GPU is not a Hopper"
    if q.dtype == torch.float32:
        return "float32, where it takes bfloat16 and float16"
    dim, keys = q.shape[3], k.shape[1]
    if dim not in KEYS:
        return f"a head dim of {dim}, where it takes {', '.join(map(str, KEYS))}"
    fewest, most = KEYS[dim]
    if not fewest <= keys <= most:
        return f"{keys} keys, where it takes {fewest} to {most}"
    return None


def _unaligned(*tensors: Tensor) -> str | None:
    for tensor in tensors:
        *outer, inner = tensor.stride()
        if inner != 1 or any(s % _ALIGNED for s in outer) or tensor.data_ptr() % 16:
            return f"heads that do not start at multiples of 16 bytes (strides {tensor.stride()})"
    return None


@functools.lru_cache(4096)
def chunks_of(B: int, N: int, H: int, D: int, forward: bool = False) -> tuple[int, int]:
    """Queries per chunk, and chunks per sample, with the least estimated time on the whole GPU. A block's time is that
    of its tiles plus two more for K, V and its sums."""
    queries, each = (64, FORWARD_BLOCKS[D]) if forward else (64, 2) if D in SMALL else (128, 1)
    blocks = each * MULTIPROCESSORS
    tiles, heads = -(-N // queries), B * H
    counts = range(1, min(tiles, blocks) + 1)
    chunks = min(counts, key=lambda n: (-(-heads * n // blocks) * (-(-tiles // n) + 2), n))
    span = -(-tiles // chunks)
    return span * queries, -(-tiles // span)


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: Tensor | None, scale: float, out: Tensor
) -> None:
    (B, N, H, D), (R, L) = q.shape, k.shape[:2]
    if not q.numel():
        return
    span, chunks = chunks_of(B, N, H, D, forward=True)
    kind, mask_dtype = _kind(mask)
    mask, rows = (None if t is None else t.contiguous() for t in (mask, rows))
    _native.cuda().cross_attention(
        *((t.data_ptr(), *t.stride()[:3]) for t in (q, k, v, out)),
        mask.data_ptr() if mask is not None else 0, kind, mask_dtype, rows.data_ptr() if rows is not None else 0,
        B, N, H, D, L, R, chunks, span, scale, _native.DTYPES[q.dtype], D in SWIZZLED, _native.queue(q),
    )  # fmt: skip


def _kind(mask: Tensor | None) -> tuple[int, int]:
    """``fd::Mask`` and the dtype of a bias."""
    kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    return kind, _native.DTYPES[mask.dtype] if mask is not None and kind == 2 else 0


def cross_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: Tensor | None, scale: float, grad_out: Tensor,
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor,
) -> None:  # fmt: skip
    """One launch, and one that adds partial sums if a row of K and V has several samples, or more chunks than blocks of
    a cluster add up; arguments as in the reference."""
    (B, N, H, D), (R, L) = q.shape, k.shape[:2]
    span, chunks = chunks_of(B, N, H, D)
    partial = chunks not in CLUSTERS or rows is not None
    partials = torch.empty((2, B * chunks, L, H, D) if partial else 0, dtype=torch.float32, device=q.device)
    kind, mask_dtype = _kind(mask)
    mask, rows = (None if t is None else t.contiguous() for t in (mask, rows))
    _native.cuda().cross_attention_backward(
        *((t.data_ptr(), *t.stride()[:3]) for t in (q, k, v, grad_out, grad_q)),
        mask.data_ptr() if mask is not None else 0, kind, mask_dtype,
        rows.data_ptr() if rows is not None else 0, grad_k.data_ptr(), grad_v.data_ptr(),
        partials.data_ptr() if partial else 0, B, N, H, D, L, R, chunks, span, scale, _native.DTYPES[q.dtype],
        D in SWIZZLED, _native.queue(q),
    )  # fmt: skip
