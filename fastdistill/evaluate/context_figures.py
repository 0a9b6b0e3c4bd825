# SPDX-License-Identifier: Apache-2.0
"""Figures of canonical latents: canonical images, what settings remove, and the students that learn from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdistill.errors import InputError
from fastdistill.evaluate._optional import require
from fastdistill.evaluate.context import named
from fastdistill.evaluate.figures import (
    BLUE,
    GREEN,
    GRID,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    RED,
    _axes,
    _cell,
    _end_labels,
    _figure,
    _images,
    label,
)
from fastdistill.evaluate.lettering import Lettering

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Colors of students in figures; others are gray.
STUDENTS = {"cadistill": BLUE, "plain": ORANGE, "augment": GREEN, "samples": PURPLE, "random": RED}
_TAPS = (BLUE, ORANGE, GREEN, PURPLE, RED, INK)
_MARKERS = ("o", "s", "D", "^", "v")


def canonical_pairs(originals: Any, canonical: Any, classes: Sequence[str]) -> Figure:
    """For each class two original images above their canonical images.

    Args:
        originals, canonical: [2 K, C, H, W], values in [0, 1] (clipped): two images of each of the K classes, class by
            class.
        classes: their K names.
    """
    count = len(classes)
    if not count:
        raise InputError.of("classes", "at least one name", "none")
    rows = {
        "originals": _images("originals", originals, 2 * count),
        "canonical": _images("canonical", canonical, 2 * count),
    }
    cell, gap, between, left, header = 0.44, 0.04, 0.15, 0.82, 0.3  # inches
    width = left + count * (2 * (cell + gap) + between)
    height = header + 2 * (cell + gap) + 0.08
    figure = _figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    lettering = Lettering(classes)
    style = {"fontsize": 9, **lettering.style}
    for place, name in enumerate(classes):
        x = left + place * (2 * (cell + gap) + between)
        text, *_ = lettering.fit(name, 2 * cell + gap + between - 0.04, 1, **style)
        axes.text(x + cell + gap / 2, header - 0.08, text, color=MUTED, ha="center", va="bottom", **style)
        for line, stack in enumerate(rows.values()):
            for column in (0, 1):
                at = (x + column * (cell + gap), header + line * (cell + gap))
                _cell(axes, stack[2 * place + column], *at, cell, wrong=False)
    for line, name in enumerate(rows):
        axes.text(0.02, header + line * (cell + gap) + cell / 2, label(name), color=INK, fontsize=9.5, va="center")
    figure.set_label(f"Two images of each of {', '.join(classes)}, and beneath each its canonical sample.")
    return figure


def removal_plane(sweep: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> Figure:
    """The share of irrelevant variance over the share of relevant variance that each setting removes: a color for each
    tap, a marker for each t_e, larger for more directions.

    sweep, chosen: as for ``write_context_report``; settings without both measures are left out.
    """
    rows = [row for row in sweep if row["k"] and row["irrelevant_removed"] is not None]
    if not rows:
        raise InputError.of("sweep", "settings with directions and measures", "none")
    figure, axes = _axes(9.0, 5.2)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    taps = list(dict.fromkeys(row["tap"] for row in rows))
    times = sorted({row["t_e"] for row in rows})
    most = max(row["k"] for row in rows)
    ends = [end for row in rows for end in (row["relevant_removed"], row["irrelevant_removed"])]
    low, high = min(0.0, *ends), max(1.0, *ends)
    axes.plot([low, high], [low, high], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    randoms = [row.get("details", {}).get("random") or {} for row in rows]
    x, y = (
        [r[name] for r in randoms if r.get(name) is not None] for name in ("relevant_removed", "irrelevant_removed")
    )
    axes.plot(x, y, "o", color=MUTED, markersize=3.5, markeredgewidth=0, zorder=2)
    for row in rows:
        color = _TAPS[taps.index(row["tap"]) % len(_TAPS)]
        marker = _MARKERS[times.index(row["t_e"]) % len(_MARKERS)]
        size = 4.5 + 5 * (row["k"] / most) ** 0.5
        at = (row["relevant_removed"], row["irrelevant_removed"])
        axes.plot(*at, marker, color=color, markersize=size, markeredgewidth=0, alpha=0.9, zorder=3)
    at = (chosen["relevant_removed"], chosen["irrelevant_removed"])
    axes.plot(*at, "o", markerfacecolor="none", markeredgecolor=INK, markersize=16, markeredgewidth=1.6, zorder=4)
    handles = [
        axes.plot([], [], "o", color=_TAPS[i % len(_TAPS)], markersize=7, label=tap)[0] for i, tap in enumerate(taps)
    ]
    for i, time in enumerate(times):
        handles += axes.plot([], [], _MARKERS[i % len(_MARKERS)], color=MUTED, markersize=6, label=f"t_e {time}")
    handles += axes.plot([], [], "o", color=MUTED, markersize=3.5, label="random directions") if x else []
    axes.legend(handles=handles, frameon=False, fontsize=8.5, labelcolor=INK, loc="lower right", ncols=2)
    axes.set_xlabel("variance of the ink removed (smaller is better)", color=MUTED, fontsize=9)
    axes.set_ylabel("variance of the hue removed (larger is better)", color=MUTED, fontsize=9)
    axes.margins(0.05)
    told = f"Hue and ink removed by {len(rows)} settings. Chosen: {at[1]:.0%} of the hue with {at[0]:.0%} of the ink"
    if x:
        told += f"; random directions: {min(y):.0%} to {max(y):.0%} of the hue with {min(x):.0%} to {max(x):.0%}"
    figure.set_label(told + ".")
    return figure


def attack_curves(students: Mapping[str, Mapping[str, Any]], masking: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The accuracy of students under APGD over epsilon, starting at the accuracy without an attack.

    students, masking: as for ``write_context_report``. Students with ``epsilon`` and ``apgd`` in masking are drawn.
    """
    figure, axes = _axes(9.0, 4.2)
    ends, texts = [], []
    for kind, found in masking.items():
        if not found.get("epsilon") or not found.get("apgd"):
            continue
        x = [0.0, *found["epsilon"]]
        figures = [students[kind]["independent"], *found["apgd"]]
        color = STUDENTS.get(kind, MUTED)
        y = _banded(axes, x, figures, color, dashed=bool(found.get("failed")), thin=kind not in STUDENTS)
        if kind in STUDENTS:
            ends.append((y[0], kind, color, 0.0))
        told = ", ".join(f"{100 * value:.0f} % at {radius:g}" for radius, value in zip(x, y, strict=True))
        texts.append(f"{named(kind)}: {told}")
    if not texts:
        raise InputError.of("masking", "a student with epsilon and apgd", "none")
    radii = sorted({radius for found in masking.values() for radius in found.get("epsilon", [])})
    axes.set_xticks([0, *radii], [f"{radius:g}" for radius in (0, *radii)])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("epsilon", color=MUTED, fontsize=9)
    axes.set_ylabel("right, hue of any class, %", color=MUTED, fontsize=9)
    axes.legend(handles=_names(axes, [name for _, name, *_ in ends]), frameon=False, fontsize=8.5, labelcolor=INK)
    figure.set_label("Accuracy over epsilon. " + "; ".join(texts) + ".")
    return figure


def fraction_curve(fraction: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracies of CaDistill over the share of the data with canonical images, on a logarithmic axis."""
    rows = sorted(fraction, key=lambda row: float(row["share"]))
    if not rows:
        raise InputError.of("fraction", "at least one share", "none")
    figure, axes = _axes(9.0, 3.6)
    x = [100 * row["share"] for row in rows]
    ends, texts = [], []
    for name, color, words in (("independent", BLUE, "hue of any class"), ("apgd", ORANGE, "under APGD")):
        y = _banded(axes, x, [row[name] for row in rows], color)
        ends.append((100 * y[-1], words, color, x[-1]))
        texts.append(f"{words}: " + ", ".join(f"{value:.3f} at {at:g} %" for at, value in zip(x, y, strict=True)))
    axes.set_xscale("log")
    axes.set_xticks(x, [f"{at:g}" for at in x])
    axes.minorticks_off()
    axes.set_xlabel("per cent of the data with canonical images", color=MUTED, fontsize=9)
    axes.set_ylabel("right, %", color=MUTED, fontsize=9)
    _end_labels(figure, axes, ends)
    figure.set_label("Accuracy over the share of the data. " + "; ".join(texts) + ".")
    return figure


def saliency_grid(images: Any, maps: Mapping[str, Any]) -> Figure:
    """Images [n, C, H, W] in [0, 1] above the saliency [n, H, W] of each student, each divided by its maximum."""
    count = len(images)
    shown = {"images": _images("images", images, count)}
    lettering = Lettering([*map(named, maps)])
    cell, gap, left = 0.6, 0.06, 1.25
    names = ["images", *maps]
    width, height = left + count * (cell + gap), 0.04 + len(names) * (cell + gap)
    figure = _figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    for line, name in enumerate(names):
        y = 0.02 + line * (cell + gap)
        axes.text(0.02, y + cell / 2, named(name), color=INK, va="center", **{"fontsize": 9.5, **lettering.style})
        if name == "images":
            for place, image in enumerate(shown["images"]):
                _cell(axes, image, left + place * (cell + gap), y, cell, wrong=False)
            continue
        values = np.asarray(maps[name], dtype=float)
        if values.ndim != 3 or len(values) != count:
            raise InputError.of(f"maps[{name!r}]", f"[{count}, H, W], one of each image", values.shape)
        for place, value in enumerate(values / values.max((1, 2), keepdims=True).clip(1e-30)):
            _saliency(axes, value, left + place * (cell + gap), y, cell)
    figure.set_label(f"Saliency of {', '.join(map(named, maps))} for {count} images.")
    return figure


def spectrum(values: Any, products: Mapping[str, float]) -> Figure:
    """Singular values divided by the largest, and the number of products that searches needed.

    values: [N, k] for N images, descending. products: name of a search -> number of J v and J^T u per image.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or not values.size or not (values[:, 0] > 0).all():
        raise InputError.of("values", "singular values [N, k], the largest above 0", values.shape)
    relative = values / values[:, :1]
    figure = _figure(9.0, 3.4)
    figure.set_layout_engine("constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for axes in (left, right):
        axes.set_facecolor("none")
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_edgecolor(GRID)
        axes.tick_params(which="both", length=0, colors=MUTED, labelsize=8.5)
        axes.set_axisbelow(True)
    left.grid(axis="y", color=GRID, linewidth=0.8)
    x = np.arange(1, values.shape[1] + 1)
    left.fill_between(x, *np.quantile(relative, (0.025, 0.975), axis=0), color=BLUE, alpha=0.18, linewidth=0)
    left.plot(x, np.median(relative, axis=0), color=BLUE, linewidth=2)
    left.set_ylim(0, 1.03)
    left.set_xlabel("i", color=MUTED, fontsize=9)
    left.set_ylabel("σᵢ / σ₁, median of the images", color=MUTED, fontsize=9)
    names = list(products)
    counts = [float(products[name]) for name in names]
    right.barh(range(len(names)), counts, color=BLUE, height=0.55)
    right.set_yticks(range(len(names)), names, color=INK)
    right.invert_yaxis()
    right.margins(x=0.18)
    for place, many in enumerate(counts):
        right.annotate(
            f"{many:.0f}", (many, place), (5, 0), textcoords="offset points", color=INK, fontsize=9, va="center"
        )
    right.set_xlabel("products", color=MUTED, fontsize=9)
    told = "; ".join(f"{name}: {many:.0f}" for name, many in zip(names, counts, strict=True))
    last = float(np.median(relative[:, -1]))
    figure.set_label(f"Singular values fall to {last:.3f} of the largest at i = {len(x)}. Products: {told}.")
    return figure


def _banded(
    axes: Any, x: Sequence[float], figures: Sequence[Mapping[str, Any]], color: str, *, dashed: bool = False,
    thin: bool = False,
) -> list[float]:  # fmt: skip
    """Draws means as a line with a band of intervals, in percent; returns the means."""
    y = [float(found["mean"]) for found in figures]
    style = (0, (4, 3)) if dashed else "-"
    axes.plot(x, [100 * value for value in y], color=color, linewidth=1.2 if thin else 2, linestyle=style,
              marker="o", markersize=3 if thin else 5, markeredgewidth=0, zorder=2 if thin else 3)  # fmt: skip
    if not thin and all(found["interval"] is not None for found in figures):
        ends = [[100 * found["interval"][end] for found in figures] for end in (0, 1)]
        axes.fill_between(x, *ends, color=color, alpha=0.16, linewidth=0)
    return y


def _names(axes: Any, kinds: Sequence[str]) -> list[Any]:
    return [axes.plot([], [], color=STUDENTS[kind], linewidth=2, label=named(kind))[0] for kind in kinds]


def _saliency(axes: Any, values: np.ndarray, x: float, y: float, size: float) -> None:
    """A map as squares in the text color with this opacity, so that it fits light and dark pages."""
    high, wide = size / values.shape[0], size / values.shape[1]
    corners = np.array([(0, 0), (wide, 0), (wide, high), (0, high)])
    places = np.array([(x + column * wide, y + row * high) for row, column in np.ndindex(*values.shape)])
    colors = [require("matplotlib.colors").to_rgba(INK, float(value)) for value in values.flat]
    squares = require("matplotlib.collections").PolyCollection
    axes.add_collection(squares(places[:, None] + corners, facecolors=colors, edgecolors="none"), autolim=False)
    frame = require("matplotlib.patches").Rectangle
    axes.add_patch(frame((x, y), size, size, facecolor="none", edgecolor=GRID, linewidth=0.8))
