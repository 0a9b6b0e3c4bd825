# SPDX-License-Identifier: Apache-2.0
"""A gated residual, layer norm and modulation in eager torch: the specification of the op's kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def spread(wanted: int, small: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of gate, scale, shift, weight and bias; None if the bit is not set in ``wanted``."""
    held = iter(small)
    return [next(held) if wanted >> i & 1 else None for i in range(5)]


def _over(tensor: Tensor | None, default: float) -> Tensor | float:
    """[D] or [B, D] as float32, broadcast over [B, N, D]; None: a constant."""
    return default if tensor is None else tensor.float().reshape(-1, 1, tensor.shape[-1])


def layer_norm_modulate(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    y: Tensor,
    s: Sequence[Tensor],
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """Fill ``y`` and, if h is given, ``s`` (one tensor), like x; and ``mean`` and ``rstd`` for the backward.

    s = x + gate h;  n = (s - mean(s)) rstd;  y = (n weight + bias) (1 + scale) + shift; computed in float32.
    """
    rows = x.shape[0], -1, x.shape[-1]
    if h is not None:
        s[0].copy_((x.float().reshape(rows) + _over(gate, 1.0) * h.float().reshape(rows)).reshape(x.shape))
        x = s[0]
    value = x.float().reshape(rows)
    middle = value.mean(-1, keepdim=True)
    r = ((value - middle).square().mean(-1, keepdim=True) + eps).rsqrt()
    mean.copy_(middle.reshape(mean.shape))
    rstd.copy_(r.reshape(rstd.shape))
    z = (value - middle) * r * _over(weight, 1.0) + _over(bias, 0.0)
    y.copy_((z * (1 + _over(scale, 0.0)) + _over(shift, 0.0)).reshape(x.shape))


def layer_norm_modulate_backward(
    grad: Tensor,
    grad_s: Tensor | None,
    s: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    wanted: int,
    dx: Tensor,
    dh: Sequence[Tensor],
    small: Sequence[Tensor],
) -> None:
    """Fill ``dx``, ``dh`` if h is given, and the gradients of gate, scale, shift, weight and bias that the bits of
    ``wanted`` select.

    dn = dy weight (1 + scale);  ds = rstd (dn - mean(dn) - n mean(dn n)) + grad_s;  dx = ds, dh = gate ds.
    """
    rows = s.shape[0], -1, s.shape[-1]
    middle, r = mean.reshape(*rows[:2], 1), rstd.reshape(*rows[:2], 1)
    n, dy = (s.float().reshape(rows) - middle) * r, grad.float().reshape(rows)
    w, b, factor = _over(weight, 1.0), _over(bias, 0.0), 1 + _over(scale, 0.0)
    dn = dy * (w * factor)
    ds = r * (dn - dn.mean(-1, keepdim=True) - n * (dn * n).mean(-1, keepdim=True))
    if grad_s is not None:
        ds = ds + grad_s.float().reshape(rows)
    dx.copy_(ds.reshape(s.shape))
    gates = torch.zeros((), device=s.device)
    if h is not None:
        dh[0].copy_((_over(gate, 1.0) * ds).reshape(s.shape))
        gates = (h.float().reshape(rows) * ds).sum(1)
    ones, products = dy.sum(1, keepdim=True), (dy * n).sum(1, keepdim=True)
    values = (
        gates, (w * products + b * ones).squeeze(1), ones.squeeze(1), (factor * products).sum((0, 1)),
        (factor * ones).sum((0, 1)),
    )  # fmt: skip
    for out, value in zip(spread(wanted, small), values, strict=True):
        if out is not None:
            out.copy_(value)
