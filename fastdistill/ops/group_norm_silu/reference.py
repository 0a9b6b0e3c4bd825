# SPDX-License-Identifier: Apache-2.0
"""Group norm, affine maps and SiLU in eager torch: the specification of the op's kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def spread(wanted: int, small: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of weight, bias, time_bias, scale and shift; None if the bit is not set in ``wanted``."""
    held = iter(small)
    return [next(held) if wanted >> i & 1 else None for i in range(5)]


def _over(tensor: Tensor | None, x: Tensor, default: float) -> Tensor:
    """[C] or [B, C] as float32, broadcast over the positions of x [B, C, P]; None: a constant."""
    if tensor is None:
        return torch.full((1, 1, 1), default, dtype=torch.float32, device=x.device)
    return tensor.float().reshape(-1, x.shape[1], 1)


def normalized(u: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """u [B, C, P] minus the means [B, G] of its groups, times rstd [B, G]."""
    groups = mean.shape[1]
    n = (u.reshape(len(u), groups, -1) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    return n.reshape(u.shape)


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    time_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """Fill ``y`` (like x), and ``mean`` and ``rstd`` [B, groups] for the backward; computed in float32.

    u = x + time_bias;  n = (u - mean) rstd;  z = (n weight + bias) (1 + scale) + shift;  y = z sigmoid(z) or z.
    """
    u = x.float().reshape(*x.shape[:2], -1) + _over(time_bias, x, 0.0)
    grouped = u.reshape(len(u), groups, -1)
    mean.copy_(grouped.mean(-1))
    variance = (grouped - mean.unsqueeze(-1)).square().mean(-1)
    rstd.copy_((variance + eps).rsqrt())
    z = normalized(u, mean, rstd) * _over(weight, x, 1.0) + _over(bias, x, 0.0)
    z = z * (1 + _over(scale, x, 0.0)) + _over(shift, x, 0.0)
    y.copy_((z * z.sigmoid() if silu else z).reshape(x.shape))


def group_norm_silu_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    time_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    silu: bool,
    wanted: int,
    dx: Tensor,
    small: Sequence[Tensor],
) -> None:
    """Fill ``dx``, and the gradients of weight, bias, time_bias, scale and shift that the bits of ``wanted`` select.

    dn = dz weight (1 + scale);  du = rstd (dn - mean(dn) - n mean(dn n)), with means over the group.
    """
    u = x.float().reshape(*x.shape[:2], -1) + _over(time_bias, x, 0.0)
    n = normalized(u, mean, rstd)
    w, b, s = _over(weight, x, 1.0), _over(bias, x, 0.0), 1 + _over(scale, x, 0.0)
    dz = grad.float().reshape(*x.shape[:2], -1)
    if silu:
        z = (n * w + b) * s + _over(shift, x, 0.0)
        gate = z.sigmoid()
        dz = dz * (gate * (1 + z * (1 - gate)))
    dn = dz * (w * s)
    zero = torch.zeros_like(mean)
    means = [v.reshape(len(v), groups, -1).mean(-1) for v in (dn, dn * n)]
    du = normalized(dn, means[0], rstd) - normalized(n, zero, rstd * means[1])
    dx.copy_(du.reshape(x.shape))
    ones, products = dz.sum(-1), (dz * n).sum(-1)
    values = (
        (s.squeeze(-1) * products).sum(0),
        (s.squeeze(-1) * ones).sum(0),
        du.sum(-1),
        w.squeeze(-1) * products + b.squeeze(-1) * ones,
        ones,
    )
    for out, value in zip(spread(wanted, small), values, strict=True):
        if out is not None:
            out.copy_(value)
