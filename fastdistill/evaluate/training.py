# SPDX-License-Identifier: Apache-2.0
"""The report of a training: ``report.json`` and ``report.html``."""

from __future__ import annotations

import base64
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdistill.errors import InputError
from fastdistill.evaluate.figures import curves
from fastdistill.evaluate.page import count, duration, entry, number, percent, positive, write_page
from fastdistill.train.health import SPREAD, spreads, terms
from fastdistill.train.waits import WAITED

_CAPTIONS = {
    "loss": ("Loss", "The loss and its parts, without their weights. Light: logged values; full color: running mean."),
    "taps": ("Feature loss of each tap", "By the module of the student."),
    "spread": (
        "Spread of the student's feature at each tap",
        "How much it differs between two samples, over the teacher's (mean squares). One that falls to nothing has "
        "collapsed.",
    ),
    "gradient": ("Norm of the gradient", "Means over the updates that were not skipped."),
    "rate": ("Learning rate", ""),
    "speed": ("Images per second", "Between two log lines, checkpoints and previews included."),
    "waits": ("Waiting", "Share of the time between two log lines in which the training stood still."),
}
_WAITS = {"data": WAITED["data"], "checkpoints": WAITED["checkpoint"]}
_MOST_TAPS = 7  # more lines in a figure could not be distinguished


def write_training(
    directory: str | os.PathLike[str], report: Mapping[str, Any], previews: Mapping[int, bytes] | None = None
) -> Path:
    """Write ``report.json`` and ``report.html`` into ``directory``, which is created. Each file is written atomically.

    Args:
        report: plain JSON values. ``metrics``: the lines of ``metrics.jsonl``, at least one; ``steps``: of the whole
            run; ``batch``: samples per step; ``rates``: learning rate at each logged step, or none; ``settings``: the
            run file, or none; ``concerns``: sentences; ``ended``: the reason for an end before the last step, or none;
            ``mfu``, ``about``, ``seed``, ``identity`` and ``fingerprint`` as in ``runs.report``. Others as
            ``write_page``.
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
    """How far the run is and how much its loss fell, in one or two sentences."""
    first, last = report["metrics"][0], report["metrics"][-1]
    ended = report.get("ended")
    far = "The training is " + ("finished" if last["step"] >= report["steps"] else "over" if ended else "on its way")
    text = f"{far}: step {count(last['step'])} of {count(report['steps'])}, loss from {number(first['loss'])} to "
    how = [f"It ended early ({ended})."] if ended else []
    return " ".join([text + f"{number(last['loss'])}.", *how, *report.get("concerns", ())])


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
    if mfu := report.get("mfu"):
        tiles.append({"value": percent(mfu), "text": "of the operations that the device reaches (MFU)", "key": ""})
    waited = sum(line.get(name, 0.0) for line in report["metrics"] for name in _WAITS.values())
    if any(name in last for name in _WAITS.values()) and last["seconds"] > 0:
        share = percent(waited / last["seconds"])
        tiles.append({"value": share, "text": "of the time waiting for data and checkpoints", "key": ""})
    return tiles


def _figures(report: Mapping[str, Any]) -> dict[str, Any]:
    lines = report["metrics"]
    names = terms(lines[-1])
    parts = {name: found for name in names if "/" not in name and (found := _positive(lines, name))}
    taps = {name.partition("/")[2]: found for name in names if "/" in name and (found := _positive(lines, name))}
    figures = {}
    if parts:
        figures["loss"] = curves(parts, "loss")
    spread = {tap: found for tap in spreads(lines[-1]) if (found := _positive(lines, f"{SPREAD}{tap}"))}
    short = _shortened({**taps, **spread})
    if taps:  # the largest ones: a figure with all taps of a large model is unreadable
        largest = sorted(taps, key=lambda name: -taps[name][1][-1])[:_MOST_TAPS]
        figures["taps"] = curves({short[name]: taps[name] for name in taps if name in largest}, "loss")
    if spread:  # the smallest ones
        smallest = sorted(spread, key=lambda name: spreads(lines[-1])[name])[:_MOST_TAPS]
        figures["spread"] = curves({short[name]: spread[name] for name in spread if name in smallest}, "spread")
    if norm := _positive(lines, "gradient_norm"):
        figures["gradient"] = curves({"norm": norm}, "norm")
    if rates := {line["step"]: rate for line, rate in zip(lines, report.get("rates") or (), strict=False) if rate}:
        figures["rate"] = curves({"rate": (list(rates), list(rates.values()))}, "rate", linear=True)
    if speed := _speed(report):
        figures["speed"] = curves({"images": speed}, "images per second", linear=True)
    if waits := {name: found for name, key in _WAITS.items() if (found := _waited(lines, key))}:
        figures["waits"] = curves(waits, "share of the time", linear=True)
    return figures


def _positive(lines: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]] | None:
    """Steps and values of a metric, from the lines in which it is above 0 (for a logarithmic axis)."""
    found = [(line["step"], line[name]) for line in lines if line.get(name, 0) > 0]
    return ([step for step, _ in found], [value for _, value in found]) if found else None


def _shortened(names: Iterable[str]) -> dict[str, str]:
    """Names of modules, with as many of their parts as are needed to distinguish them: ``down_blocks.0`` for
    ``down_blocks.0.downsamplers.0.conv``."""
    parts = {name: name.split(".") for name in names}
    found = {}
    for name, own in parts.items():
        others = [other for other in parts.values() if other is not own]
        told = (n for n in range(1, len(own)) if all(other[:n] != own[:n] for other in others))
        found[name] = ".".join(own[: next(told, len(own))])
    return found


def _waited(lines: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]] | None:
    """Steps, and the share of the time before their log line that was spent waiting."""
    found = [
        (after["step"], after[name] / (after["seconds"] - before["seconds"]))
        for before, after in itertools.pairwise([{"step": 0, "seconds": 0.0}, *lines])
        if name in after and after["seconds"] > before["seconds"]
    ]
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
