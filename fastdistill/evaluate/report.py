# SPDX-License-Identifier: Apache-2.0
"""The report of a distillation experiment: ``report.json`` for programs, ``report.html`` as a self-contained page."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdistill.errors import InputError
from fastdistill.evaluate._optional import require
from fastdistill.evaluate.figures import label, png
from fastdistill.files import atomic_write, located, make_directory

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

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n\f\r"}


def write_report(
    directory: str | os.PathLike[str], report: Mapping[str, Any], figures: Mapping[str, Figure] | None = None
) -> Path:
    """Write ``report.json`` and ``report.html`` into ``directory``, which is created. Each file is written atomically.

    Args:
        report: plain JSON values. Required: ``teacher`` and ``students.<name>``, each with ``seen`` and ``unseen``
            (accuracies from 0 to 1) and ``parameters``; ``seconds.total``; ``versions``; ``backend`` (op -> kernel).
            Optional for a model: ``seen_interval`` [low, high] and ``seen_n``; for several ``seeds`` also ``seen_mean``
            and ``seen_std`` (the same for ``unseen``); ``seconds``; ``images_per_second``. Optional at the top level:
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
    try:
        data = json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError.of("report", "plain JSON values without NaN", str(error)) from error
    page = render(report, figures or {})
    folder = located(directory, "directory")
    make_directory(folder)
    # A lone surrogate, which UTF-8 does not have, becomes its escape; in JSON that is the same text.
    atomic_write(folder / "report.json", data.encode(errors="backslashreplace"))
    atomic_write(folder / "report.html", page.encode(errors="backslashreplace"))
    return folder / "report.html"


def render(report: Mapping[str, Any], figures: Mapping[str, Figure]) -> str:
    """The HTML page. All texts are escaped; control characters, which HTML does not allow, are shown as ``\\x07``."""
    jinja2 = require("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=percent, duration=duration, count=count)
    page = environment.get_template("report.html.j2").render(
        report=report,
        title=report.get("title", "Distillation report"),
        finding=report.get("finding") or finding(report),
        tiles=list(_tiles(report)),
        models=[_row("teacher", report["teacher"]), *(_row(*item) for item in report["students"].items())],
        figures=[_figure(name, figure) for name, figure in figures.items()],
    )
    return str(page).translate(_CONTROLS)


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
        f"keeps {', against '.join(parts)}."
    )


def percent(value: float, digits: int = 1) -> str:
    """0.914 -> "91.4 %", with a non-breaking space."""
    return f"{100 * value:.{digits}f}\u202f%"


def duration(seconds: float) -> str:
    """Seconds in readable form: "42 s", "7 min 12 s", "1 h 05 min"."""
    total = round(seconds)
    if total < 60:
        return f"{total}\u202fs" if seconds >= 10 else f"{seconds:.1f}\u202fs"
    minutes, rest = divmod(total, 60)
    if minutes < 60:
        return f"{minutes}\u202fmin {rest:02d}\u202fs"
    return f"{minutes // 60}\u202fh {minutes % 60:02d}\u202fmin"


def count(value: float) -> str:
    """An integer with narrow spaces between thousands."""
    return f"{value:,.0f}".replace(",", "\u202f")


def _kept(student: Mapping[str, Any], whole: float) -> str:
    """The student's share of ``whole``, the teacher's accuracy on unseen prompts."""
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
    return {"key": name, "name": label(name), "cells": cells, "model": model}


def _figure(name: str, figure: Figure) -> dict[str, Any]:
    heading, caption = CAPTIONS.get(name, (label(name), ""))
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return {
        "name": name,
        "heading": heading,
        "caption": caption,
        "alt": figure.get_label() or heading,
        "width": width,
        "height": height,
        "light": base64.b64encode(png(figure)).decode(),
        "dark": base64.b64encode(png(figure, dark=True)).decode(),
    }


def _check(report: Mapping[str, Any]) -> None:
    """InputError unless all required entries exist and are possible."""

    def entry(path: str) -> Any:
        value: Any = report
        for key in path.split("."):
            if not isinstance(value, Mapping) or key not in value:
                raise InputError.of("report", f"an entry {path}", "none")
            value = value[key]
        return value

    if not isinstance(entry("students"), Mapping) or not report["students"]:
        raise InputError.of("report.students", "at least one student by name", report["students"])
    for model in ("teacher", *(f"students.{name}" for name in report["students"])):
        for kind in ("seen", "unseen"):
            if not 0 <= entry(f"{model}.{kind}") <= 1:
                raise InputError.of(f"report.{model}.{kind}", "an accuracy from 0 to 1", entry(f"{model}.{kind}"))
        if entry(f"{model}.parameters") < 1:
            raise InputError.of(f"report.{model}.parameters", "a positive number", entry(f"{model}.parameters"))
    for path in ("seconds.total", "versions", "backend"):
        entry(path)
