# SPDX-License-Identifier: Apache-2.0
"""The report of students with accuracies, such as in the digits demo: ``report.json`` and ``report.html``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdistill.errors import InputError
from fastdistill.evaluate.figures import label
from fastdistill.evaluate.page import (
    check_interval,
    count,
    duration,
    entry,
    number,
    percent,
    positive,
    share,
    write_page,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Heading and caption of known figures; any other figure has its name as heading.
CAPTIONS = {
    "samples": (
        "Samples",
        "One column per prompt. A red frame with a cross marks samples that the judge reads as another digit or color.",
    ),
    "loss": ("Training", "Loss of each student. Light: logged values; full color: running mean."),
    "probability": (
        "Probability of a random prompt",
        "At timestep t the prompt of a cached latent is replaced by a random prompt of the pool with probability p(t); "
        "only for the student with random conditioning.",
    ),
}


def write_report(
    directory: str | os.PathLike[str], report: Mapping[str, Any], figures: Mapping[str, Figure] | None = None
) -> Path:
    """Write ``report.json`` and ``report.html`` into ``directory``, which is created. Each file is written atomically.

    Args:
        report: plain JSON values. Required: ``teacher`` and ``students.<name>``, each with ``seen`` and ``unseen``
            (accuracies from 0 to 1) and ``parameters``; ``seconds.total``; ``versions``; ``backend`` (op -> kernel).
            Optional for a model: ``seen_interval`` [low, high] and ``seen_n``; for several ``seeds`` also ``seen_mean``
                and ``seen_std`` (the same for ``unseen``); ``seconds``; ``images_per_second``; for a student
                ``likeness`` {seen, unseen}, each with ``distance`` and ``frechet`` {value, interval, each}: root mean
                square difference from the teacher's samples with the same noise, and Fréchet distance to them. Optional
                at the top level:
            ``title``, ``finding`` (default: made from the numbers), ``judge`` {accuracy, interval, n}, ``prompts``
            {seen, unseen}, ``device``, ``date``, ``reproduce`` (a list of commands).
        figures: ``samples``, ``loss``, ``probability`` and any others, in the order of the page.

    Returns:
        The path of the HTML file.

    Raises:
        InputError: a missing or impossible entry; nothing is written.
        StorageError: the directory cannot be written.
    """
    _check(report)
    return write_page(
        directory,
        "report.html.j2",
        report,
        figures,
        title="Distillation report",
        finding=finding,
        tiles=_tiles(report),
        captions=CAPTIONS,
        models=[_row("teacher", report["teacher"]), *(_row(*item) for item in report["students"].items())],
    )


def finding(report: Mapping[str, Any]) -> str:
    """One sentence: the share of the teacher's accuracy that each student keeps on prompts outside the cache."""
    teacher = report["teacher"]
    whole = _accuracy(teacher, "unseen")
    parts: list[str] = []
    for name, student in sorted(report["students"].items(), key=lambda item: -_accuracy(item[1], "unseen")):
        how = label(name).lower() + ("" if name == "random_conditioning" else " prompts only")
        unit = "" if parts else " of the teacher's accuracy"
        parts.append(f"{_kept(student, whole)}{unit} with {how}")
    size = next(iter(report["students"].values()))["parameters"] / teacher["parameters"]
    return (
        f"On prompts that are not in the cache, a student with {percent(size, 0)} of the parameters "
        f"keeps {', against '.join(parts)}.{_farther(report)}"
    )


def _farther(report: Mapping[str, Any]) -> str:
    """How much farther the best student is from the teacher's samples on unseen prompts than on seen ones."""
    students, best = report["students"], _best(report)
    if (ratio := _ratio(students[best])) is None:
        return ""
    subject = f"{label(best)}'s" if len(students) > 1 else "Its"
    far = f"{number(ratio)} times as far from the teacher's as those of cached ones"
    return f" {subject} samples of these prompts are {far}."


def _best(report: Mapping[str, Any]) -> str:
    """The name of the student with the highest accuracy on unseen prompts."""
    students: Mapping[str, Any] = report["students"]
    return max(students, key=lambda name: _accuracy(students[name], "unseen"))


def _ratio(student: Mapping[str, Any]) -> float | None:
    """The distance of unseen samples divided by that of seen samples."""
    if "likeness" not in student:
        return None
    seen, unseen = (student["likeness"][kind]["distance"]["value"] for kind in ("seen", "unseen"))
    return float(unseen / seen) if seen else None


def _kept(student: Mapping[str, Any], whole: float) -> str:
    """The student's accuracy as a share of ``whole``, the teacher's accuracy on unseen prompts."""
    return percent(_accuracy(student, "unseen") / whole, 0) if whole else "n/a"


def _accuracy(model: Mapping[str, Any], kind: str) -> float:
    """The accuracy; with several seeds, their mean."""
    return float(model.get(f"{kind}_mean", model[kind]))


def _tiles(report: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    teacher = report["teacher"]
    whole = _accuracy(teacher, "unseen")
    for name, student in report["students"].items():
        text = f"{label(name)}: share of the teacher's accuracy kept on unseen prompts"
        yield {"key": name, "value": _kept(student, whole), "text": text}
    best = _best(report)
    if (ratio := _ratio(report["students"][best])) is not None:
        text = f"{label(best)}: distance of unseen samples from the teacher's, of that of seen ones"
        yield {"key": best, "value": f"{number(ratio)}\u202f×", "text": text}
    first = next(iter(report["students"].values()))
    size = percent(first["parameters"] / teacher["parameters"], 0)
    yield {"key": "", "value": size, "text": f"of the teacher's {count(teacher['parameters'])} parameters in a student"}
    yield {"key": "", "value": duration(report["seconds"]["total"]), "text": "for the whole experiment"}


def _row(name: str, model: Mapping[str, Any]) -> dict[str, Any]:
    cells = []
    for kind in ("seen", "unseen"):
        value, interval = _accuracy(model, kind), model.get(f"{kind}_interval")
        notes = []
        if f"{kind}_std" in model:
            seeds = model.get("seeds")
            number = len(seeds) if isinstance(seeds, list | tuple) else seeds
            notes.append(f"± {percent(model[f'{kind}_std'])}" + (f" over {number} seeds" if number else ""))
        if interval:
            low, high = interval
            notes.append(f"95\u202f%: {100 * low:.1f}\u2013{100 * high:.1f}")
        if f"{kind}_n" in model:
            notes.append(f"n = {count(model[f'{kind}_n'])}")
        cells.append({"kind": kind, "value": value, "interval": interval, "notes": notes})
    return {"key": name, "name": label(name), "cells": cells, "model": model, "ratio": _ratio(model)}


def _check(report: Mapping[str, Any]) -> None:
    """InputError unless all required entries exist and have possible values."""
    if not isinstance(entry(report, "students"), Mapping) or not report["students"]:
        raise InputError.of("report.students", "at least one student by name", report["students"])
    for model in ("teacher", *(f"students.{name}" for name in report["students"])):
        for kind in ("seen", "unseen"):
            share(report, f"{model}.{kind}", "an accuracy from 0 to 1")
            for measure in ("distance", "frechet") if "likeness" in entry(report, model) else ():
                place = f"{model}.likeness.{kind}.{measure}"
                positive(report, f"{place}.value", zero=True)
                check_interval(entry(report, f"{place}.interval"), f"{place}.interval")
        positive(report, f"{model}.parameters")
    entry(report, "backend")
