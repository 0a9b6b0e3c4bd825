# SPDX-License-Identifier: Apache-2.0
"""The optimizer's pass in eager torch: the specification of the op's kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def grad_square_sum(grads: Sequence[Tensor], total: Tensor) -> None:
    """Fill ``total`` (0-dim float64) with the sum of all squares; it is not finite if a gradient is not finite.

    Squares are computed in float32, so a gradient beyond 1.8e19 also makes the sum infinite.
    """
    total.zero_()
    for grad in grads:
        total.add_(grad.float().square().sum(dtype=torch.float64))


def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor],
    copies: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Sequence[Tensor],
    square_sum: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    ema_weight: Tensor | None,
    skipped: Tensor,
    group: Sequence[int],
    hyper: Sequence[float],
    max_norm: float,
    ema_warmup: bool,
    zero_grads: bool,
) -> None:
    """Advance everything by one step, or count it as skipped; see ``csrc/adamw_ema/math.h`` for the equations.

    ``group[i]`` is the group of parameter i; ``hyper`` holds beta1, beta2, eps and weight decay of each group in a row.
    Tensors of ``averages`` or ``copies`` without elements are skipped; an empty list skips all.
    """
    scale = grad_scale.double() if grad_scale is not None else 1.0
    skip = ~square_sum.isfinite() if found_inf is None else ~square_sum.isfinite() | (found_inf != 0)
    factor = ((max_norm / (square_sum.sqrt() / scale + 1e-6)).clamp(max=1.0) / scale).float()

    def write(old: Tensor, new: Tensor) -> None:
        old.copy_(torch.where(skip, old, new.to(old.dtype)))

    for i, (param, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        beta1, beta2, eps, weight_decay = hyper[4 * group[i] : 4 * group[i] + 4]
        rate, t = lr[group[i]].double(), steps[i].double() + 1
        g = grad.float() * factor
        m = exp_avg + (1 - beta1) * (g - exp_avg)
        v = beta2 * exp_avg_sq + (1 - beta2) * g * g
        denominator = v.sqrt() * (1 - beta2**t).rsqrt().float() + eps
        p = param * (1 - rate * weight_decay).float() - (rate / (1 - beta1**t)).float() * (m / denominator)
        for old, new in ((param, p), (exp_avg, m), (exp_avg_sq, v), (steps[i], t)):
            write(old, new)
        if copies and copies[i].numel():
            write(copies[i], p)
        if averages and averages[i].numel() and ema_weight is not None:
            move = torch.maximum(ema_weight, (9 / (9 + t)).float()) if ema_warmup else ema_weight
            write(averages[i], averages[i] + move * (p - averages[i]))
        if zero_grads:
            grad.zero_()
    skipped.add_(skip)
