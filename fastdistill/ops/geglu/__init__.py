# SPDX-License-Identifier: Apache-2.0
"""GEGLU (Shazeer, arXiv 2002.05202) after its projection: y = a gelu(g), where (a, g) are the halves of a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill.ops import _check, _native
from fastdistill.ops._backward import (
    again,
    apply,
    gradients,
    is_differentiated,
    kind_of,
    remember,
    wanted,
    with_its_kernel,
)
from fastdistill.ops._dispatch import Kernel, Kind, later, register
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
    "(Tensor grad, Tensor x, bool tanh, Tensor(a!) dx, Tensor(b!)[] dbias)",
    summary="the gradient of geglu, and its sum over rows",
    reference=reference.geglu_backward,
    kernels=[
        Kernel(
            "triton", "cuda", later(f"{__name__}.triton", "geglu_backward"), _native.triton_reason, cpp.refuse_backward
        ),
        Kernel("cpp", "cpu", cpp.geglu_backward, _native.cpu_reason, cpp.refuse_backward),
    ],
)


def geglu(x: Tensor, approximate: str = "none", *, bias: Tensor | None = None) -> Tensor:
    """The gate of a feed-forward block, forward and backward; the projection adds its bias itself.

    Args:
        x: [..., 2 D], float32, bfloat16 or float16: the values, then the gates, in the order of diffusers' ``GEGLU``.
            Copied if it is not contiguous.
        approximate: ``"none"``, gelu(g) = g Phi(g), or ``"tanh"``, as in ``torch.nn.functional.gelu``.
        bias: [2 D], which the projection has added to x as a constant (``bias.detach()``). Its gradient, the sum of
            the gradient of x over the rows, is computed in the same pass. The output does not depend on it.

    Returns:
        [..., D], contiguous, differentiable; second derivatives (``create_graph=True``) are those of the eager
        reference. Computed in float32, rounded once.

    Raises:
        InputError: an odd last dimension, another dtype or another ``approximate``; a bias that does not match.
    """
    _check.tensors(x=x)
    kind = _check.once(_checked, (x,) if bias is None else (x, bias), approximate)
    x = x.contiguous()
    if kind is not None and not wanted((x, bias)):
        return _forward(kind, x, approximate == "tanh")
    result: Tensor = apply(kind, _Geglu, x, bias, approximate == "tanh")
    return result


def _checked(tensors: tuple[Tensor, ...], approximate: str) -> None:
    x, *biases = tensors
    _check.dtype(x, "x", *_check.FLOATS)
    _check.require(x.dim() > 0 and x.shape[-1] % 2 == 0, "x", "an even last dimension", tuple(x.shape))
    _check.one_of(approximate, "approximate", APPROXIMATE)
    for bias in biases:
        _check.tensors(bias=bias)
        _check.shape(bias, "bias", x.shape[-1:], f"one number a column {tuple(x.shape[-1:])}")
        _check.dtype(bias, "bias", *_check.FLOATS)
        _check.device(bias, "bias", x.device, "x")


def _forward(kind: Kind | None, x: Tensor, tanh: bool) -> Tensor:
    y = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    if y.numel():
        _geglu(kind, x, tanh, y)
    return y


def _by_reference(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    if bias is not None:
        x = x + (bias - bias.detach())  # x already contains the bias as a constant; this adds its gradient
    y = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    reference.geglu(x, tanh, y)
    return y


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: Kind | None, x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
        ctx.save_for_backward(x, bias)
        remember(ctx, kind)
        ctx.tanh = tanh
        return _forward(kind, x, tanh)

    @staticmethod
    @with_its_kernel
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        if is_differentiated():
            return None, *again(lambda x, bias: _by_reference(x, bias, ctx.tanh), (x, bias), grad), None
        dx = torch.empty_like(x)
        (dbias,) = gradients((bias,), ctx.needs_input_grad[2:3], x.numel() == 0)
        if x.numel():
            held = [] if dbias is None else [dbias]
            _backward(kind_of(ctx, grad), grad.contiguous(), x, ctx.tanh, dx, held)
        return None, dx, dbias, None
