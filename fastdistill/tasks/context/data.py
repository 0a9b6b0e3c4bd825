# SPDX-License-Identifier: Apache-2.0
"""The digits' scans, each on a background: x = (1 - ink) background + 0.95 ink.

A background is a hue, with color 0.6 cos 2 pi (hue - c / 3) in channel c, plus two waves with one period per image,
each with its own hue. Colors have no gray part: the mean over the channels shows only the ink.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fastdistill.data.fingerprint import sha256_of_json
from fastdistill.errors import InputError
from fastdistill.ops import philox
from fastdistill.tasks.digits import data as digits
from fastdistill.tasks.digits.data import DIGITS as DIGITS
from fastdistill.tasks.digits.data import SHAPE as SHAPE

PROMPTS = tuple(f"a {digit}" for digit in DIGITS)
HELD_OUT = ("same", "independent", "swapped", "clutter")
INK = 0.95  # value of full ink, in each channel
CHROMA, WAVE, WAVES = 0.6, 0.15, 2  # amplitudes of the hue and of each wave
OWN = 0.95  # share of the classifier's images with the hue of their digit
SWAP = 3  # the hue of another digit is that of digit + SWAP
DRAWS = 10  # backgrounds for each scan in the broad data
_SEED = 15
_STUDENTS, _BROAD, _HELD_OUT = range(3)  # steps of the generator
_DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))  # periods of a wave down and across


@dataclass(frozen=True)
class Scenes:
    """images: [n, 3, 8, 8] float32 in [-1, 1]. digit: [n] int64, also the row of the prompt in PROMPTS. hue: [n]
    float32 in [0, 1). ink: [n, 8, 8] float32 in [0, 1]. scan: [n] int64, the number of the scan in its part of the
    data."""

    images: Tensor
    digit: Tensor
    hue: Tensor
    ink: Tensor
    scan: Tensor


def own_hue(digit: Tensor) -> Tensor:
    """The hue [n] float32 of a digit [n] in a classifier's data: digit / 10 of the circle."""
    return digit.float() / len(DIGITS)


@cache
def students() -> Scenes:
    """The data of classifiers: each of the 1,437 training scans on one background, 95 % with their digit's hue."""
    part = digits.scans()[0]
    return _scenes(part, torch.arange(len(part.ink)), _STUDENTS, "same")


@cache
def broad() -> Scenes:
    """The data of the broad teacher: each training scan on DRAWS backgrounds of any hue."""
    part = digits.scans()[0]
    return _scenes(part, torch.arange(len(part.ink)).repeat(DRAWS), _BROAD, "independent")


@cache
def held_out(kind: str) -> Scenes:
    """The 360 held-out scans on backgrounds; all kinds have the same waves.

    kind: ``same``: hues as in ``students``. ``independent``: any hue. ``swapped``: the hue of digit + 3. ``clutter``:
    like ``same``, but the amplitude of the waves is doubled.
    """
    if kind not in HELD_OUT:
        raise InputError.of("kind", f"one of {', '.join(HELD_OUT)}", repr(kind))
    part = digits.scans()[1]
    return _scenes(part, torch.arange(len(part.ink)), _HELD_OUT, kind)


@cache
def fingerprint() -> str:
    """Fingerprint of the scans and the rule for backgrounds, whose last bits depend on the processor."""
    numbers = {"ink": INK, "chroma": CHROMA, "wave": WAVE, "waves": WAVES, "own": OWN, "swap": SWAP, "draws": DRAWS}
    return sha256_of_json({"scans": digits.fingerprint(), **numbers, "seed": _SEED})


def colors(hue: Tensor) -> Tensor:
    """Colors [n, 3] with amplitude 1 for hues [n]; the mean over the channels is 0."""
    return torch.cos(2 * math.pi * (hue[:, None] - torch.arange(3) / 3))


def backgrounds(hue: Tensor, rows: Tensor, number: int, clutter: float = 1.0) -> Tensor:
    """[n, 3, 8, 8] for hues [n]; the waves are those of rows [n] in step ``number`` of the generator."""
    height, width = SHAPE[1:]
    made = CHROMA * colors(hue)[:, :, None, None].expand(-1, -1, height, width)
    down, across = torch.arange(height)[:, None] / height, torch.arange(width) / width
    directions = torch.tensor(_DIRECTIONS)
    for wave in range(WAVES):
        which, phase, own, _ = _words(rows, number, 1 + wave)
        periods = directions[philox.below(which, len(directions))][:, :, None, None]
        turn = periods[:, 0] * down + periods[:, 1] * across + philox.uniform(phase)[:, None, None]
        color = colors(philox.uniform(own))[:, :, None, None]
        made = made + clutter * WAVE * color * torch.cos(2 * math.pi * turn)[:, None]
    return made


def composed(ink: Tensor, background: Tensor) -> Tensor:
    """Images [n, 3, 8, 8] of ink [n, 8, 8] on backgrounds [n, 3, 8, 8], clipped to [-1, 1], a limit that only the waves
    of clutter reach."""
    return ((1 - ink[:, None]) * background + INK * ink[:, None]).clamp(-1, 1)


def _scenes(part: digits.Scans, scan: Tensor, number: int, kind: str) -> Scenes:
    rows = torch.arange(len(scan))
    digit, ink = part.digit[scan], part.ink[scan]
    chance, any_hue, _, _ = _words(rows, number, 0)
    hue = philox.uniform(any_hue)
    if kind == "swapped":
        hue = own_hue((digit + SWAP) % len(DIGITS))
    elif kind != "independent":
        hue = torch.where(chance < int(OWN * 2**32), own_hue(digit), hue)
    images = composed(ink, backgrounds(hue, rows, number, 2.0 if kind == "clutter" else 1.0))
    return Scenes(images, digit, hue, ink, scan)


def _words(rows: Tensor, number: int, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    seed, step, block_ = torch.tensor([_SEED, number, block], device="cpu")
    return philox.words(seed, step, rows, block_, philox.NOISE)
