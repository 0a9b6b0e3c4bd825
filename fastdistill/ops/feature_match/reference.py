# SPDX-License-Identifier: Apache-2.0
"""Feature matching in eager torch: the specification of the op's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

MSE, NORMALIZED_MSE, HUBER, COSINE = range(4)
Distance = Literal["mse", "normalized_mse", "huber", "cosine"]
DISTANCES: dict[str, int] = {name: number for number, name in enumerate(get_args(Distance))}


def distance_and_gradient(student: Tensor, teacher: Tensor, distance: int, parameter: float) -> tuple[Tensor, Tensor]:
    """One tap's distance (0-dim) and its gradient with respect to the student, in the dtype of the arguments.

    mse: mean((s - t)^2).  normalized_mse: mean((s - t)^2) / (mean(t^2) + parameter).
    huber: mean(c (s - t - c / 2)) with c = s - t clamped to +-parameter.
    cosine: mean over the first dimension of 1 - s.t / (max(|s|, parameter) max(|t|, parameter)).
    """
    if distance == COSINE and student.numel():
        return _cosine(student, teacher, parameter)
    count = max(student.numel(), 1)  # an empty tap has distance 0
    difference = student - teacher
    if distance == HUBER:
        clamped = difference.clamp(-parameter, parameter)
        return (clamped * (difference - 0.5 * clamped)).sum() / count, clamped / count
    scale = 1.0 / count if distance == MSE else 1.0 / (count * (teacher.square().sum() / count + parameter))
    return difference.square().sum() * scale, difference * (2.0 * scale)


def _cosine(student: Tensor, teacher: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    s, t = student.flatten(1), teacher.flatten(1)
    norm = s.norm(dim=1, keepdim=True)
    s_norm, t_norm = norm.clamp(min=eps), t.norm(dim=1, keepdim=True).clamp(min=eps)
    cosine = (s * t).sum(1, keepdim=True) / (s_norm * t_norm)
    gradient = torch.where(norm < eps, 0.0, cosine / s_norm.square()) * s - t / (s_norm * t_norm)
    return (1.0 - cosine).mean(), (gradient / len(s)).view(student.shape)


def feature_match(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weights: Tensor,
    grad_scale: Tensor,
    distance: int,
    parameter: float,
    loss: Tensor,
    taps: Tensor,
    grads: Sequence[Tensor],
) -> None:
    """Fill ``loss`` and ``taps``, and ``grads`` unless it is empty; accumulates in float32."""
    for tap, (s, t) in enumerate(zip(student, teacher, strict=True)):
        value, gradient = distance_and_gradient(s.float(), t.float(), distance, parameter)
        taps[tap].copy_(value)
        if grads:
            grads[tap].copy_(gradient * (grad_scale * weights[tap]))
    loss.copy_(torch.dot(weights, taps))


def scale_gradients(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply in place by a device scalar."""
    for gradient in grads:
        gradient.mul_(factor)
