# SPDX-License-Identifier: Apache-2.0
"""Figures of guidance schedules: samples by prompt, and the variance over the separation of the classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastdistill.errors import InputError
from fastdistill.evaluate.figures import BLUE, INK, MUTED, ORANGE, _axes, label, sample_grid
from fastdistill.evaluate.guidance import constants_and_others
from fastdistill.evaluate.lettering import Lettering

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def prompt_samples(samples: Mapping[str, Any], prompts: Sequence[str], right: Mapping[str, Sequence[bool]]) -> Figure:
    """Samples: a panel per prompt with a row per schedule; a red frame and a cross mark wrong samples.

    Args:
        samples: name of the schedule -> images [P, n, C, H, W], values in [0, 1]: n for each of P prompts.
        prompts: P texts. right: name -> P n values in the order of the images: whether the judge accepts the image.
    """
    flat: dict[str, Any] = {}
    for name, images in samples.items():
        if len(images.shape) != 5 or len(images) != len(prompts):
            raise InputError.of(f"samples[{name!r}]", f"images [{len(prompts)}, n, C, H, W]", tuple(images.shape))
        flat[name] = images.reshape(-1, *images.shape[2:])
    number = len(next(iter(flat.values()))) // len(prompts) if flat else 0
    panels = [prompt for prompt in prompts for _ in range(number)]
    return sample_grid(flat, [""] * len(panels), correct=right, panels=panels)


def diversity_plane(
    rows: Sequence[Mapping[str, Any]], students: Mapping[str, Mapping[str, Any]] | None = None
) -> Figure:
    """The variance ratio over the separation: a line through the constant weights, a point for each other schedule and
    each student.

    rows, students: as for ``write_guidance_report``, with ``schedule``, ``separation``, ``variance_ratio`` and
    optionally ``variance_ratio_interval``.
    """
    constants, others = constants_and_others(rows)
    figure, axes = _axes(9.0, 5.2)
    axes.grid(axis="x", color=axes.get_ygridlines()[0].get_color(), linewidth=0.8)
    axes.plot(*_coordinates(constants), color=MUTED, linewidth=2, solid_capstyle="round", zorder=2)
    lettering = Lettering([row["schedule"] for row in rows] + [label(name) for name in students or {}])
    groups: tuple[tuple[str, str, str, list[tuple[str, Mapping[str, Any]]]], ...] = (
        ("constant w", MUTED, "o", [(f"w = {row['schedule']}", row) for row in constants]),
        ("windows", BLUE, "D", [(row["schedule"], row) for row in others]),
        ("students", ORANGE, "s", [("", row) for row in (students or {}).values()]),
    )
    for name, color, marker, named in groups:
        if not named:
            continue
        x, y = _coordinates([row for _, row in named])
        axes.plot(x, y, marker, color=color, markersize=7, markeredgewidth=0, label=name, zorder=3)
        for (text, row), x_at, y_at in zip(named, x, y, strict=True):
            if (interval := row.get("variance_ratio_interval")) is not None:
                axes.plot([x_at, x_at], list(interval), color=color, linewidth=1.2, alpha=0.6, zorder=2)
            below = name == "constant w"
            style = {"fontsize": 8.5, **lettering.style}
            offset, align = ((-7, -7), ("right", "top")) if below else ((8, 5), ("left", "bottom"))
            place = {"textcoords": "offset points", "ha": align[0], "va": align[1], "color": MUTED if below else INK}
            axes.annotate(text, (x_at, y_at), offset, **place, **style)
    axes.set_xlabel("separation of the classes (real images: 1)", color=MUTED, fontsize=9)
    axes.set_ylabel("variance within a class (real images: 1)", color=MUTED, fontsize=9)
    axes.margins(x=0.12, y=0.12)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="upper right")
    texts = [
        f"{text or label('student')}: {row['variance_ratio']:.3f} at separation {row['separation']:.3f}"
        for *_, named in groups
        for text, row in named
    ]
    figure.set_label("Variance over separation. " + "; ".join(texts) + ".")
    return figure


def _coordinates(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    return [float(row["separation"]) for row in rows], [float(row["variance_ratio"]) for row in rows]
