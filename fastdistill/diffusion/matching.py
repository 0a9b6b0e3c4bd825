# SPDX-License-Identifier: Apache-2.0
"""The table of ``ops.output_match`` with a row per timestep: guidance, conversion of predictions, loss weights.

A model predicts o = p x_0 + q eps, where x_t = a x_0 + b eps (``NoiseSchedule.coefficients``, ``flow_coefficients``).
So any type of prediction follows from any other type and x_t. An error in x_0 becomes an error in the prediction that
is |(a q - b p) / b| times as large.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor

from fastdistill.errors import InputError, described
from fastdistill.ops import _check

if TYPE_CHECKING:
    from fastdistill.diffusion.guidance import Guidance

LossWeighting = Literal["uniform", "snr", "truncated_snr", "min_snr", "sigma_sqrt", "cosmap"]
GAMMA = 5.0  # of min-SNR, as in the paper


def _check_coefficients(coefficients: Tensor, argument: str) -> None:
    _check.valued(**{argument: coefficients})
    if coefficients.dim() != 2 or coefficients.size(1) != 4 or len(coefficients) == 0:
        raise InputError.of(argument, "coefficients [T, 4]", tuple(coefficients.shape))


def _columns(coefficients: Tensor, argument: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """a, b, p, q and the determinant a q - b p, each [T] float64."""
    _check_coefficients(coefficients, argument)
    a, b, p, q = coefficients.detach().to("cpu", torch.float64).unbind(1)
    determinant = a * q - b * p
    flat = (determinant.abs() < 1e-9).nonzero().flatten().tolist()
    if flat:
        rule = f"predictions that determine x_0 (at timestep {flat[0]} the prediction is a multiple of x_t)"
        raise InputError.of(argument, rule, coefficients[flat[0]].tolist())
    return a, b, p, q, determinant


def conversion(student: Tensor, teacher: Tensor) -> Tensor:
    """Conversion of the teacher's prediction to the student's type, float64 [T, 2]: c0 x_t + c1 (teacher's prediction).

    Args:
        student, teacher: coefficients [T, 4] with the same signal and noise, up to the rounding of a float32 table.
    """
    a, b, p, q, determinant = _columns(teacher, "teacher")
    own, theirs = (table[:, :2].to("cpu", torch.float64) for table in (student, teacher))
    if student.shape != teacher.shape or not torch.allclose(own, theirs, rtol=1e-4, atol=1e-6):
        raise InputError("teacher: expected the same signal and noise (columns 0 and 1) as coefficients, got others")
    p_student, q_student = student[:, 2:].to("cpu", torch.float64).unbind(1)
    return torch.stack([p_student * q - q_student * p, q_student * a - p_student * b], 1) / determinant[:, None]


def loss_weights(coefficients: Tensor, weighting: LossWeighting = "uniform", gamma: float = GAMMA) -> Tensor:
    """Loss weights for the mean square error of the prediction that ``coefficients`` describe, float64 [T].

    Args:
        coefficients: [T, 4].
        weighting: ``uniform``: 1. The others are weights for the error of x_0, converted to weights for the prediction:
            ``snr``: SNR = a^2 / b^2, which is 1 for an epsilon prediction. ``truncated_snr``: max(SNR, 1) (Salimans and
            Ho 2022, 2202.00512, section 4). ``min_snr``: min(SNR, gamma) (Hang et al. 2023, 2303.09556, eq. 10), which
            is min(SNR, gamma) / SNR for epsilon and min(SNR, gamma) / (SNR + 1) for v. ``sigma_sqrt`` (sigma^-2) and
            ``cosmap`` (2 / (pi (1 - 2 sigma + 2 sigma^2))) are weights for the prediction of rectified flow (Esser et
            al. 2024, 2403.03206, section 3.1, as in diffusers' training scripts).
        gamma: for ``min_snr``; keep the default for other weightings.

    Raises:
        InputError: an unknown weighting, gamma not finite, not above 0 or without min_snr, a prediction that does not
            determine x_0.
    """
    return named_weights(coefficients, weighting, gamma, "weighting", "gamma")


def named_weights(coefficients: Tensor, weighting: str, gamma: float, argument: str, gamma_argument: str) -> Tensor:
    """``loss_weights``, with these names for weighting and gamma in error messages."""
    _check_weighting(weighting, argument, "")
    _check_gamma(gamma, gamma_argument, [weighting])
    return _weights(coefficients, weighting, float(gamma), argument)


def _check_weighting(weighting: Any, argument: str, others: str) -> None:
    if not isinstance(weighting, str) or weighting not in get_args(LossWeighting):
        raise InputError.of(argument, f"one of {', '.join(get_args(LossWeighting))}{others}", described(weighting))


def _check_gamma(gamma: Any, argument: str, weightings: list[str]) -> None:
    if not isinstance(gamma, numbers.Real) or not 0 < float(gamma) < math.inf:
        raise InputError.of(argument, "a finite number > 0", described(gamma))
    if gamma != GAMMA and "min_snr" not in weightings:
        others = " and ".join(dict.fromkeys(weightings)) or "a tensor"
        raise InputError.of(argument, f"its default {GAMMA} where the weighting is not min_snr but {others}", gamma)


def _weights(coefficients: Tensor, weighting: str, gamma: float, argument: str) -> Tensor:
    if weighting == "uniform":
        return torch.ones(len(coefficients), dtype=torch.float64, device="cpu")
    a, b, _, _, determinant = _columns(coefficients, "coefficients")
    if weighting in ("sigma_sqrt", "cosmap"):
        _, sigma, p, q = coefficients.detach().to("cpu", torch.float64).unbind(1)
        if not bool(((p == -1) & (q == 1) & (sigma > 0)).all()):
            raise InputError.of(argument, f"flow_prediction of a FlowSchedule for {weighting}", "other coefficients")
        return sigma**-2 if weighting == "sigma_sqrt" else 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    of_x0 = {"snr": a**2, "truncated_snr": torch.maximum(a**2, b**2), "min_snr": torch.minimum(a**2, gamma * b**2)}
    return of_x0[weighting] / determinant**2


def limited_weights(coefficients: Tensor, limit: float) -> Tensor:
    """min(1 / (a q - b p)^2, limit), float64 [T]: for epsilon min(1 / abar, limit), for v and flow min(1, limit).

    With the factor 1 / (a q - b p)^2 the loss of every prediction equals that of v, or of rectified flow's velocity.
    Without it, an epsilon loss gives almost no weight to the early steps, where the prompt matters most.
    """
    _check_coefficients(coefficients, "coefficients")
    a, b, p, q = coefficients.detach().to("cpu", torch.float64).unbind(1)
    return (a * q - b * p).square().reciprocal().clamp(max=limit)


def match_table(
    coefficients: Tensor,
    *,
    teacher: Tensor | None = None,
    guidance: float | Tensor | Guidance | Callable[[float], float] = 0.0,
    weights: LossWeighting | Tensor = "uniform",
    task_weights: LossWeighting | Tensor | None = None,
    gamma: float = GAMMA,
) -> Tensor:
    """The table of ``ops.output_match``, float32 [T, 5] on the CPU.

    Its columns: guidance weight, factor of x_t, factor of the teacher's prediction, weight of the output loss, weight
    of the task loss.

    Args:
        coefficients: [T, 4] of the student's prediction.
        teacher: [T, 4] of the teacher's prediction; None: the same type. For another type ``output_match`` needs x_t.
        guidance: w in s_c + w (s_c - s_u), a number, a tensor [T], a ``Guidance`` or a function of t/T. 0 is the
            conditional model; ``guidance_scale`` of diffusers is 1 + w.
        weights, task_weights: weights of the two losses: a ``weighting`` of ``loss_weights`` or a tensor [T].
            task_weights None: as weights.
        gamma: of ``min_snr``.

    Raises:
        InputError: a wrong shape, a value that is not finite, a prediction that does not determine x_0.
    """
    _check_coefficients(coefficients, "coefficients")
    T = len(coefficients)
    if hasattr(guidance, "table"):  # a Guidance; its module is loaded only if needed
        guidance = cast("Guidance", guidance).table(coefficients)
    elif callable(guidance):
        guidance = torch.tensor([guidance(t / T) for t in range(T)], dtype=torch.float64, device="cpu")
    elif not isinstance(guidance, Tensor):
        guidance = torch.full((T,), _check.real(guidance, "guidance"), dtype=torch.float64, device="cpu")
    columns = {"guidance": guidance}
    given = {"weights": weights, "task_weights": weights if task_weights is None else task_weights}
    for name, weighting in given.items():
        if not isinstance(weighting, Tensor):
            _check_weighting(weighting, name, ", or a tensor")
    _check_gamma(gamma, "gamma", [weighting for weighting in given.values() if not isinstance(weighting, Tensor)])
    for name, weighting in given.items():
        columns[name] = weighting if isinstance(weighting, Tensor) else _weights(coefficients, weighting, gamma, name)
    for name, column in columns.items():
        if tuple(column.shape) != (T,):
            raise InputError.of(name, f"one number per timestep, ({T},)", tuple(column.shape))
        if not column.isfinite().all():
            at = int((~column.isfinite()).nonzero()[0])
            raise InputError.of(f"{name}[{at}]", "a finite number", float(column[at]))
    same = torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu").expand(T, 2)
    convert = same if teacher is None else conversion(coefficients, teacher)
    parts = [columns["guidance"], *convert.unbind(1), columns["weights"], columns["task_weights"]]
    return torch.stack([part.to("cpu", torch.float64) for part in parts], 1).float()
