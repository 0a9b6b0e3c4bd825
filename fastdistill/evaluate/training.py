# SPDX-License-Identifier: Apache-2.0
"""The report of a training: ``report.json`` and ``report.html``."""

from __future__ import annotations

import base64
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdistill.errors import InputError
from fastdistill.evaluate.figures import curves
from fastdistill.evaluate.page import count, duration, entry, number, percent, positive, write_page
from fastdistill.train.health import terms

_CAPTIONS = {
    "loss": ("Loss", "The loss and its parts, without their weights. Light: logged values; full color: running mean."),
    "taps": ("Feature loss of each tap", "By the module of the student."),
    "gradient": ("Norm of the gradient", "Means over the updates that were not skipped."),
    "rate": ("Learning rate", ""),
    "speed": ("Images per second", "Between two log lines, checkpoints and previews included."),
}
_MOST_TAPS = 8  # lines in a figure that can be told apart


def write_training(
    directory: str | os.PathLike[str], report: Mapping[str, Any], previews: Mapping[int, bytes] | None = None
) -> Path:
    """Write ``report.json`` and ``report.html`` into ``directory``, which is created. Each file is written atomically.

    Args:
        report: plain JSON values. ``metrics``: the lines of ``metrics.jsonl``, one or more; ``steps``: of the whole
            run; ``batch``: samples of a step; ``rates``: learning rate at each logged step, or none; ``settings``: the
            run file, or none; ``concerns``: sentences. Others as ``write_page``.
        previews: PNG files by step.

    Raises:
        InputError: a missing or impossible entry; nothing is written. StorageError: the directory cannot be written.
    """
    lines: Sequence[Mapping[str, float]] = entry(report, "metrics")
    if not lines:
        raise InputError.of("report.metrics", "a line of metrics or more", lines)
    positive(report, "steps")
    positive(report, "batch")
    shown = [{"step": step, "image": base64.b64encode(image).decode()} for step, image in (previews or {}).items()]
    return write_page(
        directory,
        "training.html.j2",
        report,
        _figures(report),
        title="Training",
        finding=finding,
        tiles=_tiles(report),
        captions=_CAPTIONS,
        previews=shown,
    )


def finding(report: Mapping[str, Any]) -> str:
    """How far the run is and how its loss fell, in a sentence or two."""
    first, last = report["metrics"][0], report["metrics"][-1]
    far = "The training is finished" if last["step"] >= report["steps"] else "The training is on its way"
    text = f"{far}: step {count(last['step'])} of {count(report['steps'])}, loss from {number(first['loss'])} to "
    return " ".join([text + f"{number(last['loss'])}.", *report.get("concerns", ())])


def _tiles(report: Mapping[str, Any]) -> list[dict[str, str]]:
    last = report["metrics"][-1]
    tiles = [
        {"value": percent(last["step"] / report["steps"], 0), "text": f"of {count(report['steps'])} steps", "key": ""},
        {"value": number(last["loss"]), "text": "loss of the last log interval", "key": "student"},
        {"value": duration(last["seconds"]), "text": "of training", "key": ""},
    ]
    if last["skipped"]:
        tiles.append({"value": count(last["skipped"]), "text": "skipped updates", "key": ""})
    if speed := _speed(report):
        tiles.append({"value": number(speed[1][-1]), "text": "images per second", "key": ""})
    return tiles


def _figures(report: Mapping[str, Any]) -> dict[str, Any]:
    lines = report["metrics"]
    names = terms(lines[-1])
    parts = {name: found for name in names if "/" not in name and (found := _positive(lines, name))}
    taps = {name.partition("/")[2]: found for name in names if "/" in name and (found := _positive(lines, name))}
    figures = {}
    if parts:
        figures["loss"] = curves(parts, "loss")
    if taps:  # the largest: a figure of all of a large model says nothing
        largest = sorted(taps, key=lambda name: -taps[name][1][-1])[:_MOST_TAPS]
        figures["taps"] = curves({name: taps[name] for name in taps if name in largest}, "loss")
    if norm := _positive(lines, "gradient_norm"):
        figures["gradient"] = curves({"norm": norm}, "norm")
    if rates := {line["step"]: rate for line, rate in zip(lines, report.get("rates") or (), strict=False) if rate}:
        figures["rate"] = curves({"rate": (list(rates), list(rates.values()))}, "rate", linear=True)
    if speed := _speed(report):
        figures["speed"] = curves({"images": speed}, "images per second", linear=True)
    return figures


def _positive(lines: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]] | None:
    """Steps and values of a metric, of the lines in which it is above 0, as it is drawn over a logarithm."""
    found = [(line["step"], line[name]) for line in lines if line.get(name, 0) > 0]
    return ([step for step, _ in found], [value for _, value in found]) if found else None


def _speed(report: Mapping[str, Any]) -> tuple[list[float], list[float]] | None:
    """Steps, and images per second between their log line and the one before."""
    lines = [{"step": 0, "seconds": 0.0}, *report["metrics"]]
    found = [
        (after["step"], report["batch"] * (after["step"] - before["step"]) / (after["seconds"] - before["seconds"]))
        for before, after in itertools.pairwise(lines)
        if after["seconds"] > before["seconds"] and after["step"] > before["step"]
    ]
    return ([step for step, _ in found], [value for _, value in found]) if found else None
