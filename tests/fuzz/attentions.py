# SPDX-License-Identifier: Apache-2.0
"""Arguments of attention and cross-attention."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor

from fastdistill.ops import attention, cross_attention
from tests.fuzz.calls import AUTOMATIC, Call, rounded
from tests.fuzz.tensors import Spec, dtypes, plain, sizes, small_sizes, spec

KERNELS = ("reference", AUTOMATIC)
SCALES = st.sampled_from((None, 0.5, 1.0, 0.0, -0.25, 2))


def attention_call(draw: Any) -> Call:
    arguments, _ = _qkv(draw)
    arguments["backend"] = draw(st.sampled_from((None, "math", "default", "reference", "efficient", "flash")))

    def function(**given: Any) -> tuple[Tensor]:
        return (attention(**given),)

    def truth(q: Tensor, k: Tensor, v: Tensor, heads: Any, scale: Any, backend: Any) -> tuple[Tensor]:
        return _truth(q, k, v, heads, scale, None, None, largest)

    largest = torch.finfo(torch.float16).max if arguments["q"].dtype == torch.float16 else torch.inf
    known = 0 not in arguments["q"].shape and 0 not in arguments["k"].shape
    return Call("attention", function, arguments, truth if known else None, kernels=(AUTOMATIC,), eps=_eps(arguments))


def cross_attention_call(draw: Any) -> Call:
    arguments, batch = _qkv(draw)
    keys, count = arguments["k"].shape[1], arguments["k"].shape[0]
    kind = draw(st.sampled_from(("none", "bool", "float")))
    if kind != "none":
        mask = spec(draw, (batch, keys), torch.bool if kind == "bool" else draw(dtypes))
        arguments["mask"] = plain(mask)
    if draw(st.booleans()):
        arguments["k"], arguments["v"] = (_rows(arguments[name], count + 1) for name in ("k", "v"))
        arguments["rows"] = Spec((batch,), torch.int64, below=count + 1 + draw(st.booleans()))

    def function(**given: Any) -> tuple[Tensor]:
        return (cross_attention(**given),)

    def truth(
        q: Tensor, k: Tensor, v: Tensor, heads: Any, scale: Any, mask: Any = None, rows: Any = None
    ) -> tuple[Tensor]:
        return _truth(q, k, v, heads, scale, mask, rows)

    known = 0 not in arguments["q"].shape and 0 not in arguments["k"].shape
    return Call("cross_attention", function, arguments, truth if known else None, kernels=KERNELS, eps=_eps(arguments))


def _eps(arguments: dict[str, Any]) -> float:
    """Torch's attention also rounds intermediate results, twice for those that are rounded here."""
    return 2 * torch.finfo(arguments["q"].dtype).eps


def _rows(of: Spec, count: int) -> Spec:
    return Spec(**{**vars(of), "shape": (count, *of.shape[1:])})


def _qkv(draw: Any) -> tuple[dict[str, Any], int]:
    batch, queries, keys = draw(small_sizes), draw(sizes), draw(sizes)
    heads, dim, dtype = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((8, 1, 5, 16, 0))), draw(dtypes)
    flat = draw(st.booleans())
    tail = (heads * dim,) if flat else (heads, dim)
    arguments: dict[str, Any] = {
        "q": spec(draw, (batch, queries, *tail), dtype),
        "k": spec(draw, (batch, keys, *tail), dtype),
        "v": spec(draw, (batch, keys, *tail), dtype),
        "heads": heads if flat else draw(st.sampled_from((None, heads))),
        "scale": draw(SCALES),
    }
    return arguments, batch


class _Softmax(torch.autograd.Function):
    """0 if every score is -inf. Its gradient is a difference of two numbers that nearly cancel. They are computed
    separately, so each gets its own error, as expected for sums over the head dim with magnitudes ``size``."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, size: Tensor) -> Tensor:
        nothing = scores.amax(-1, keepdim=True) == -torch.inf
        weights = torch.where(nothing, 0.0, torch.where(nothing, 0.0, scores).softmax(-1))
        ctx.save_for_backward(weights, size)
        return weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weights, size = ctx.saved_tensors
        own = grad + (rounded(size) - size)
        of_all = (weights * (grad + (rounded(size) - size))).sum(-1, keepdim=True)
        return weights * (rounded(own) - rounded(of_all)), None


def _truth(
    q: Tensor, k: Tensor, v: Tensor, heads: Any, scale: Any, mask: Any, rows: Any, largest: float = torch.inf
) -> tuple[Tensor]:
    """``largest``: of the known scores; torch's attention may store them in the dtype of its tensors."""
    flat = q.dim() == 3
    if flat:
        q, k, v = (t.unflatten(2, (heads, -1)) for t in (q, k, v))
    if rows is not None:
        k, v = k[rows], v[rows]
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = rounded(factor * rounded(torch.einsum("bnhd,blhd->bhnl", q, k)))
    if mask is not None:
        bias = (
            torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
        )
        scores = scores + bias[:, None, None].to(q.dtype)
    size = 2 * v.detach().abs().sum(-1).transpose(1, 2)[:, :, None]  # cotangents are at most 2
    weights = rounded(_Softmax.apply(scores, size.expand_as(scores)))
    # A backward recomputes the weights from the logarithm of their sum, whose precision depends on its size: next to
    # a score of 10,000 in float32 they are off by a thousandth, in every attention that stores nothing else.
    top = scores.detach().nan_to_num(0.0, 0.0, 0.0).abs().amax(-1, keepdim=True) + 1
    weights = weights * (1 + (rounded(top) - top) / 2)
    fits = scores.detach().nan_to_num(0.0, 0.0, 0.0).abs().amax(-1, keepdim=True) < largest
    weights = weights * torch.ones_like(weights).where(fits, torch.nan)
    out = rounded(torch.einsum("bhnl,blhd->bnhd", weights, v))
    return (out.flatten(2) if flat else out,)
