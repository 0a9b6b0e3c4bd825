# SPDX-License-Identifier: Apache-2.0
"""Conversion of a prediction to x_0 and eps."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.diffusion.schedule import PredictionType, check_prediction_type, targets


def clean_and_noise(
    x: Tensor, out: Tensor, signal: float, noise: float, prediction_type: PredictionType
) -> tuple[Tensor, Tensor]:
    """(x_0, eps) of a state x = signal x_0 + noise eps and a prediction out = p x_0 + q eps.

    With a = signal, b = noise they are (q x - b out) / (a q - b p) and (a out - p x) / (a q - b p); no level is a
    special case.
    """
    a, b = signal, noise
    p, q = _parts(prediction_type, a, b)
    determinant = a * q - b * p
    return (q * x - b * out) / determinant, (a * out - p * x) / determinant


def determines(prediction_type: PredictionType, signal: float, noise: float) -> bool:
    """Whether x_0 follows from a prediction at this level: not from eps if there is no signal."""
    p, q = _parts(check_prediction_type(prediction_type), signal, noise)
    return signal * q - noise * p != 0


def _parts(kind: PredictionType, signal: float, noise: float) -> tuple[float, float]:
    """(p, q) of a prediction p x_0 + q eps."""
    level = torch.tensor([signal, noise], dtype=torch.float64, device="cpu")
    p, q = targets(*level.unbind())[kind]
    return float(p), float(q)
