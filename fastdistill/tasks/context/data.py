# SPDX-License-Identifier: Apache-2.0
"""The digits' scans, each before a background: x = (1 - ink) background + 0.95 ink.

A background is a hue, whose color is 0.6 cos 2 pi (hue - c / 3) in channel c, plus two waves of one period an image,
each of a hue of its own. Colors have no gray part: the mean over the channels shows the ink alone.
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
INK = 0.95  # of full ink, in each channel
CHROMA, WAVE, WAVES = 0.6, 0.15, 2  # amplitudes of the hue and of each wave
OWN = 0.95  # part of the classifier's images whose hue is that of their digit
SWAP = 3  # an image of another digit's hue has that of digit + 3
DRAWS = 10  # backgrounds of each scan in the broad data
_SEED = 15
_STUDENTS, _BROAD, _HELD_OUT = range(3)  # steps of the generator
_DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))  # periods of a wave down and across


@dataclass(frozen=True)
class Scenes:
    """images: [n, 3, 8, 8] float32 in [-1, 1]. digit: [n] int64, also the row of the prompt in PROMPTS. hue: [n]
    float32 in [0, 1). ink: [n, 8, 8] float32 in [0, 1]. scan: [n] int64, which of the scans of its part it shows."""

    images: Tensor
    digit: Tensor
    hue: Tensor
    ink: Tensor
    scan: Tensor


def own_hue(digit: Tensor) -> Tensor:
    """The hue [n] float32 that goes with a digit [n] in a classifier's data: tenths of the circle."""
    return digit.float() / len(DIGITS)


@cache
def students() -> Scenes:
    """The data of classifiers: each of the 1,437 training scans before one background, in 95 % of its digit's hue."""
    part = digits.scans()[0]
    return _scenes(part, torch.arange(len(part.ink)), _STUDENTS, "same")


@cache
def broad() -> Scenes:
    """The data of the broad teacher: each training scan before DRAWS backgrounds of any hue, whatever its digit."""
    part = digits.scans()[0]
    return _scenes(part, torch.arange(len(part.ink)).repeat(DRAWS), _BROAD, "independent")


@cache
def held_out(kind: str) -> Scenes:
    """The 360 held-out scans; all kinds have the same waves.

    kind: ``same``: hues as in ``students``. ``independent``: any hue. ``swapped``: the hue of digit + 3. ``clutter``:
    as ``same``, with waves twice as high.
    """
    if kind not in HELD_OUT:
        raise InputError.of("kind", f"one of {', '.join(HELD_OUT)}", repr(kind))
    part = digits.scans()[1]
    return _scenes(part, torch.arange(len(part.ink)), _HELD_OUT, kind)


@cache
def fingerprint() -> str:
    """Of the scans and of how the backgrounds are drawn; their last bits depend on the processor."""
    numbers = {"ink": INK, "chroma": CHROMA, "wave": WAVE, "waves": WAVES, "own": OWN, "swap": SWAP, "draws": DRAWS}
    return sha256_of_json({"scans": digits.fingerprint(), **numbers, "seed": _SEED})


def colors(hue: Tensor) -> Tensor:
    """Colors [n, 3] of amplitude 1 of hues [n]; each is 0 in the mean over its channels."""
    return torch.cos(2 * math.pi * (hue[:, None] - torch.arange(3) / 3))


def backgrounds(hue: Tensor, rows: Tensor, number: int, clutter: float = 1.0) -> Tensor:
    """[n, 3, 8, 8] of hues [n]; the waves are those of rows [n] in step ``number`` of the generator."""
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
    """Images [n, 3, 8, 8] of ink [n, 8, 8] before backgrounds [n, 3, 8, 8], cut off at -1 and 1, which only the waves
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
