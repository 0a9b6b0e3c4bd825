# SPDX-License-Identifier: Apache-2.0
"""Convolutions and projections with fewer passes over memory, for devices whose libraries add a convolution's bias in a
separate pass.

Each function calls the module itself if it has hooks, a patched ``forward`` or another class (adapters, offloading,
quantization).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdistill.models import float8
from fastdistill.models.fuse.form import altered
from fastdistill.models.fuse.packed import side_by_side
from fastdistill.ops._check import FLOATS
from fastdistill.ops._dispatch import transformed
from fastdistill.ops.add_bias import add_bias, plus_bias, with_bias

#: Device types: torch adds the bias in a pass after cuDNN's convolution, while oneDNN adds it within the convolution.
PLACES = {"cuda"}


def saves(x: Tensor) -> bool:
    return x.device.type in PLACES


_OWN = (nn.Parameter, Tensor)


def plain(*modules: Any, kind: type) -> bool:
    """Whether the modules are what their class is and have weights of torch's own (quantized and distributed tensors
    are others), so that these say what is computed."""
    if altered([("", module, kind) for module in modules]) is not None:
        return False
    return all(type(module.weight) in _OWN for module in modules)


def convolved(conv: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The convolution without its bias, and the bias; or with its bias, and None."""
    bias = bias_left(conv, x)
    if bias is None:
        return conv(x), None
    assert isinstance(conv, nn.Conv2d)
    return conv._conv_forward(x, conv.weight, None), bias


def bias_left(conv: nn.Module, x: Tensor) -> Tensor | None:
    """The bias that ``convolved`` does not add; None: it adds it."""
    if not saves(x) or not plain(conv, kind=nn.Conv2d):
        return None
    assert isinstance(conv, nn.Conv2d)
    return conv.bias


def convolution(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution; its bias and the gradient of that by ops of their own, which are faster than torch's."""
    out, bias = convolved(conv, x)
    if bias is None:
        return out
    if out.dim() == 4 and out.is_contiguous(memory_format=torch.channels_last) and out.dtype in FLOATS:
        return plus_bias(out, bias)
    return out + bias.to(out.dtype).reshape(-1, 1, 1)


def is_product(conv: nn.Module, x: Tensor) -> bool:
    """Whether a convolution is a single matrix product over the channels of a channels_last map, with a fused bias."""
    if not saves(x) or x.dim() != 4 or not plain(conv, kind=nn.Conv2d):
        return False
    c: Any = conv
    if c.kernel_size != (1, 1) or c.stride != (1, 1) or c.groups != 1 or c.padding not in ((0, 0), "valid", "same"):
        return False
    return x.is_contiguous(memory_format=torch.channels_last)


def pointwise(conv: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1 x 1 convolution, as a matrix product if ``is_product``; then ``bias`` is an additional bias."""
    if not is_product(conv, x):
        assert bias is None
        result: Tensor = conv(x)
        return result
    assert isinstance(conv, nn.Conv2d)
    if bias is not None and conv.bias is not None:
        bias = conv.bias + bias
    out = _affine(_rows(x), conv.weight.flatten(1), conv.bias if bias is None else bias)
    return out.view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)


def branched(conv: nn.Module, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``x`` for one other op (which must return its gradient for x as a separate tensor), and the result of
    ``pointwise``, whose backward adds its product to this gradient in place."""
    assert isinstance(conv, nn.Conv2d)
    differentiated = torch.is_grad_enabled() and (x.requires_grad or conv.weight.requires_grad)
    if not differentiated or torch.is_autocast_enabled(x.device.type) or transformed():
        return x, pointwise(conv, x, bias)
    if bias is None:
        bias = conv.bias
    elif conv.bias is not None:
        bias = conv.bias + bias
    beside, out = _Branched.apply(x, conv.weight, None if bias is None else bias.detach())
    if bias is not None and bias.requires_grad:
        out = with_bias(out, bias)
    return beside, out.view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)


def _rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)


class _Branched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return x.view_as(x), F.linear(_rows(x), weight.flatten(1), bias)

    @staticmethod
    def backward(ctx: Any, beside: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if grad is None:
            return beside, None, None
        dx: Tensor | None = beside
        if ctx.needs_input_grad[0]:
            if beside is None or torch.is_grad_enabled() or not beside.is_contiguous(memory_format=torch.channels_last):
                own = (grad @ weight.flatten(1)).view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
                dx = own if beside is None else beside + own
            else:
                _rows(beside).addmm_(grad, weight.flatten(1))
        dw = (grad.t() @ _rows(x)).view_as(weight) if ctx.needs_input_grad[1] else None
        return dx, dw, None


def affine(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer for [..., C]; the gradient of its bias is computed by a separate op, because torch's sum is
    slow."""
    if not saves(x) or not plain(layer, kind=nn.Linear):
        result: Tensor = layer(x)
        return result
    assert isinstance(layer, nn.Linear)
    return _affine(x, layer.weight, layer.bias)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None or not bias.requires_grad or not torch.is_grad_enabled() or transformed():
        return F.linear(x, weight, bias)
    return with_bias(F.linear(x, weight, bias.detach()), bias)


def biased_sum(x: Tensor, h: Tensor, bias: Tensor) -> Tensor:
    """x + h + bias, in one pass if the maps are in channels_last."""
    if x.shape == h.shape and x.dtype == h.dtype and all(t.movedim(1, -1).is_contiguous() for t in (x, h)):
        return add_bias(x, h, bias)
    return x + (h + bias.to(h.dtype)[:, None, None])


def doubles(x: Tensor) -> bool:
    """Whether ``doubled`` supports a map: in channels_last, with channels in whole units of 16 bytes."""
    if not saves(x) or x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last) or not x.numel():
        return False
    unit = 16 // x.element_size()
    learned = torch.is_grad_enabled() and x.requires_grad
    # Torch's backward has been known to fail for many samples in this layout.
    if x.shape[1] % unit or x.storage_offset() % unit or (learned and (len(x) >= 64 or 4 * x.numel() >= 2**31)):
        return False
    return not transformed()


def doubled(x: Tensor) -> Tensor:
    """``F.interpolate(x, scale_factor=2.0, mode="nearest")`` with the same bits, but copied in units of 16 bytes
    instead of single elements."""
    if not torch.is_grad_enabled() or not x.requires_grad:
        return _double(x)
    result: Tensor = _Doubled.apply(x)
    return result


def _double(x: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    units = _units(x)[:, :, None, :, None]
    rows = units.expand(-1, -1, 2, -1, 2, -1).reshape(batch, 2 * height, 2 * width, -1)
    return rows.view(x.dtype).permute(0, 3, 1, 2)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.sizes = x.shape
        return _double(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        batch, channels, height, width = ctx.sizes
        sizes = [2 * height, 2 * width], [batch, channels, height, width]
        result: Tensor = torch.ops.aten.upsample_nearest2d_backward(grad, *sizes, 2.0, 2.0)
        return result


def projected(x: Tensor, *projections: nn.Module) -> Sequence[Tensor]:
    """Each linear projection of x [..., C], all computed by one product with their concatenated weights.

    The weights are concatenated in each call, so each remains a separate parameter. This costs 2 accesses of the
    weights and saves accesses of x. In a frozen model they can be adjacent in memory already (``packed``).
    """
    layers: list[Any] = list(projections)
    if (found := float8.projected(x, layers)) is not None:
        return found
    fit = saves(x) and plain(*layers, kind=nn.Linear) and not torch.is_autocast_enabled(x.device.type)
    if not fit or len({layer.bias is None for layer in layers}) > 1:
        return [layer(x) for layer in layers]
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers if layer.bias is not None]
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (x, *weights, *biases)):
        return _together(x, weights, biases)
    if transformed():  # a compiler has its own plan
        return [layer(x) for layer in layers]
    result: tuple[Tensor, ...] = _Projections.apply(x, len(layers), *weights, *biases)
    return result


def _together(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[Tensor, ...]:
    out = F.linear(x, side_by_side(weights), side_by_side(biases) if biases else None)
    return torch.unsafe_split_with_sizes(out, [len(weight) for weight in weights], dim=-1)


class _Projections(torch.autograd.Function):
    """The backward has a product for each projection, which also adds to the gradient of x. The incoming gradients are
    separate tensors, and concatenating them would cost more than a single product saves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, biases = tensors[:count], tensors[count:]
        ctx.save_for_backward(x, *weights)
        ctx.set_materialize_grads(False)
        return _together(x, weights, biases)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        needed = ctx.needs_input_grad
        rows = [None if g is None else g.flatten(0, -2) for g in grads]
        dx: Tensor | None = None
        if needed[0]:
            for g, weight in zip(rows, weights, strict=True):
                if g is None:
                    continue
                if dx is None:
                    dx = g @ weight
                else:
                    dx = torch.addmm(dx, g, weight) if torch.is_grad_enabled() else dx.addmm_(g, weight)
        tokens, count = x.flatten(0, -2), len(weights)
        dw = [
            g.t() @ tokens if g is not None and of else None for g, of in zip(rows, needed[2 : 2 + count], strict=True)
        ]
        has_bias = len(needed) > 2 + count
        db = (
            [g.sum(0) if g is not None and of else None for g, of in zip(rows, needed[2 + count :], strict=True)]
            if has_bias
            else []
        )
        return None if dx is None else dx.view_as(x), None, *dw, *db


def joins(x: Tensor, skip: Tensor) -> bool:
    """Whether ``joined`` supports two maps: both as for ``doubles``, with the same positions."""
    if not saves(x) or x.dim() != 4 or skip.dim() != 4 or x.dtype != skip.dtype or x.device != skip.device:
        return False
    if x.shape[0] != skip.shape[0] or x.shape[2:] != skip.shape[2:]:
        return False
    return _has_units(x) and _has_units(skip) and not transformed()


def _has_units(x: Tensor) -> bool:
    """Whether the channels of each position of a map in channels_last are whole units of 16 bytes."""
    if not x.is_contiguous(memory_format=torch.channels_last) or not x.numel():
        return False
    return not (x.shape[1] * x.element_size() % 16 or x.storage_offset() * x.element_size() % 16)


def joined(x: Tensor, skip: Tensor) -> Tensor:
    """``cat([x, skip], dim=1)`` with the same bits, copied in units of 16 bytes. Each gradient is a contiguous map: for
    slices of one tensor, the preceding backwards would copy or add single elements."""
    if not torch.is_grad_enabled() or not (x.requires_grad or skip.requires_grad):
        return _join(x, skip)
    result: Tensor = _Joined.apply(x, skip)
    return result


def _units(x: Tensor) -> Tensor:
    """[B, H, W, units of 16 bytes] of a map in channels_last, in the same memory."""
    batch, channels, height, width = x.shape
    # A view has the strides of x, of which those of sizes of 1 may be any number.
    rows = x.as_strided((batch, height, width, channels), (height * width * channels, width * channels, channels, 1))
    return rows.view(torch.complex128)


def _join(*maps: Tensor) -> Tensor:
    first = maps[0]
    channels = sum(x.shape[1] for x in maps)
    out = torch.empty(
        (len(first), channels, *first.shape[2:]),
        dtype=first.dtype, device=first.device, memory_format=torch.channels_last,
    )  # fmt: skip
    units, at = _units(out), 0
    for x in maps:
        part = _units(x)
        units[..., at : at + part.shape[-1]] = part
        at += part.shape[-1]
    return out


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, skip: Tensor) -> Tensor:
        ctx.channels = x.shape[1], skip.shape[1]
        return _join(x, skip)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or not _has_units(grad):
            parts = grad.split(ctx.channels, dim=1)
        else:
            units = [channels * grad.element_size() // 16 for channels in ctx.channels]
            parts = [
                part.contiguous().view(grad.dtype).permute(0, 3, 1, 2) if needed else part
                for part, needed in zip(_units(grad).split(units, dim=-1), ctx.needs_input_grad, strict=True)
            ]
        return tuple(part if needed else None for part, needed in zip(parts, ctx.needs_input_grad, strict=True))
