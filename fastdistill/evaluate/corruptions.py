# SPDX-License-Identifier: Apache-2.0
"""Common corruptions of images at five severities, drawn by counter, and a classifier's accuracy under them.

After Hendrycks and Dietterich (1903.12261), whose strengths are for large photographs; these suit small images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastdistill.errors import InputError, described
from fastdistill.evaluate.classification import accuracy, check_images
from fastdistill.ops import _check, philox

SEVERITIES = (1, 2, 3, 4, 5)
#: Strengths by severity: standard deviation of noise relative to the range, size of an occlusion and blur relative to
#: the side, factor of contrast, turns of the hue, and share of the way to another background.
STRENGTHS: dict[str, tuple[float, ...]] = {
    "noise": (0.04, 0.08, 0.12, 0.18, 0.26),
    "blur": (0.05, 0.075, 0.1, 0.125, 0.16),
    "contrast": (0.75, 0.5, 0.35, 0.2, 0.1),
    "occlusion": (0.25, 0.375, 0.5, 0.625, 0.75),
    "hue_shift": (0.1, 0.2, 0.3, 0.4, 0.5),
    "background_swap": (0.2, 0.4, 0.6, 0.8, 1.0),
    "clutter": (0.2, 0.4, 0.6, 0.8, 1.0),
}
CORRUPTIONS = tuple(STRENGTHS)
#: Corruptions that need ``towards``.
TOWARDS = ("background_swap", "clutter")


def corruptions(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    names: Sequence[str] | None = None,
    towards: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    bounds: tuple[float, float] = (-1.0, 1.0),
    batch: int = 512,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, list[float]]:
    """Corruption -> the accuracy of a classifier at each of the five severities.

    model, images, labels: as for ``accuracy``. names: from ``CORRUPTIONS``; None: all that are possible.
        towards: for ``background_swap`` and ``clutter``, the images [n, C, H, W] at severity 5.
        towards: for ``background_swap`` and ``clutter``, what the images [n, C, H, W] are at severity 5.
        seed, bounds: as for ``corrupted``. progress: called with (corruptions done, all).

    Raises:
        InputError: arguments that do not fit, before anything runs.
    """
    check_images(images, bounds=bounds)
    towards = dict(towards or {})
    possible = [
        name for name in CORRUPTIONS if (name in towards) >= (name in TOWARDS) and (name, images.shape[1]) not in _COLOR
    ]
    chosen = possible if names is None else list(names)
    for name in (*chosen, *towards):
        _named(name)
    for name in chosen:
        _counterpart(name, images, towards.get(name), bounds)
    found: dict[str, list[float]] = {}
    for done, name in enumerate(chosen):
        if progress is not None:
            progress(done, len(chosen))
        found[name] = [
            accuracy(
                model,
                corrupted(images, name, severity, seed=seed, bounds=bounds, towards=towards.get(name)),
                labels,
                batch=batch,
            )
            for severity in SEVERITIES
        ]
    if progress is not None:
        progress(len(chosen), len(chosen))
    return found


def corrupted(
    images: Tensor,
    name: str,
    severity: int,
    *,
    seed: int = 0,
    bounds: tuple[float, float] = (-1.0, 1.0),
    towards: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Images [n, C, H, W] float32 with a corruption, clipped to ``bounds``.

    The random numbers depend only on (seed, row), and are the same at every severity.

    Args:
        images: within ``bounds``, the range of their values. name: from ``CORRUPTIONS``. severity: 1 to 5.
        towards: for ``background_swap`` and ``clutter``: the images at severity 5; lower severities interpolate.
        rows: [n] int64, numbers of the images; None: 0 to n - 1.
    """
    _named(name)
    is_one = not isinstance(severity, bool) and severity in SEVERITIES
    _check.require(is_one, "severity", "a whole number from 1 to 5", described(severity))
    _check.seed(seed)
    check_images(images, bounds=bounds)
    _counterpart(name, images, towards, bounds)
    numbers = torch.arange(len(images)) if rows is None else rows
    _check.valued(rows=numbers)
    _check.dtype(numbers, "rows", torch.int64)
    _check.shape(numbers, "rows", (len(images),), f"[{len(images)}], one of each image")
    strength = STRENGTHS[name][severity - 1]
    x = images.detach().float()
    if towards is not None:
        made = x.lerp(towards.detach().to(x), strength)
    else:
        key, step = torch.tensor([seed, CORRUPTIONS.index(name)], device=x.device)
        made = _MAKERS[name](x, strength, bounds, _Draws(key, step, numbers.to(x.device)))
    return made.clamp(*bounds)


class _Draws:
    """The random numbers for each row of a corruption."""

    def __init__(self, key: Tensor, step: Tensor, rows: Tensor) -> None:
        self.key, self.step, self.rows = key, step, rows

    def normal(self, shape: Sequence[int]) -> Tensor:
        return philox.normal(self.key, self.step, self.rows, shape, stream=philox.CORRUPTION)

    def words(self) -> tuple[Tensor, ...]:
        """Four words [n] of each row."""
        block = torch.zeros((), dtype=torch.int64, device=self.rows.device)
        return philox.words(self.key, self.step, self.rows, block, philox.CORRUPTION)


def _noise(x: Tensor, strength: float, bounds: tuple[float, float], draws: _Draws) -> Tensor:
    return x + strength * (bounds[1] - bounds[0]) * draws.normal(x.shape[1:])


def _blur(x: Tensor, strength: float, bounds: tuple[float, float], draws: _Draws) -> Tensor:
    """Gaussian blur, with repeated edges."""
    for side in (2, 3):
        sigma = strength * x.shape[side]
        reach = max(1, math.ceil(3 * sigma))
        kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=x.device) / sigma) ** 2)
        shape = [1, 1, 1, 1]
        shape[side] = len(kernel)
        pad = (0, 0, reach, reach) if side == 2 else (reach, reach, 0, 0)
        weight = (kernel / kernel.sum()).view(shape).expand(x.shape[1], 1, *shape[2:])
        x = nn.functional.conv2d(nn.functional.pad(x, pad, mode="replicate"), weight, groups=x.shape[1])
    return x


def _contrast(x: Tensor, strength: float, bounds: tuple[float, float], draws: _Draws) -> Tensor:
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + strength * (x - mean)


def _occlusion(x: Tensor, strength: float, bounds: tuple[float, float], draws: _Draws) -> Tensor:
    """A rectangle in the middle value of the range; its height and width are ``strength`` times the image's."""
    top, left, _, _ = draws.words()
    inside = torch.ones(len(x), 1, 1, 1, dtype=torch.bool, device=x.device)
    for word, side in ((top, 2), (left, 3)):
        size = max(1, round(strength * x.shape[side]))
        start = philox.below(word, x.shape[side] - size + 1)[:, None]
        place = torch.arange(x.shape[side], device=x.device)
        shape = [len(x), 1, 1, 1]
        shape[side] = x.shape[side]
        inside = inside & ((place >= start) & (place < start + size)).view(shape)
    return x.where(~inside, (bounds[0] + bounds[1]) / 2)


def _hue_shift(x: Tensor, strength: float, bounds: tuple[float, float], draws: _Draws) -> Tensor:
    """Colors rotated around the axis of grays by this share of a circle, in either direction."""
    turn = 2 * math.pi * strength * torch.where(draws.words()[0] < 2**31, 1.0, -1.0)
    cos, sin = turn.cos()[:, None, None], turn.sin()[:, None, None]
    same = torch.eye(3, device=x.device)
    across = (same.roll(1, 0) - same.roll(-1, 0)) / math.sqrt(3)  # the cross product with (1, 1, 1) / sqrt(3)
    return torch.einsum("nij,njhw->nihw", cos * same + sin * across + (1 - cos) / 3, x)


_MAKERS: dict[str, Callable[[Tensor, float, tuple[float, float], _Draws], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "occlusion": _occlusion,
    "hue_shift": _hue_shift,
}
_COLOR = {("hue_shift", 1)}


def _named(name: object) -> None:
    if name not in CORRUPTIONS:
        raise InputError.of("names", f"some of {', '.join(CORRUPTIONS)}", described(name))


def _counterpart(name: str, images: Tensor, towards: Tensor | None, bounds: tuple[float, float]) -> None:
    if name == "hue_shift":
        _check.require(images.shape[1] == 3, "images", "3 channels, for hue_shift", images.shape[1])
    rule = f"images for {' and '.join(TOWARDS)} alone"
    _check.require((towards is not None) == (name in TOWARDS), "towards", rule, f"{described(towards)} for {name}")
    if towards is not None:
        check_images(towards, "towards", images.shape, bounds)
