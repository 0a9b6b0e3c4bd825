# SPDX-License-Identifier: Apache-2.0
"""The digits' scans, each in a tint drawn around its color. Prompts and their embeddings are those of the digits."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fastdistill.data.fingerprint import sha256_of_json
from fastdistill.ops import philox
from fastdistill.tasks.digits import data as digits
from fastdistill.tasks.digits.data import COLORS, DIGITS, SHAPE, Scans

SPREAD = 0.7  # standard deviation of a channel of the tint around that of its color
DRAWS = 10  # tints for each scan in each color
_SEED = 11
_KEPT, _HELD_OUT = 0, 1  # parts of the scans; their tints are from different steps of the generator


def corners(rows: Tensor) -> Tensor:
    """The colors [n, 3] float32, +-1 per channel, of the prompts in these rows of PROMPTS."""
    return digits.tints()[rows.cpu() // len(DIGITS)]


def training() -> tuple[Tensor, Tensor]:
    """Images [8 n DRAWS, 3, 8, 8] float32 of the n training scans, and their rows of PROMPTS [8 n DRAWS] int64."""
    return _shades(digits.scans()[0], _KEPT)


@cache
def held_out() -> tuple[Tensor, Tensor]:
    """The same for the held-out scans: the real images with which a model is compared."""
    return _shades(digits.scans()[1], _HELD_OUT)


@cache
def norm() -> float:
    """Root mean square norm of the training scans' ink: a tint of 1 has this length, 3.9, in an image, and noise of
    sigma in an image is sigma / 3.9 in a tint."""
    return float(digits.scans()[0].ink.double().square().sum((1, 2)).mean().sqrt())


def fingerprint() -> str:
    """Fingerprint of the scans and the rule for tints, whose last bits depend on the processor."""
    made = {"scans": digits.fingerprint(), "spread": SPREAD, "draws": DRAWS, "seed": _SEED}
    return sha256_of_json(made)


def _shades(part: Scans, number: int) -> tuple[Tensor, Tensor]:
    copies = DRAWS * len(COLORS)
    colors = torch.arange(len(COLORS)).repeat_interleave(DRAWS * len(part.ink))
    seed, step = torch.tensor([_SEED, number], device="cpu")
    tints = digits.tints()[colors] + SPREAD * philox.normal(seed, step, torch.arange(len(colors)), SHAPE[:1])
    images = part.ink.repeat(copies, 1, 1)[:, None] * tints[:, :, None, None]
    return images, colors * len(DIGITS) + part.digit.repeat(copies)
