# SPDX-License-Identifier: Apache-2.0
"""Figures of canonical images and of the directions that are projected out of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fastdistill.errors import InputError
from fastdistill.evaluate.figures import BLUE, GRID, INK, MUTED, _cell, _figure, _images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = 8  # directions


def canonical_figure(images: dict[str, Tensor], directions: Tensor, values: Sequence[float], title: str = "") -> Figure:
    """Images beside each other, above the first eight directions and all singular values.

    Args:
        images: name -> [C, H, W] in [0, 1] (clipped), C 1 or 3.
        directions: [k, C, H, W]; gray is 0, and each is scaled to its largest value.
        values: k singular values, descending; drawn divided by the first.
    """
    if not images or len(directions) != len(values):
        raise InputError.of("values", f"{len(directions)} values of as many directions", len(values))
    shown = directions[:_SHOWN]
    cell, gap, small, top, named = 1.5, 0.3, 0.78, 0.42 if title else 0.1, 0.3
    width = max(len(images) * (cell + gap) + 2.9, _SHOWN * (small + 0.12)) + 0.3
    height = top + cell + named + (small + named + 0.35 if len(shown) else 0) + 0.1
    figure = _figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    if title:
        axes.text(0.15, 0.2, title, color=INK, va="center", fontsize=10, weight="bold")
    for place, (name, image) in enumerate(images.items()):
        x = 0.15 + place * (cell + gap)
        _cell(axes, _images(f"images[{name!r}]", image[None], 1)[0], x, top, cell, wrong=False)
        axes.text(x + cell / 2, top + cell + 0.17, name, color=MUTED, ha="center", va="center", fontsize=9)
    if len(shown):
        below = top + cell + named + 0.3
        peak = shown.abs().flatten(1).amax(1).clamp(min=1e-30).view(-1, *[1] * (shown.ndim - 1))
        pictures = _images("directions", 0.5 + shown / peak / 2, len(shown))
        axes.text(0.15, below - 0.13, "directions, and their singular values", color=INK, va="center", fontsize=9)
        for place, picture in enumerate(pictures):
            x = 0.15 + place * (small + 0.12)
            _cell(axes, picture, x, below, small, wrong=False)
            said = f"{values[place]:.3g}"
            axes.text(x + small / 2, below + small + 0.14, said, color=MUTED, ha="center", va="center", fontsize=8)
        left = 0.15 + len(images) * (cell + gap) + 0.35
        _spectrum(figure, values, (left / width, 1 - (top + cell) / height, 2.4 / width, cell / height))
    names = ", ".join(images)
    told = ", ".join(f"{value:.3g}" for value in values[:_SHOWN])
    figure.set_label(f"{title}. {names}. Singular values: {told or 'none'}.".lstrip(". "))
    return figure


def _spectrum(figure: Figure, values: Sequence[float], box: tuple[float, float, float, float]) -> None:
    axes = figure.add_axes(box, facecolor="none")
    shares = [value / values[0] if values[0] else 0.0 for value in values]
    axes.bar(range(1, len(shares) + 1), shares, color=BLUE, width=0.8)
    axes.set(ylim=(0, 1.02), xlim=(0.4, len(shares) + 0.6))
    axes.set_xticks([1, *range(5, len(shares) + 1, 5)] if len(shares) > 4 else range(1, len(shares) + 1))
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_edgecolor(GRID)
    axes.tick_params(which="both", length=0, colors=MUTED, labelsize=7.5)
    axes.set_title("singular value / the largest", color=MUTED, fontsize=8.5, loc="left", pad=3)
