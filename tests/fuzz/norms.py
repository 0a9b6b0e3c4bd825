# SPDX-License-Identifier: Apache-2.0
"""Arguments of the norms and of the gated activation."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor
from torch.nn import functional as F

from fastdistill.ops import geglu, group_norm_silu, layer_norm_modulate, residual_layer_norm_modulate
from tests.fuzz.calls import Call, rounded
from tests.fuzz.tensors import Spec, dtypes, limited, sizes, small_sizes, spec
from tests.ops import test_geglu, test_group_norm_silu, test_layer_norm_modulate
from tests.ops.test_group_norm_silu import over

EPSILONS = st.sampled_from((1e-5, 1e-6, 0.0, 1.0, 0))


def geglu_call(draw: Any) -> Call:
    shape = (*draw(st.lists(small_sizes, max_size=3)), 2 * draw(sizes))
    shape = limited(shape)
    if draw(st.integers(0, 15)) == 15:
        shape = (*shape[:-1], shape[-1] + 1)
    arguments = {"x": spec(draw, shape), "approximate": draw(st.sampled_from(("none", "tanh")))}
    return Call(
        "geglu", lambda x, approximate: (geglu(x, approximate),), arguments, _geglu_truth, eager=test_geglu.eager
    )


def _geglu_truth(x: Tensor, approximate: str) -> tuple[Tensor]:
    """Avoids torch's formula, in which 1 and nearly 1 cancel far below 0."""
    a, g = x.chunk(2, -1)
    if approximate == "tanh":
        return (a * g * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)),)
    return (a * g * torch.special.erfc(-g / math.sqrt(2)) / 2,)


def group_norm_call(draw: Any) -> Call:
    groups, each = draw(st.sampled_from((1, 2, 3, 4))), draw(small_sizes)
    batch, channels = draw(small_sizes), groups * each
    x = spec(draw, (batch, channels, *limited((*draw(st.lists(sizes, max_size=2)), 16))[:-1]))
    small = draw(st.sampled_from((x.dtype, None)))
    arguments: dict[str, Any] = {"x": x, "groups": groups, "eps": draw(EPSILONS), "silu": draw(st.booleans())}
    for name in test_group_norm_silu.NAMES:
        shape = (channels,) if name in ("weight", "bias") else (batch, channels)
        arguments[name] = _given(draw, shape, small)
    if each * math.prod(x.shape[2:]) == 1:  # with one value per group, only the rounding of x + time_bias is left
        arguments["time_bias"] = None

    def function(x: Tensor, weight: Any, bias: Any, groups: Any, eps: Any, **rest: Any) -> tuple[Tensor]:
        return (group_norm_silu(x, weight, bias, groups, eps, **rest),)

    def truth(x: Tensor, groups: int, eps: float, silu: bool, **given: Any) -> tuple[Tensor]:
        weight, bias, time_bias, scale, shift = (
            over(given[name], x, float(name == "weight")) for name in test_group_norm_silu.NAMES
        )
        n = normalized((x + time_bias).unflatten(1, (groups, -1)), eps, range(2, x.dim() + 1)).flatten(1, 2)
        z = rounded(rounded(n * weight + bias) * (1 + scale) + shift)
        return (F.silu(z) if silu else z,)

    def eager(x: Tensor, **given: Any) -> tuple[Tensor]:
        """In float32 with the same formula, because torch's own group norm can crash in its backward."""
        return (truth(x.float(), **given)[0].to(x.dtype),)

    return Call("group_norm_silu", function, arguments, None if 0 in x.shape else truth, eager)


def normalized(u: Tensor, eps: float, over: Any) -> Tensor:
    u, over = rounded(u), tuple(over)
    mean = u.mean(over, keepdim=True)
    kept = rounded(mean)
    d = rounded(u - kept)
    r = rounded((d.square().mean(over, keepdim=True) + eps).rsqrt())
    n = rounded(d * r)
    return n + _Uncentred.apply(u, n.detach(), r.detach(), (kept - mean).detach(), over)


class _Uncentred(torch.autograd.Function):
    """0, with the gradient that a mean which is kept as a float is off by: n is off by as much in all of a row then,
    and so, times mean(dn n), are the gradients r (dn - mean(dn) - n mean(dn n)), which take it for centred."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, n: Tensor, r: Tensor, off: Tensor, over: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(n, r, off)
        ctx.over = over
        return torch.zeros_like(u)

    @staticmethod
    def backward(ctx: Any, dn: Tensor) -> tuple[Tensor | None, ...]:
        n, r, off = ctx.saved_tensors
        error = r * r * off * (dn * n).mean(ctx.over, keepdim=True)
        return torch.where(off == 0, 0.0, error).expand_as(dn), None, None, None, None


def layer_norm_call(draw: Any) -> Call:
    return _layer_norm(draw, False)


def residual_call(draw: Any) -> Call:
    return _layer_norm(draw, True)


def _layer_norm(draw: Any, residual: bool) -> Call:
    batch, channels = draw(small_sizes), draw(sizes)
    x = spec(draw, (batch, *draw(st.lists(small_sizes, max_size=2)), channels))
    small = draw(st.sampled_from((x.dtype, None)))
    names = test_layer_norm_modulate.NAMES if residual else test_layer_norm_modulate.NAMES[1:]
    arguments: dict[str, Any] = {"x": x, "eps": draw(EPSILONS)}
    if residual:
        arguments["h"] = spec(draw, x.shape, x.dtype)
    for name in names:
        middle = draw(st.sampled_from(((), (1,)))) if name not in ("weight", "bias") else ()
        arguments[name] = _given(draw, (channels,) if name in ("weight", "bias") else (batch, *middle, channels), small)

    def function(**given: Any) -> tuple[Tensor, ...]:
        return residual_layer_norm_modulate(**given) if residual else (layer_norm_modulate(**given),)

    stored = torch.finfo(x.dtype).eps

    def truth(x: Tensor, eps: float, h: Any = None, **given: Any) -> tuple[Tensor, ...]:
        gate, scale, shift, weight, bias = (
            test_layer_norm_modulate.over(given.get(name), x, float(name in ("gate", "weight")))
            for name in test_layer_norm_modulate.NAMES
        )
        s = x if h is None else rounded(x + gate * h, least=stored)
        n = normalized(s, eps, (-1,))
        y = rounded(rounded(n * weight + bias) * (1 + scale) + shift)
        return (y,) if h is None else (y, s)

    def eager(x: Tensor, eps: float, h: Any = None, **given: Any) -> tuple[Tensor, ...]:
        return test_layer_norm_modulate.eager(x, h, tuple(map(given.get, test_layer_norm_modulate.NAMES)), eps)

    op = "residual_layer_norm_modulate" if residual else "layer_norm_modulate"
    return Call(op, function, arguments, None if 0 in x.shape else truth, eager)


def _given(draw: Any, shape: tuple[int, ...], dtype: Any) -> Spec | None:
    return spec(draw, shape, dtype or draw(dtypes), scale=0.5) if draw(st.booleans()) else None
