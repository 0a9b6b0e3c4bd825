# SPDX-License-Identifier: Apache-2.0
"""The report of a distillation experiment: ``report.json`` for programs, a self-contained ``report.html`` for people."""

from __future__ import annotations

import base64
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdistill.errors import InputError, StorageError
from fastdistill.evaluate._optional import require
from fastdistill.evaluate.figures import label, png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Heading and caption of the figures that are known by name; others appear under their own name.
CAPTIONS = {
    "samples": (
        "Samples",
        "The same noise for every model. A red frame with a cross marks what the judge reads as another digit or color.",
    ),
    "loss": ("Training", "Loss of each student. Faint: as logged; strong: running mean."),
    "probability": (
        "How often the prompt is replaced",
        "At timestep t the prompt of a cached latent is exchanged for a random one of the whole pool with probability p(t): "
        "seldom where the latent shows the image, almost always where it is noise.",
    ),
}


def write_report(
    directory: str | os.PathLike[str], report: Mapping[str, Any], figures: Mapping[str, Figure] | None = None
) -> Path:
    """Write ``report.json`` and ``report.html`` into ``directory`` (created), each whole or not at all; the HTML's path.

    ``report`` (plain JSON values) must hold ``teacher`` and ``students.<name>`` with ``seen`` and ``unseen`` (accuracies
    0..1) and ``parameters``; ``seconds.total``; ``versions``; ``backend`` (op -> kernel). Beside an accuracy may stand
    ``seen_interval`` [low, high], ``seen_n``, and for several seeds ``seen_mean``, ``seen_std`` with ``seeds``, and the
    same for ``unseen``; beside the parameters ``seconds`` and ``images_per_second``. At the top level ``title``,
    ``finding`` (else one is worded from the numbers), ``judge`` {accuracy, interval, n}, ``prompts`` {seen, unseen},
    ``device``, ``date`` and ``reproduce`` (a list of commands) are shown where present.

    ``figures``: ``samples``, ``loss``, ``probability`` and any others, in the order to show them.
    Raises ``InputError`` naming a missing or impossible entry, ``StorageError`` where the directory cannot be written;
    nothing is written before both files are complete.
    """
    _check(report)
    try:
        data = json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError.of("report", "plain JSON values without NaN", str(error)) from error
    page = render(report, figures or {})
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "report.json", data)
        _replace(folder / "report.html", page)
    except OSError as error:
        raise StorageError(f"{folder}: expected to be able to write the report, got {error}") from error
    return folder / "report.html"


def render(report: Mapping[str, Any], figures: Mapping[str, Figure]) -> str:
    """The HTML page."""
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
    return str(page)


def finding(report: Mapping[str, Any]) -> str:
    """One sentence: what each student keeps of the teacher's accuracy on prompts that were never in the cache."""
    teacher = report["teacher"]
    parts = []
    for name, student in sorted(report["students"].items(), key=lambda item: -_accuracy(item[1], "unseen")):
        how = f"distilled with {label(name).lower()}" + ("" if name == "random_conditioning" else " prompts only")
        parts.append(f"{_kept(student, teacher)} when {how}")
    size = next(iter(report["students"].values()))["parameters"] / teacher["parameters"]
    return (
        f"On prompts that never appeared in its cache, a student with {percent(size, 0)} of the teacher's parameters "
        f"keeps {', and '.join(parts)}."
    ).replace("keeps ", "keeps ", 1)


def percent(value: float, digits: int = 1) -> str:
    """0.914 -> "91.4 %", with a space that does not break."""
    return f"{100 * value:.{digits}f}\u202f%"


def duration(seconds: float) -> str:
    """Seconds as people say them: "42 s", "7 min 12 s", "1 h 05 min"."""
    total = round(seconds)
    if total < 60:
        return f"{total}\u202fs" if seconds >= 10 else f"{seconds:.1f}\u202fs"
    minutes, rest = divmod(total, 60)
    if minutes < 60:
        return f"{minutes}\u202fmin {rest:02d}\u202fs"
    return f"{minutes // 60}\u202fh {minutes % 60:02d}\u202fmin"


def count(value: float) -> str:
    """A count with thin spaces between the thousands."""
    return f"{value:,.0f}".replace(",", "\u202f")


def _kept(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> str:
    whole = _accuracy(teacher, "unseen")
    return f"{percent(_accuracy(student, 'unseen') / whole, 0) if whole else '–'} of the teacher's accuracy"


def _accuracy(model: Mapping[str, Any], kind: str) -> float:
    """The mean over seeds where there are several, else the one value."""
    return float(model.get(f"{kind}_mean", model[kind]))


def _tiles(report: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    teacher = report["teacher"]
    whole = _accuracy(teacher, "unseen")
    for name, student in report["students"].items():
        kept = _accuracy(student, "unseen") / whole if whole else 0.0
        yield {
            "key": name,
            "value": percent(kept, 0),
            "text": f"{label(name)}: of the teacher's accuracy on unseen prompts",
        }
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
            notes.append(f"95\u202f%: {100 * low:.1f}–{100 * high:.1f}")
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
    """Every entry that a reader of the report relies on is there and possible."""

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


def _replace(path: Path, text: str) -> None:
    """Write ``path`` through a temporary file beside it: readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
