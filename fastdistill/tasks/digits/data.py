# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits of scikit-learn (1,797 real scans, 8x8) in 8 colors: 8 colors x 10 digits = 80 prompts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fastdistill.data.fingerprint import sha256_of_tensors
from fastdistill.errors import FastdistillError

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (1, -1, -1),
    "green": (-1, 1, -1),
    "blue": (-1, -1, 1),
    "yellow": (1, 1, -1),
    "magenta": (1, -1, 1),
    "cyan": (-1, 1, 1),
    "black": (-1, -1, -1),
    "white": (1, 1, 1),
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
UNSEEN_COLORS = ("magenta", "white")
UNSEEN_DIGITS = ("four", "seven")
HELD_OUT = 360  # scans of the 1,797 on which the accuracy of the judge is measured
SHAPE = (3, 8, 8)


@dataclass(frozen=True)
class Prompt:
    """A prompt: ``text`` such as "a red seven"; ``color`` and ``digit`` are indices into COLORS and DIGITS."""

    text: str
    color: int
    digit: int

    @property
    def seen(self) -> bool:
        """Whether the prompt is in the cache: neither its color nor its digit is among the unseen ones."""
        return list(COLORS)[self.color] not in UNSEEN_COLORS and DIGITS[self.digit] not in UNSEEN_DIGITS


PROMPTS = tuple(Prompt(f"a {color} {digit}", c, d) for c, color in enumerate(COLORS) for d, digit in enumerate(DIGITS))
SEEN = tuple(i for i, p in enumerate(PROMPTS) if p.seen)  # 6 colors x 8 digits = 48 prompts
UNSEEN = tuple(i for i, p in enumerate(PROMPTS) if not p.seen)  # the other 32
KINDS = {"seen": SEEN, "unseen": UNSEEN}


@dataclass(frozen=True)
class Scans:
    """``ink``: [n, 8, 8] float32 in [0, 1]. ``digit``: [n] int64."""

    ink: Tensor
    digit: Tensor


@cache
def scans() -> tuple[Scans, Scans]:
    """The training scans (1,437) and the held-out scans (360), split by a fixed permutation."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise FastdistillError("the digits task needs scikit-learn: pip install 'fastdistill[demo]'") from error
    bunch = load_digits()
    ink = torch.tensor(bunch.images, dtype=torch.float32) / 16
    digit = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(ink)))
    kept, held_out = order[:-HELD_OUT], order[-HELD_OUT:]
    return Scans(ink[kept], digit[kept]), Scans(ink[held_out], digit[held_out])


def tints() -> Tensor:
    """Colors of full ink, [8, 3] float32 in the order of COLORS; no ink is 0, mid-gray."""
    return torch.tensor(list(COLORS.values()), dtype=torch.float32)


def tinted(part: Scans) -> tuple[Tensor, Tensor]:
    """Every scan in every color: images [8 n, 3, 8, 8] float32 in [-1, 1], and their rows of PROMPTS [8 n] int64."""
    images = part.ink[None, :, None] * tints()[:, None, :, None, None]
    rows = torch.arange(len(COLORS))[:, None] * len(DIGITS) + part.digit
    return images.reshape(-1, *SHAPE), rows.reshape(-1)


def fingerprint() -> str:
    """SHA-256 of the scans and their split."""
    kept, held_out = scans()
    return sha256_of_tensors(
        {"kept": kept.ink, "kept.digit": kept.digit, "out": held_out.ink, "out.digit": held_out.digit}
    )
