# SPDX-License-Identifier: Apache-2.0
"""What ``ops.output_match`` does at each timestep, as one table: guidance, prediction types, weights of the losses.

A prediction is a combination o = p x_0 + q eps of what x_t = a x_0 + b eps is made of (``NoiseSchedule.coefficients``,
``flow_coefficients``), so one type follows from another and from x_t, and an error of a prediction is an error of x_0
times |b / (a q - b p)|.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from fastdistill.errors import InputError

LossWeighting = Literal["uniform", "snr", "truncated_snr", "min_snr"]


def _columns(coefficients: Tensor, argument: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """a, b, p, q and the determinant a q - b p, float64."""
    if coefficients.dim() != 2 or coefficients.size(1) != 4 or len(coefficients) == 0:
        raise InputError.of(argument, "coefficients [T, 4]", tuple(coefficients.shape))
    a, b, p, q = coefficients.detach().to("cpu", torch.float64).unbind(1)
    determinant = a * q - b * p
    flat = (determinant.abs() < 1e-9).nonzero().flatten().tolist()
    if flat:
        rule = f"predictions that x_0 follows from (at timestep {flat[0]} x_t and the prediction say the same)"
        raise InputError.of(argument, rule, coefficients[flat[0]].tolist())
    return a, b, p, q, determinant


def conversion(student: Tensor, teacher: Tensor) -> Tensor:
    """float64 [T, 2]: the student's kind of prediction = c0 x_t + c1 (the teacher's).

    Args:
        student, teacher: [T, 4] coefficients of the two, with the same signal and noise.
    """
    a, b, p, q, determinant = _columns(teacher, "teacher")
    if student.shape != teacher.shape or not torch.equal(student[:, :2].cpu(), teacher[:, :2].cpu()):
        raise InputError("teacher: expected the signal and noise of coefficients, the first two columns, got others")
    p_student, q_student = student[:, 2:].to("cpu", torch.float64).unbind(1)
    return torch.stack([p_student * q - q_student * p, q_student * a - p_student * b], 1) / determinant[:, None]


def loss_weights(coefficients: Tensor, weighting: LossWeighting = "uniform", gamma: float = 5.0) -> Tensor:
    """float64 [T]: weights of a mean square error of the prediction that ``coefficients`` describe.

    ``uniform``: 1. The others are weights of the error of x_0, carried over to the prediction: ``snr`` is
    a^2 / b^2 (1 for an epsilon prediction), ``truncated_snr`` max(SNR, 1) (Salimans and Ho 2022, 2202.00512, section
    4), ``min_snr`` min(SNR, gamma) (Hang et al. 2023, 2303.09556, eq. 10: for epsilon min(SNR, gamma) / SNR, for v
    min(SNR, gamma) / (SNR + 1)).
    """
    if weighting not in get_args(LossWeighting):
        raise InputError.of("weights", f"one of {', '.join(get_args(LossWeighting))}, or a tensor", repr(weighting))
    if not gamma > 0:
        raise InputError.of("gamma", "a number > 0", gamma)
    if weighting == "uniform":
        return torch.ones(len(coefficients), dtype=torch.float64, device="cpu")
    a, b, _, _, determinant = _columns(coefficients, "coefficients")
    of_x0 = {"snr": a**2, "truncated_snr": torch.maximum(a**2, b**2), "min_snr": torch.minimum(a**2, gamma * b**2)}
    return of_x0[weighting] / determinant**2


def match_table(
    coefficients: Tensor,
    *,
    teacher: Tensor | None = None,
    guidance: float | Tensor | Callable[[float], float] = 0.0,
    weights: LossWeighting | Tensor = "uniform",
    task_weights: LossWeighting | Tensor | None = None,
    gamma: float = 5.0,
) -> Tensor:
    """float32 [T, 5] for ``ops.output_match``: guidance, from x_t, from the teacher, output weight, task weight.

    Args:
        coefficients: [T, 4] of the student's prediction.
        teacher: [T, 4] of the teacher's; None: the same. Where they differ, ``output_match`` needs ``x_t``.
        guidance: w of s_c + w (s_c - s_u): 0 is the conditional model, diffusers' ``guidance_scale`` is 1 + w. A
            number, [T] of them, or a function of t/T.
        weights, task_weights: of the two losses at each timestep: a name of ``loss_weights`` or [T]. task_weights None:
            as weights.
        gamma: of ``min_snr``.
    """
    T = len(coefficients)
    if callable(guidance):
        guidance = torch.tensor([guidance(t / T) for t in range(T)], dtype=torch.float64, device="cpu")
    elif not isinstance(guidance, Tensor):
        guidance = torch.full((T,), guidance, dtype=torch.float64, device="cpu")
    columns = {"guidance": guidance}
    for name, given in {"weights": weights, "task_weights": weights if task_weights is None else task_weights}.items():
        columns[name] = given if isinstance(given, Tensor) else loss_weights(coefficients, given, gamma)
    for name, column in columns.items():
        if tuple(column.shape) != (T,):
            raise InputError.of(name, f"one number a timestep ({T},)", tuple(column.shape))
        if not column.isfinite().all():
            at = int((~column.isfinite()).nonzero()[0])
            raise InputError.of(f"{name}[{at}]", "a finite number", float(column[at]))
    same = torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu").expand(T, 2)
    convert = same if teacher is None else conversion(coefficients, teacher)
    parts = [columns["guidance"], *convert.unbind(1), columns["weights"], columns["task_weights"]]
    return torch.stack([part.to("cpu", torch.float64) for part in parts], 1).float()
