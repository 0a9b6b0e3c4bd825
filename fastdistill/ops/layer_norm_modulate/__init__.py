# SPDX-License-Identifier: Apache-2.0
"""Layer norm and modulation of a transformer block (AdaLN), alone or with the gated residual before it.

    s = x + gate h    n = (s - mean(s)) / sqrt(var(s) + eps)    y = (n weight + bias) (1 + scale) + shift

mean and var are over the last dimension. DiT (Peebles and Xie, arXiv 2212.09748) calls it adaLN, PixArt adaLN-single.
"""

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
from fastdistill.ops.layer_norm_modulate import cpp, reference

_forward = register(
    "layer_norm_modulate",
    "(Tensor x, Tensor? h, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, float eps,"
    " Tensor(a!) y, Tensor(b!)[] s, Tensor(c!) mean, Tensor(d!) rstd)",
    summary="(layer_norm(x + gate h) weight + bias) (1 + scale) + shift",
    reference=reference.layer_norm_modulate,
    kernels=[
        Kernel("triton", "cuda", later(f"{__name__}.triton", "layer_norm_modulate"), _native.triton_reason, cpp.refuse),
        Kernel("cpp", "cpu", cpp.layer_norm_modulate, _native.cpu_reason, cpp.refuse),
    ],
)
_backward = register(
    "layer_norm_modulate_backward",
    "(Tensor grad, Tensor? grad_s, Tensor s, Tensor? h, Tensor? gate, Tensor? scale, Tensor? weight, Tensor? bias,"
    " Tensor mean, Tensor rstd, int wanted, Tensor(a!) dx, Tensor(b!)[] dh, Tensor(c!)[] small)",
    summary="gradients of layer_norm_modulate",
    reference=reference.layer_norm_modulate_backward,
    kernels=[
        Kernel(
            "triton", "cuda", later(f"{__name__}.triton", "layer_norm_modulate_backward"), _native.triton_reason,
            cpp.refuse_backward,
        ),
        Kernel("cpp", "cpu", cpp.layer_norm_modulate_backward, _native.cpu_reason, cpp.refuse_backward),
    ],
)  # fmt: skip


def layer_norm_modulate(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Layer norm, then scale and shift of each sample, forward and backward.

    Args:
        x: [B, ..., D], float32, bfloat16 or float16; copied if it is not contiguous.
        scale, shift: [B, D] or [B, 1, D], of any of these dtypes; any row stride, such as that of a chunk.
        weight, bias: [D], or None.
        eps: added to the variance.

    Returns:
        A contiguous tensor like ``x``, differentiable with respect to every tensor; second derivatives
        (``create_graph=True``) are those of the eager reference. The variance is computed around the mean, and all
        sums in float32 or wider; the same bits in every run.

    Raises:
        InputError: the shapes, dtypes or devices do not match.
    """
    return _apply(x, None, None, scale, shift, weight, bias, eps)[0]


def layer_norm_beside(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """``layer_norm_modulate`` and x itself, for the residual: the gradient of that is added in the backward's pass.

    Returns:
        ``(y, x)``. For the rest see ``layer_norm_modulate``.
    """
    y, beside = _apply(x, None, None, scale, shift, weight, bias, eps, beside=True)
    return y, beside


def residual_layer_norm_modulate(
    x: Tensor,
    h: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The end of a block and the beginning of the next one: s = x + gate h and its modulated layer norm, in one pass.

    Args:
        h: shape and dtype of ``x``.
        gate: [B, D] or [B, 1, D]; None: 1.

    Returns:
        ``(y, s)``, both like ``x``; y is the norm of the rounded s. For the rest see ``layer_norm_modulate``.

    Raises:
        InputError: as for ``layer_norm_modulate``, or h or gate does not match.
    """
    _check.tensors(h=h)
    y, s = _apply(x, h, gate, scale, shift, weight, bias, eps)
    return y, s


def _apply(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    beside: bool = False,
) -> tuple[Tensor, ...]:
    given = h, gate, scale, shift, weight, bias
    _check.tensors(x=x)
    kind = _check.once(_checked, (x, *given), eps)
    rows = [t if t is None or t.dim() == 2 else t.reshape(t.shape[0], t.shape[-1]) for t in (gate, scale, shift)]
    _check.constants(eps=eps)
    laid_out = _laid_out(x, h, *rows, weight, bias)
    if kind is not None and not wanted((x, *given)):
        y, s, _, _ = _run(kind, *laid_out, eps)
        return (y, x) if beside else (y, *s)
    result: tuple[Tensor, ...] = apply(kind, _LayerNormModulate, *laid_out, eps, beside)
    return result


_NAMES = ("h", "gate", "scale", "shift", "weight", "bias")


def _checked(tensors: tuple[Any, ...], eps: float) -> None:
    x, *rest = tensors
    _check.dtype(x, "x", *_check.FLOATS)
    _check.require(x.dim() >= 2, "x", "[batch, ..., channels]", tuple(x.shape))
    _check.require(_check.single(eps, "eps") >= 0, "eps", "a number >= 0", eps)
    batch, channels = x.shape[0], x.shape[-1]
    for name, tensor in zip(_NAMES, rest, strict=True):
        if tensor is None:
            continue
        _check.tensors(**{name: tensor})
        if name == "h":
            same = tensor.shape == x.shape and tensor.dtype == x.dtype
            got = f"{tuple(tensor.shape)} {tensor.dtype}"
            _check.require(same, name, f"a tensor like x {tuple(x.shape)} {x.dtype}", got)
        elif name in ("weight", "bias"):
            _check.shape(tensor, name, (channels,), f"one number a channel ({channels},)")
        else:
            fits = tensor.dim() >= 2 and tensor.shape == (batch, *[1] * (tensor.dim() - 2), channels)
            _check.require(fits, name, f"one number a sample and channel ({batch}, {channels})", tuple(tensor.shape))
        _check.dtype(tensor, name, *_check.FLOATS)
        _check.device(tensor, name, x.device, "x")


def _laid_out(x: Tensor, h: Tensor | None, *given: Tensor | None) -> tuple[Any, ...]:
    """x and h contiguous, the others with a stride of 1 between channels (copied if necessary)."""
    rows = [t if t is None or t.stride(-1) == 1 or t.shape[-1] < 2 else t.contiguous() for t in given]
    return x.contiguous(), None if h is None else h.contiguous(), *rows


def _run(kind: Kind | None, x: Tensor, h: Tensor | None, *args: Any) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    y = torch.empty_like(x)
    s = [] if h is None else [torch.empty_like(x)]
    mean, rstd = [x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2)]
    if x.numel():
        _forward(kind, x, h, *args, y, s, mean, rstd)
    return y, s, mean, rstd


class _LayerNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: Kind | None, *args: Any) -> tuple[Tensor, ...]:
        *tensors, eps, beside = args
        ctx.set_materialize_grads(False)
        x, h, gate, scale, shift, weight, bias = tensors
        y, s, mean, rstd = _run(kind, x, h, gate, scale, shift, weight, bias, eps)
        # Without a gate the gradients of x and h are one.
        own = None if gate is None else h
        ctx.save_for_backward(s[0] if s else x, own, gate, scale, shift, weight, bias, mean, rstd)
        ctx.both = h is not None and gate is None
        remember(ctx, kind)
        ctx.eps = eps
        return (y, x.view_as(x)) if beside else (y, *s)

    @staticmethod
    @with_its_kernel
    def backward(ctx: Any, grad: Tensor | None, grad_s: Tensor | None = None) -> tuple[Any, ...]:
        kind = kind_of(ctx, grad, grad_s)
        s, h, gate, scale, shift, weight, bias, mean, rstd = ctx.saved_tensors
        if is_differentiated():
            ds, of_h, *rest = _backward_again(ctx.eps, grad, grad_s, s, h, gate, scale, shift, weight, bias)
            return None, ds, ds if ctx.both else of_h, *rest, None, None
        grad = torch.zeros_like(s) if grad is None else grad.contiguous()
        grad_s = None if grad_s is None else grad_s.contiguous()
        small = gradients((gate, scale, shift, weight, bias), ctx.needs_input_grad[3:8], s.numel() == 0)
        dx = torch.empty_like(s)
        dh = [] if h is None else [torch.empty_like(s)]
        if s.numel():
            wanted = sum([1 << i for i, g in enumerate(small) if g is not None])
            held = [g for g in small if g is not None]
            _backward(kind, grad, grad_s, s, h, gate, scale, weight, bias, mean, rstd, wanted, dx, dh, held)
        return None, dx, dx if ctx.both else dh[0] if dh else None, *small, None, None


def _backward_again(
    eps: float, grad: Tensor | None, grad_s: Tensor | None, s: Tensor, h: Tensor | None, gate: Tensor | None,
    *given: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of x, h, gate and ``given`` as differentiable functions of s; the graph of s contains x, h and
    gate."""

    def norm(s: Tensor, *given: Any) -> Tensor:
        y, (mean, rstd) = torch.empty_like(s), (s.new_empty(s.shape[:-1], dtype=torch.float32) for _ in range(2))
        arguments: tuple[Any, ...] = (s, None, None, *given, eps, y, [], mean, rstd)
        reference.layer_norm_modulate(*arguments)
        return y

    ds, *small = (None,) * 5 if grad is None else again(norm, (s, *given), grad)
    if grad_s is not None:
        ds = grad_s if ds is None else ds + grad_s
    if h is None or ds is None:
        return ds, None, None, *small
    assert gate is not None
    wide, over = ds.float(), gate.float().reshape(len(gate), *[1] * (s.dim() - 2), -1)
    dgate = (wide * h.float()).reshape(len(h), -1, h.shape[-1]).sum(1)
    return ds, (wide * over).to(h.dtype), dgate.to(gate.dtype), *small
