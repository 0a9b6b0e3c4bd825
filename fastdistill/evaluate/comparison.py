# SPDX-License-Identifier: Apache-2.0
"""The report of a student compared with its teacher: ``report.json`` and ``report.html``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdistill.errors import InputError
from fastdistill.evaluate.page import check_interval, count, entry, number, percent, positive, write_page
from fastdistill.evaluate.samples import MODELS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Heading and meaning of each figure, in the order of the page.
MEASURES = {
    "images_distance": (
        "Distance of images",
        "RMS difference from the teacher's image of the same prompt and noise, values from 0 to 1. "
        "Teacher: of its own images of other prompts and noise.",
    ),
    "latents_distance": ("Distance of latents", "The same before the VAE, in the model's scale."),
    "output_loss": ("Held-out output loss", "Mean square difference of the predictions, timesteps uniform."),
    "feature_loss": ("Held-out feature loss", "The same of the features, summed over the student's taps."),
    "precision": ("Precision", "Share of images that lie among the reference's, by features."),
    "recall": ("Recall", "Share of the reference's images that lie among these."),
    "density": ("Density", "Precision that counts neighborhoods; 1 is as dense as the reference."),
    "coverage": ("Coverage", "Share of the reference's neighborhoods with an image in them."),
    "vendi": ("Vendi score", "Effective number of different images. It grows with their number."),
    "vendi_ratio": ("Vendi score, student of teacher", "Below 1: less diverse than the teacher."),
    "variance_ratio": ("Variance within a prompt", "Of features of a prompt's images, over the teacher's."),
    "class_separation": ("Separation of prompts", "Along the teacher's directions; 1: as far apart as its own."),
    "fid": ("FID", "Fréchet distance from the reference. Compare equal numbers of images only."),
    "kid": ("KID", "Squared maximum mean discrepancy from the reference."),
    "clip": ("CLIP score", "100 times the cosine of image and prompt."),
}

_CAPTIONS = {
    "samples": ("Samples", "One column per prompt: the same prompt and noise for teacher and student."),
    "losses": (
        "Held-out loss over timesteps",
        "Points: latents of the teacher that no student was trained on, at timesteps drawn uniformly. Line: means.",
    ),
}


def write_comparison(
    directory: str | os.PathLike[str], report: Mapping[str, Any], figures: Mapping[str, Figure] | None = None
) -> Path:
    """Write ``report.json`` and ``report.html`` into ``directory``, which is created. Each file is written atomically.

    Args:
        report: plain JSON values. ``teacher`` and ``student``: ``parameters``, ``images_per_second`` and ``measures``,
            name (``MEASURES``) -> {value, interval: [low, high] or None}. ``sampling``: settings by name.
            ``reference``: the images that precision, FID etc. compare with. ``left_out``: name -> reason. ``prompts``:
            a list of {text, seen, images_distance}. Other entries as in ``write_page``. Optional: ``title``,
            ``finding``, and
            ``sizes``: for other image sizes, by name, ``teacher``, ``student`` (without parameters) and ``left_out``;
            then ``sampling.pixels`` lists the sizes, first the size of all other entries.
        figures: ``samples``, ``losses`` (with a size, ``samples 64 x 48``) and any others, in the order of the page.

    Raises:
        InputError: a missing or impossible entry; nothing is written. StorageError: the directory cannot be written.
    """
    _check(report)
    captions = {}
    for name in figures or {}:
        kind, _, size = name.partition(" ")
        if kind in _CAPTIONS:
            heading, caption = _CAPTIONS[kind]
            captions[name] = f"{heading}, {size}" if size else heading, caption
    return write_page(
        directory,
        "comparison.html.j2",
        report,
        figures,
        title="Student and teacher",
        finding=finding,
        tiles=_tiles(report),
        captions=captions,
        tables=[_table(name, of) for name, of in {_first_size(report): report, **report.get("sizes", {})}.items()],
    )


def pixels(size: tuple[int, int]) -> str:
    """The name of a size of images: height and width."""
    return f"{size[0]} x {size[1]}"


def _first_size(report: Mapping[str, Any]) -> str:
    """The name of the first size of a report about several sizes; empty for one size."""
    return str(report["sampling"]["pixels"]).partition(",")[0] if report.get("sizes") else ""


def _table(size: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """The measures for one size of images."""
    rows = [
        {"heading": heading, "note": note, "cells": [_cell(report[model]["measures"].get(name)) for model in MODELS]}
        for name, (heading, note) in MEASURES.items()
        if any(name in report[model]["measures"] for model in MODELS)
    ]
    left_out = [(MEASURES.get(name, (name,))[0], reason) for name, reason in report.get("left_out", {}).items()]
    return {"size": size, "rows": rows, "left_out": left_out, **{model: report[model] for model in MODELS}}


def finding(report: Mapping[str, Any]) -> str:
    """The comparison in one or two sentences, made from the numbers."""
    text = (
        f"The student has {_share(report, 'parameters')} of the teacher's parameters and makes "
        f"{_times(report)} times as many images per second."
    )
    distance = report["student"]["measures"].get("images_distance")
    if distance is not None:
        size = f" of {first}" if (first := _first_size(report)) else ""
        text += f" Its images{size} differ from the teacher's of the same noise by {number(distance['value'])} (RMS)"
        other = report["teacher"]["measures"].get("images_distance")
        if other is not None and other["value"] > 0:
            text += f", {percent(distance['value'] / other['value'], 0)} of the difference between unrelated images"
        text += "."
    return text


def _share(report: Mapping[str, Any], name: str) -> str:
    return percent(report["student"][name] / report["teacher"][name], 0)


def _times(report: Mapping[str, Any]) -> str:
    return f"{report['student']['images_per_second'] / report['teacher']['images_per_second']:.2f}"


def _tiles(report: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    parameters = count(report["teacher"]["parameters"])
    yield {"key": "student", "value": _share(report, "parameters"), "text": f"of the teacher's {parameters} parameters"}
    yield {"key": "student", "value": f"{_times(report)}\u00d7", "text": "the teacher's images per second"}
    measures = report["student"]["measures"]
    for name in ("images_distance", "recall"):
        if name in measures:
            value = measures[name]["value"]
            shown = percent(value, 0) if name == "recall" else number(value)
            yield {"key": "", "value": shown, "text": MEASURES[name][0].lower()}


def _cell(measure: Mapping[str, Any] | None) -> dict[str, str]:
    if measure is None:
        return {"value": "\u2013", "interval": ""}
    interval = measure.get("interval")
    ends = "" if interval is None else f"{number(interval[0])} to {number(interval[1])}"
    return {"value": number(measure["value"]), "interval": ends}


def _check(report: Mapping[str, Any]) -> None:
    for model in MODELS:
        positive(report, f"{model}.parameters")
    for place in ("", *(f"sizes.{size}." for size in report.get("sizes", {}))):
        for model in (f"{place}{model}" for model in MODELS):
            positive(report, f"{model}.images_per_second")
            for name, measure in entry(report, f"{model}.measures").items():
                if name not in MEASURES:
                    raise InputError.of(f"report.{model}.measures", f"of {', '.join(MEASURES)}", name)
                entry(report, f"{model}.measures.{name}.value")
                check_interval(measure.get("interval"), f"{model}.measures.{name}.interval")
    for path in ("sampling", "prompts", *(["sampling.pixels"] if report.get("sizes") else [])):
        entry(report, path)
