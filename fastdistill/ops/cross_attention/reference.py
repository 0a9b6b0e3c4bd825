# SPDX-License-Identifier: Apache-2.0
"""Cross-attention in eager torch: the specification of the op's kernels, and torch's own attention with its autograd.

S = scale Q K^T + bias,  P = softmax(S) over the keys (0 if all keys are masked),  out = P V
dV = P^T dO,  dP = dO V^T,  dS = P (dP - sum_j P_j dP_j),  dQ = scale dS K,  dK = scale dS^T Q
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from fastdistill.ops._backward import wanted
from fastdistill.ops._sdpa import sdpa


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """P [B, H, N, L] in float32."""
    scores = torch.einsum("bnhd,blhd->bhnl", q.float(), k.float()) * scale
    if mask is not None:
        bias = mask.float().log() if mask.dtype == torch.bool else mask.float()
        scores = scores + bias[:, None, None, :]
    if not scores.shape[-1]:
        return scores
    nothing = scores.amax(-1, keepdim=True) == -torch.inf
    return torch.where(nothing, 0.0, torch.where(nothing, 0.0, scores).softmax(-1))  # NaN would reach the gradient


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: Tensor | None, scale: float, out: Tensor
) -> None:
    """Fill ``out``, with NaN for samples whose row is out of range; computed in float32."""
    k, v = taken(k, rows), taken(v, rows)
    out.copy_(torch.einsum("bhnl,blhd->bnhd", _weights(q, k, mask, scale), v.float()))


def cross_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    rows: Tensor | None,
    scale: float,
    grad_out: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    """Fill ``grad_q``, and ``grad_k`` and ``grad_v``, unless they are empty; computed in float32."""
    count = len(k)
    k, v = taken(k, rows), taken(v, rows)
    p, g = _weights(q, k, mask, scale), grad_out.float()
    d = torch.einsum("bnhd,blhd->bhnl", g, v.float())
    s = p * (d - (p * d).sum(-1, keepdim=True)) * scale
    if grad_q.numel():
        grad_q.copy_(torch.einsum("bhnl,blhd->bnhd", s, k.float()))
    if grad_k.numel():
        for grad, weights, of in ((grad_k, s, q.float()), (grad_v, p, g)):
            samples = torch.einsum("bhnl,bnhd->blhd", weights, of)
            if rows is not None:  # a matrix product, because torch's scatter adds in no fixed order on a GPU
                owner = torch.arange(count, device=rows.device)[:, None] == rows
                samples = (owner.float() @ samples.flatten(1)).view(grad.shape)
            grad.copy_(samples)


def taken(bank: Tensor, rows: Tensor | None) -> Tensor:
    """The rows of K or V, NaN for rows out of range; None: all of them."""
    if rows is None:
        return bank
    there = (rows >= 0) & (rows < len(bank))
    return torch.where(there[:, None, None, None], bank[torch.where(there, rows, 0)], torch.nan)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: Tensor | None, scale: float) -> Tensor:
    """The same with ``scaled_dot_product_attention``, differentiable by torch's own autograd."""
    k, v = taken(k, rows), taken(v, rows)
    kept, dtype = None, q.dtype
    backends: tuple[SDPBackend, ...] = ()
    if mask is not None:  # without keys some backends give NaN: such a row attends to all keys, and is set to 0 after
        left_out = ~mask if mask.dtype == torch.bool else mask == -torch.inf
        kept = ~left_out.all(1, keepdim=True)
        if mask.dtype == torch.bool:
            mask = mask | ~kept
        else:  # in float32: in half precision a large finite bias is -inf
            mask = torch.where(kept, mask, 0.0).float()
            q, k, v = q.float(), k.float(), v.float()
            if wanted((q, k, v)):  # fused backwards are inaccurate with a large bias
                backends = (SDPBackend.MATH,)
        mask = mask[:, None, None, :]
    out = sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask=mask, scale=scale, backends=backends)
    out = out.transpose(1, 2).contiguous().to(dtype)  # no copy after a fused kernel
    return out if kept is None else torch.where(kept[:, :, None, None], out, 0.0)
