# SPDX-License-Identifier: Apache-2.0
"""GEGLU (Shazeer, arXiv 2002.05202) after its projection: y = a gelu(g), (a, g) the halves of a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill.ops import _check, _native
from fastdistill.ops._dispatch import Kernel, later, register
from fastdistill.ops.geglu import cpp, reference

APPROXIMATE = ("none", "tanh")

_geglu = register(
    "geglu",
    "(Tensor x, bool tanh, Tensor(a!) y)",
    summary="a gelu(g), (a, g) the halves of the last dimension",
    reference=reference.geglu,
    kernels=[
        Kernel("triton", "cuda", later(f"{__name__}.triton", "geglu"), _native.triton_reason, cpp.refuse),
        Kernel("cpp", "cpu", cpp.geglu, _native.cpu_reason, cpp.refuse),
    ],
)
_backward = register(
    "geglu_backward",
    "(Tensor grad, Tensor x, bool tanh, Tensor(a!) dx)",
    summary="the gradient of geglu",
    reference=reference.geglu_backward,
    kernels=[
        Kernel(
            "triton", "cuda", later(f"{__name__}.triton", "geglu_backward"), _native.triton_reason, cpp.refuse_backward
        ),
        Kernel("cpp", "cpu", cpp.geglu_backward, _native.cpu_reason, cpp.refuse_backward),
    ],
)


def geglu(x: Tensor, approximate: str = "none") -> Tensor:
    """The gated half of a feed-forward block, forward and backward; the projection keeps its bias.

    Args:
        x: [..., 2 D], float32, bfloat16 or float16: the values, then the gates, as diffusers' ``GEGLU`` projects them.
            Copied where it is not contiguous.
        approximate: ``"none"``, gelu(g) = g Phi(g), or ``"tanh"``, as in ``torch.nn.functional.gelu``.

    Returns:
        [..., D], contiguous; differentiable once. float32 inside, rounded once.

    Raises:
        InputError: an odd last dimension, another dtype or another ``approximate``.
    """
    _check.tensors(x=x)
    _check.dtype(x, "x", *_check.FLOATS)
    _check.require(x.dim() > 0 and x.shape[-1] % 2 == 0, "x", "an even last dimension", tuple(x.shape))
    _check.require(approximate in APPROXIMATE, "approximate", f"one of {', '.join(APPROXIMATE)}", repr(approximate))
    result: Tensor = _Geglu.apply(x, approximate == "tanh")
    return result


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tanh: bool) -> Tensor:
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
        if y.numel():
            _geglu(x, tanh, y)
        ctx.save_for_backward(x)
        ctx.tanh = tanh
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        if x.numel():
            _backward(grad.contiguous(), x, ctx.tanh, dx)
        return dx, None
