# SPDX-License-Identifier: Apache-2.0
"""Determines the tint and the ink of an image, and whether they match its prompt."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdistill.tasks.digits.data import DIGITS
from fastdistill.tasks.digits.judge import Judge
from fastdistill.tasks.shades.data import corners

_DARKEST = 5  # pixels that define full ink


class Shades(NamedTuple):
    """tint: [n, 3] float64, the color at full ink. ink: [n, 8, 8] float64 in [0, 1]."""

    tint: Tensor
    ink: Tensor


class Right(NamedTuple):
    """[n] bool each: the sign of every channel of the tint is the color's; the digit is the prompt's."""

    color: Tensor
    digit: Tensor


def read(images: Tensor) -> Shades:
    """Tint and ink of images [n, 3, 8, 8]: the best product of the two (the first singular vectors of [64, 3] pixels).

    The ink is mainly positive, and the mean of its five darkest pixels is 1 (the darkest pixel alone would be the one
    with the most noise). The darkest pixel of scans is 1, so their tint becomes 1.4 % smaller.
    """
    pixels = images.detach().to("cpu", torch.float64).flatten(2)  # [n, 3, 64]
    direction = torch.linalg.eigh(pixels @ pixels.mT).eigenvectors[..., -1]
    ink = torch.einsum("ncp,nc->np", pixels, direction)
    sign = torch.where(ink.sum(1, keepdim=True) < 0, -1.0, 1.0)
    full = (sign * ink).topk(_DARKEST, 1).values.mean(1, keepdim=True)
    shares = torch.where(full > 0, sign * ink / full, 0.0).clamp(0, 1)
    return Shades(sign * full * direction, shares.reshape(-1, *images.shape[2:]))


def right(judge: Judge, images: Tensor, rows: Tensor) -> Right:
    """Whether the images [n, 3, 8, 8] match the prompts in these rows [n] of PROMPTS."""
    found = read(images)
    color = (found.tint.sign() == corners(rows)).all(1)
    return Right(color, judge.digits(found.ink) == rows.cpu() % len(DIGITS))
