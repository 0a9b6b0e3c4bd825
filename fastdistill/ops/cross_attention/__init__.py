# SPDX-License-Identifier: Apache-2.0
"""Attention from many queries to a few keys: from the tokens of an image to those of a prompt (at most 512).

    out = softmax(scale Q K^T + bias) V

General attention kernels divide the work of a backward by keys, and a prompt has only 77; this one divides it by
queries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill.ops import _check, _native
from fastdistill.ops._backward import again, apply, is_differentiated, kind_of, remember, wanted, with_its_kernel
from fastdistill.ops._dispatch import OPS, REFERENCE, Kernel, Kind, constant, forced, later, register
from fastdistill.ops.cross_attention import cuda, reference

KEYS, DIMS = 512, 256  # most of each that the kernels take


def _refuse(q: Tensor, k: Tensor, *others: Any) -> str | None:
    """The limits of the kernels, forward and backward."""
    if not 1 <= k.shape[1] <= KEYS:
        return f"{k.shape[1]} keys, where it takes 1 to {KEYS}"
    if not 1 <= q.shape[3] <= DIMS:
        return f"a head dim of {q.shape[3]}, where it takes 1 to {DIMS}"
    return None


def _refuse_backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: Tensor | None, scale: float, grad_out: Tensor,
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor,
) -> str | None:  # fmt: skip
    if not (grad_k.is_contiguous() and grad_v.is_contiguous()):
        return "grad_k and grad_v must be contiguous"
    return _refuse(q, k)


_cross_attention = register(
    "cross_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? rows, float scale, Tensor(a!) out)",
    summary="softmax(scale q k^T + bias) v for at most 512 keys, all of them on chip",
    reference=reference.cross_attention,
    kernels=[
        Kernel("cuda", "cuda", cuda.cross_attention, cuda.reason, cuda.refuse_forward),
        Kernel("triton", "cuda", later(f"{__name__}.triton", "cross_attention"), _native.triton_reason, _refuse),
    ],
)
_cross_attention_backward = register(
    "cross_attention_backward",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? rows, float scale, Tensor grad_out,"
    " Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v)",
    summary="the gradients of cross_attention, of K and V summed over queries (and samples of a row) in order",
    reference=reference.cross_attention_backward,
    kernels=[
        Kernel("cuda", "cuda", cuda.cross_attention_backward, cuda.reason, cuda.refuse),
        Kernel(
            "triton",
            "cuda",
            later(f"{__name__}.triton", "cross_attention_backward"),
            _native.triton_reason,
            _refuse_backward,
        ),
    ],
)


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    heads: int | None = None,
    mask: Tensor | None = None,
    rows: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of each sample's queries to its keys, for each head.

    Args:
        q: [B, N, H, D], or [B, N, H * D] with ``heads`` (the output of a projection); float32, bfloat16 or float16, any
            strides (copied if the elements of a head are not contiguous).
        k, v: [R, L, H, D] or [R, L, H * D] of the same dtype; R is B unless ``rows`` is given. With L = 0 the output is
            0. The kernels support L up to 512 and D up to 256; beyond, and on a CPU, torch's own attention runs.
        heads: H, if the tensors have three dimensions.
        mask: [B, L], without gradient: bool, True for the keys to keep, or a float bias that is added to the scores in
            float32 (-inf masks a key). If all keys of a sample are masked, its output and gradients are 0.
        rows: int64 [B], the row of ``k`` and ``v`` for each sample, in [0, R). Samples may share a row, so that a
            prompt of the whole batch is projected once; the gradient of the row is the sum. On a GPU and in a
            compiled function the values are not checked: a sample with a row outside [0, R) gives NaN.
        scale: factor of the scores before the bias; None: 1 / sqrt(D).

    Returns:
        A tensor of q's shape and dtype, contiguous if a kernel of this library computed it. The kernels accumulate in
        float32, give the same bits in every run, and save only their inputs for the backward. Their second derivative
        (``create_graph=True``) is that of the eager reference. Torch's attention has a second derivative on some
        devices and refuses it on others.

    Raises:
        InputError: the shapes, dtypes or devices do not match, or a row is out of range.
    """
    _check.tensors(q=q, k=k, v=v)
    flat = q.dim() == 3
    if flat:
        _check.whole(heads, "heads", "the number of heads, beside [B, N, H * D]")
        q, k, v = (_split(t, name, heads) for t, name in ((q, "q"), (k, "k"), (v, "v")))
    kind = _check.once(_checked, (q, k, v, mask, rows), None)
    _check.constants(mask=mask)
    if heads is not None:
        rule = f"the {q.shape[2]} heads of q, or None"
        _check.whole(heads, "heads", rule)
        _check.require(heads == q.shape[2], "heads", rule, heads)
    scale = _check.scale(scale, q.shape[3])
    if rows is not None:
        _check.rows(rows, "rows", len(k), "k")
    if q.numel() == 0 or k.numel() == 0:
        out = _by_reference(q, k, v, mask, rows, scale)
    elif forced() is None and not (q.is_cuda and _has_triton() and _refuse(q, k) is None and not _failed(q, k)):
        if not torch.compiler.is_compiling():
            OPS["cross_attention"].calls[REFERENCE] += 1
        out = reference.attend(q, k, v, mask, rows, scale)
    elif wanted((q, k, v)):
        out = apply(_on_gpu(kind), _CrossAttention, q, k, v, mask, rows, scale)
    else:
        out = _launch(_on_gpu(kind), q, k, v, mask, rows, scale)
    return out.flatten(2) if flat else out


@constant
def _has_triton() -> bool:
    return _native.triton_reason() is None


def _failed(q: Tensor, k: Tensor) -> bool:
    """Whether a kernel could not be compiled for such heads and keys, so that torch's attention runs instead."""
    if torch.compiler.is_compiling():
        return False
    kinds = [kind for op in (_cross_attention, _cross_attention_backward) for _, kind in list(op.failures)]
    like = q.dtype, q.shape[3], k.shape[1]
    return any((dtype, of_q[3], of_k[1]) == like for (_, dtype, of_q, _), (_, _, of_k, _), *_ in kinds)


def _split(tensor: Tensor, name: str, heads: int | None) -> Tensor:
    fits = tensor.dim() == 3 and tensor.shape[2] % (heads or 1) == 0
    _check.require(fits, name, f"[rows, tokens, a multiple of {heads} heads]", tuple(tensor.shape))
    split: Tensor = tensor.unflatten(2, (heads, -1))
    return split


def _checked(tensors: tuple[Any, ...], _: Any) -> None:
    q, k, v, mask, rows = tensors
    _check.shape(q, "q", (None, None, None, None), "[B, N, H, D]")
    batch, _, heads, dim = q.shape
    _check.dtype(q, "q", *_check.FLOATS)
    _check.shape(k, "k", (None if rows is not None else batch, None, heads, dim), f"[R, L, {heads}, {dim}] beside q")
    _check.shape(v, "v", tuple(k.shape), f"the shape of k {tuple(k.shape)}")
    for tensor, name in ((k, "k"), (v, "v")):
        _check.dtype(tensor, name, q.dtype)
        _check.device(tensor, name, q.device, "q")
    if mask is not None:
        _check.tensors(mask=mask)
        _check.shape(mask, "mask", (batch, k.shape[1]), f"[B, L] = ({batch}, {k.shape[1]})")
        _check.dtype(mask, "mask", torch.bool, *_check.FLOATS)
        _check.device(mask, "mask", q.device, "q")
    if rows is not None:
        _check.tensors(rows=rows)
        _check.shape(rows, "rows", (batch,), f"[B] = ({batch},)")
        _check.dtype(rows, "rows", torch.int64)
        _check.device(rows, "rows", q.device, "q")


def _on_gpu(kind: Kind | None) -> Kind | None:
    """None on a CPU, where a kind's kernel serves every layout: here the kernels (of tests) refuse some."""
    return None if kind is None or kind.on_cpu else kind


def _launch(
    kind: Kind | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: Tensor | None, scale: float
) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _cross_attention(kind, q, k, v, mask, rows, scale, out)
    return out


def _by_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: Tensor | None, scale: float) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    reference.cross_attention(q, k, v, mask, rows, scale, out)
    return out


class _CrossAttention(torch.autograd.Function):
    """The backward recomputes the softmax from Q and K, which costs less than storing it or its statistics."""

    @staticmethod
    def forward(
        ctx: Any, kind: Kind | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: Tensor | None,
        scale: float,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(q, k, v, mask, rows)
        remember(ctx, kind)
        ctx.scale = scale
        return _launch(kind, q.detach(), k.detach(), v.detach(), mask, rows, scale)

    @staticmethod
    @with_its_kernel
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        kind, (q, k, v, mask, rows) = kind_of(ctx, grad_out), ctx.saved_tensors
        if is_differentiated():
            given: tuple[Any, ...] = (mask, rows, ctx.scale)
            grads = again(lambda *own: _by_reference(*own, *given), (q, k, v), grad_out)
            return None, *grads, None, None, None
        needed = ctx.needs_input_grad[1:4]
        of_q, of_kv = needed[0], needed[1] or needed[2]
        made = [torch.empty(t.shape if of else 0, dtype=t.dtype, device=t.device)
                for t, of in ((q, of_q), (k, of_kv), (v, of_kv))]  # fmt: skip
        _cross_attention_backward(kind, q, k, v, mask, rows, ctx.scale, grad_out, *made)
        return None, *[g if of else None for g, of in zip(made, needed, strict=True)], None, None, None
