# SPDX-License-Identifier: Apache-2.0
"""The phase figure: what guidance does to classes, by their dimension and number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdistill.errors import InputError
from fastdistill.evaluate._optional import require
from fastdistill.evaluate.figures import BLUE, GREEN, GRID, INK, MUTED, ORANGE, PURPLE, _figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLES = {
    "two_class": "Two classes",
    "hypercube": "All corners of a cube",
    "random_centres": "Random centres",
}
_NAME = {"fontsize": 8.5, "weight": "bold"}
_COLORS = (BLUE, ORANGE, GREEN, PURPLE)


def phase_picture(worlds: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """A column per world; top: the relative shift of the mean, bottom: the variance divided by the class's own.

    ``two_class`` and ``hypercube`` are drawn over the dimension d, with logarithmic axes and a dashed line through the
    first point of two classes, falling as 1 / sqrt(d); ``random_centres`` over alpha = ln K / d, a line for each d.

    Args:
        worlds: world -> rows with ``dimension``, ``alpha``, ``mean``, ``variance``, ``shift``, ``variance_ratio``,
            ``standard_error`` (``mean``, ``variance``).
    """
    known = {name: rows for name, rows in worlds.items() if name in _TITLES and len(rows)}
    if not known or len(known) < len(worlds):
        raise InputError.of("worlds", f"rows of {', '.join(_TITLES)}", ", ".join(worlds) or "none")
    figure = _figure(3.1 * len(known) + 0.2, 5.0)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(2, len(known), squeeze=False, sharex="col", sharey="row")
    texts = []
    for column, (name, rows) in enumerate(known.items()):
        over_alpha = name == "random_centres"
        dimensions: list[Any] = [None]
        if over_alpha:
            dimensions = sorted({int(row["dimension"]) for row in rows})
        for line, ((key, part), axes) in enumerate(
            zip((("shift", "mean"), ("variance_ratio", "variance")), panels[:, column], strict=True)
        ):
            _style(axes)
            for dimension, color in zip(dimensions, _COLORS * len(dimensions), strict=False):
                chosen = [row for row in rows if dimension in (None, row["dimension"])]
                x, y, error = _curve(chosen, "alpha" if over_alpha else "dimension", key, part)
                joined = "none" if name == "two_class" and key == "shift" else "solid"
                axes.plot(x, y, color=color, linestyle=joined, linewidth=1.6, marker="o", markersize=4.5,
                          markeredgewidth=0, zorder=3)  # fmt: skip
                axes.vlines(x, y - 2 * error, y + 2 * error, color=color, linewidth=1.2, alpha=0.6)
                if dimension is not None and line == 0:
                    place = (0.04, 0.95 - 0.09 * (dimensions[::-1].index(dimension)))
                    axes.annotate(f"d = {dimension}", place, xycoords="axes fraction", color=color, va="top", **_NAME)
            if name == "two_class" and line == 0:
                fine = np.geomspace(x[0], x[-1], 60)
                axes.plot(fine, y[0] * np.sqrt(x[0] / fine), color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
                axes.annotate("1 / √d", (x[-1], y[0] * math.sqrt(x[0] / x[-1])), (-4, 8), textcoords="offset points",
                              color=MUTED, fontsize=8.5, ha="right")  # fmt: skip
            if not over_alpha:
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter(require("matplotlib.ticker").FuncFormatter(lambda v, _: f"{v:g}"))
        panels[0, column].set_title(_TITLES[name], color=INK, fontsize=10, weight="bold", loc="left")
        panels[1, column].set_xlabel("ln K / d" if over_alpha else "dimension d", color=MUTED, fontsize=9)
        x, shift, _ = _curve(rows, "alpha" if over_alpha else "dimension", "shift", "mean")
        _, ratio, _ = _curve(rows, "alpha" if over_alpha else "dimension", "variance_ratio", "variance")
        of = "ln K / d" if over_alpha else "d"
        texts.append(
            f"{_TITLES[name]}: shift {shift[0]:.3f} and variance {ratio[0]:.3f} at {of} = {x[0]:.3g}, "
            f"{shift[-1]:.3f} and {ratio[-1]:.3f} at {x[-1]:.3g}"
        )
    panels[0, 0].set_ylabel("shift of the mean, over the mean", color=MUTED, fontsize=9)
    panels[1, 0].set_ylabel("variance, over that of the class", color=MUTED, fontsize=9)
    panels[0, 0].set_ylim(bottom=min(0.0, panels[0, 0].get_ylim()[0]))
    panels[1, 0].set_ylim(bottom=0)
    figure.set_label("What guidance does to exact classes. " + "; ".join(texts) + ".")
    return figure


def _curve(rows: Sequence[Mapping[str, Any]], over: str, key: str, part: str) -> tuple[Any, Any, Any]:
    """(x, value, standard error), sorted by x."""
    ordered = sorted(rows, key=lambda row: float(row[over]))
    x, y = (np.array([float(row[name]) for row in ordered]) for name in (over, key))
    unit = np.array([float(row[part]) for row in ordered]) / (y + (key == "shift"))  # of the class without guidance
    return x, y, np.array([float(row["standard_error"][part]) for row in ordered]) / unit


def _style(axes: Any) -> None:
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_edgecolor(GRID)
    axes.tick_params(which="both", length=0, colors=MUTED, labelsize=8.5)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
