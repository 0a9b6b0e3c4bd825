# SPDX-License-Identifier: Apache-2.0
"""The report of guidance schedules for worlds with exact scores, models and students: ``report.json`` and
``report.html``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdistill.diffusion.guidance import Guidance
from fastdistill.errors import InputError
from fastdistill.evaluate.figures import label
from fastdistill.evaluate.page import check_interval, duration, entry, number, percent, positive, share, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Heading and caption of known figures; any other figure has its name as heading.
CAPTIONS = {
    "samples": (
        "Twelve samples of a prompt",
        "Each row has the same noise. A red frame with a cross marks images that the judge reads as another prompt. "
        "Without guidance some are pale or wrong; a constant weight makes them right and alike; the window, which "
        "separates the classes as far, keeps them more varied.",
    ),
    "plane": (
        "Separation and variance",
        "Separation: how far the samples of a class are from the center, over that of the real images. Variance: "
        "within a class, over that of the real images. What is above the line of constant weights has more variance "
        "than a smaller constant weight would give at the same separation. Bars: 95\u202f% intervals of the variance.",
    ),
    "schedules": (
        "Schedules",
        "Weight of guidance over the noise. The band is where the classes are decided: four fifths of what a constant "
        "weight takes of the logarithm of the variance, it takes there.",
    ),
    "phase": ("Exact worlds", "Shift of the mean and variance against the dimension and the number of classes."),
}
_SHIFTED = 1.25  # ratio of the separation to that of w = 0 above which a window counts as guidance
_ROW = ("schedule", "grid", "seeds", "images", "separation", "variance_ratio", "evaluations_per_image")


def write_guidance_report(
    directory: str | os.PathLike[str], report: Mapping[str, Any], figures: Mapping[str, Figure] | None = None
) -> Path:
    """Write ``report.json`` and ``report.html`` into ``directory``, which is created. Each file is written atomically.

    Args:
        report: plain JSON values.
            ``models.<task>.rows[]``: ``schedule`` (text), ``grid``, ``seeds``, ``images``, ``right`` (share) and
            ``right_interval``, ``separation``, ``variance_ratio`` and ``variance_ratio_interval``, ``precision``,
            ``recall``, ``vendi``, ``evaluations_per_image``, ``images_per_second``.
            ``models.<task>.recovered[]``: ``schedule``, ``at`` ("separation" or "accuracy"), ``value`` (None: outside
            of the constants' range) and ``interval``.
            ``worlds.<world>.rows[]``: ``schedule``, ``method``, ``grid``, ``dimension``, ``classes``, ``alpha``,
            ``mean``, ``variance``, ``shift``, ``variance_ratio``, ``standard_error`` and ``expected`` (each ``mean``
            and ``variance``), ``source`` ("closed_form", "recursion" or None).
            ``students.<name>``: the fields of a model's row, ``parameters`` and ``seconds``; for the first task in
                ``models``.
            ``seconds.total``, ``versions``; optional ``title``, ``finding`` (default: made from the numbers),
            ``device``, ``date``, ``backend``, ``reproduce`` (a list of commands).
        figures: ``samples``, ``plane``, ``schedules``, ``phase`` and any others, in the order of the page.

    Returns:
        The path of the HTML file.

    Raises:
        InputError: a missing or impossible entry; nothing is written.
        StorageError: the directory cannot be written.
    """
    _check(report)
    tables = [_table(task, model) for task, model in report["models"].items()]
    taught = [{"name": label(name), **row} for name, row in report["students"].items()]
    return write_page(
        directory,
        "guidance.html.j2",
        report,
        figures,
        title="Schedules of guidance",
        finding=finding,
        tiles=_tiles(report),
        captions=CAPTIONS,
        tables=tables,
        students=[row | {"teacher": _like(report, row)} for row in taught],
        worlds={label(name): world["rows"] for name, world in report["worlds"].items()},
    )


def finding(report: Mapping[str, Any]) -> str:
    """What the first task's numbers say: the cost of constant guidance, what the best window restores, and what a
    student distilled with it keeps."""
    task, model = next(iter(report["models"].items()))
    constants = constants_and_others(model["rows"])[0]
    free, one = (_at(constants, w) for w in (0.0, 1.0))
    parts = []
    if free and one:
        lost = 1 - one["variance_ratio"] / free["variance_ratio"]
        taken = f"{percent(lost, 0)} of the variance" if lost > 0 else "no variance"
        parts.append(f"On {task}, constant guidance of w = 1 takes {taken} within a class.")
    best = _best(model)
    if best is None:
        parts.append("No window gives back variance at the same separation.")
    else:
        row, value = best
        text = f"The window {row['schedule']} gives back {percent(value['value'], 0)} of what the constant weight with "
        text += "the same separation lost"
        if one:
            spared = 1 - row["evaluations_per_image"] / one["evaluations_per_image"]
            text += f", with {percent(spared, 0)} fewer evaluations of the model"
        parts.append(f"{text}.")
    for student in report["students"].values():
        if one and student["schedule"] != "0" and best and student["schedule"] == best[0]["schedule"]:
            times = number(student["images_per_second"] / one["images_per_second"])
            parts.append(f"A student of a window makes {times} times as many images per second as constant guidance.")
            break
    return " ".join(parts)


def _best(model: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """Among the windows that separate the classes, the one that restores most at equal separation: both its entries."""
    rows = {row["schedule"]: row for row in model["rows"]}
    free = _at(constants_and_others(model["rows"])[0], 0.0)
    least = _SHIFTED * free["separation"] if free else float("-inf")
    found = [
        (rows[given["schedule"]], given)
        for given in model["recovered"]
        if given["at"] == "separation" and given["value"] is not None and rows[given["schedule"]]["separation"] >= least
    ]
    best = max(found, key=lambda pair: float(pair[1]["value"]), default=None)
    return best if best is not None and best[1]["value"] > 0 else None


def constant_of(schedule: str) -> float | None:
    """The weight of a constant schedule; None for any other."""
    try:
        return float(schedule)
    except ValueError:
        return None


def constants_and_others(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The rows of constant schedules sorted by weight, and all others in their order."""
    constants = [row for row in rows if constant_of(row["schedule"]) is not None]
    others = [row for row in rows if constant_of(row["schedule"]) is None]
    return sorted(constants, key=lambda row: float(row["schedule"])), others


def _at(constants: list[Mapping[str, Any]], w: float) -> Mapping[str, Any] | None:
    return next((row for row in constants if float(row["schedule"]) == w), None)


def _like(report: Mapping[str, Any], student: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The teacher's row for the student's schedule."""
    rows = next(iter(report["models"].values()))["rows"]
    return next((row for row in rows if row["schedule"] == student["schedule"]), None)


def _table(task: str, model: Mapping[str, Any]) -> dict[str, Any]:
    recovered = {(given["schedule"], given["at"]): given for given in model["recovered"]}
    constants, others = constants_and_others(model["rows"])
    return {
        "task": label(task),
        "rows": [
            {**row, "recovered": [recovered.get((row["schedule"], at)) for at in ("separation", "accuracy")]}
            for row in [*constants, *others]
        ],
    }


def _tiles(report: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    model = next(iter(report["models"].values()))
    constants = constants_and_others(model["rows"])[0]
    free, one = (_at(constants, w) for w in (0.0, 1.0))
    if free and one:
        lost = percent(1 - one["variance_ratio"] / free["variance_ratio"], 0)
        yield {"key": "paired", "value": lost, "text": "of the variance lost with constant guidance, w = 1"}
    best = _best(model)
    if best is not None:
        row, value = best
        yield {
            "key": "student",
            "value": percent(value["value"], 0),
            "text": f"of the loss given back by {row['schedule']} at equal separation",
        }
    taught = next((row for row in report["students"].values() if constant_of(row["schedule"]) is None), None)
    if taught is not None and one:
        times = number(taught["images_per_second"] / one["images_per_second"])
        yield {"key": "student", "value": f"{times}\u00d7", "text": "images per second of a student of the window"}
    yield {"key": "", "value": duration(report["seconds"]["total"]), "text": "for the whole experiment"}


def _check(report: Mapping[str, Any]) -> None:
    """InputError unless all required entries exist and have possible values."""
    for part in ("models", "students", "worlds"):
        if not isinstance(entry(report, part), Mapping):
            raise InputError.of(f"report.{part}", "a mapping by name", report[part])
    if not report["models"]:
        raise InputError.of("report.models", "at least one task by name", report["models"])
    for task in report["models"]:
        path = f"models.{task}"
        for place, _ in enumerate(entry(report, f"{path}.rows")):
            _check_row(report, f"{path}.rows.{place}")
        known = {row["schedule"] for row in report["models"][task]["rows"]}
        for place, given in enumerate(entry(report, f"{path}.recovered")):
            own = f"{path}.recovered.{place}"
            if entry(report, f"{own}.schedule") not in known:
                raise InputError.of(f"report.{own}.schedule", "the schedule of a row", given["schedule"])
            if entry(report, f"{own}.at") not in ("separation", "accuracy"):
                raise InputError.of(f"report.{own}.at", "separation or accuracy", given["at"])
            entry(report, f"{own}.value")
            check_interval(given.get("interval"), f"{own}.interval")
    for name in report["students"]:
        _check_row(report, f"students.{name}")
        for field in ("parameters", "seconds", "images_per_second"):
            positive(report, f"students.{name}.{field}")
    for name in report["worlds"]:
        for place, _ in enumerate(entry(report, f"worlds.{name}.rows")):
            for field in ("schedule", "method", "grid", "shift", "variance_ratio", "source"):
                entry(report, f"worlds.{name}.rows.{place}.{field}")


def _check_row(report: Mapping[str, Any], path: str) -> None:
    for field in _ROW:
        entry(report, f"{path}.{field}")
    row = entry(report, path)
    try:
        Guidance.parse(row["schedule"])
    except InputError as error:
        raise InputError.of(f"report.{path}.schedule", "a schedule of guidance", str(error)) from error
    share(report, f"{path}.right")
    for field in ("images", "evaluations_per_image"):
        positive(report, f"{path}.{field}")
    for field in ("right_interval", "variance_ratio_interval"):
        check_interval(row.get(field), f"{path}.{field}")
