# SPDX-License-Identifier: Apache-2.0
"""The frame of every report: ``report.json`` for programs, ``report.html`` as a self-contained page, light and dark.

``page.html.j2`` has the head, the tiles, the figures, the environment and how to reproduce it. Each kind of report has
a template that extends it, and a module that checks the numbers and writes the finding.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdistill.errors import InputError
from fastdistill.evaluate._optional import require
from fastdistill.evaluate.figures import label, png
from fastdistill.files import atomic_write, located, make_directory
from fastdistill.schemas import REPORT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Heading and caption of figures by name; a figure with another name has this name as heading.
Captions = Mapping[str, tuple[str, str]]

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n\f\r"}


def write_page(
    directory: str | os.PathLike[str],
    template: str,
    report: Mapping[str, Any],
    figures: Mapping[str, Figure] | None,
    *,
    title: str,
    finding: Callable[[Mapping[str, Any]], str],
    tiles: Iterable[Mapping[str, str]],
    captions: Captions,
    lead: Sequence[str] = (),
    **context: Any,
) -> Path:
    """Write ``report.json`` and ``report.html`` into ``directory``, which is created. Each file is written atomically.

    Args:
        template: file in this folder that extends ``page.html.j2``; it gets ``context`` and the values listed here.
        report: plain JSON values, with ``versions`` (package -> version) and ``seconds`` (part -> seconds, ``total``
            among them), and optionally ``title``, ``finding``, ``backend`` (op -> kernel), ``device``, ``date`` and
            ``reproduce`` (a list of commands).
        title, finding: for a report without these entries: the title, and a function report -> result in a sentence.
        tiles: ``value`` and ``text``, and as ``key`` the model whose color is used.
        lead: names of figures above the tables.

    Returns:
        The path of the HTML file.

    Raises:
        InputError: an entry that is missing or not JSON; nothing is written.
        StorageError: the directory cannot be written.
    """
    for name in ("versions", "seconds.total"):
        entry(report, name)
    title, said = report.get("title", title), report.get("finding") or finding(report)
    try:
        content = {"schema": REPORT.version, **report}
        data = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError.of("report", "plain JSON values without NaN", str(error)) from error
    jinja2 = require("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=percent, duration=duration, count=count, number=number)
    drawn = [{"id": f"figure-{i}"} | _figure(*item, captions) for i, item in enumerate((figures or {}).items(), 1)]
    given = {"report": report, "title": title, "finding": said, "tiles": list(tiles), "figures": drawn, "lead": lead}
    page = str(environment.get_template(template).render(**given, **context)).translate(_CONTROLS)
    folder = located(directory, "directory")
    make_directory(folder)
    # A lone surrogate cannot be encoded in UTF-8 and becomes its escape; in JSON that is the same text.
    atomic_write(folder / "report.json", data.encode(errors="backslashreplace"))
    atomic_write(folder / "report.html", page.encode(errors="backslashreplace"))
    return folder / "report.html"


def entry(report: Mapping[str, Any], path: str) -> Any:
    """The entry of a report at ``a.b.c``; list items by number. InputError if there is none."""
    value: Any = report
    for key in path.split("."):
        if isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        elif isinstance(value, Mapping) and key in value:
            value = value[key]
        else:
            raise InputError.of("report", f"an entry {path}", "none")
    return value


def positive(report: Mapping[str, Any], path: str, *, zero: bool = False) -> float:
    """The number above 0, or from 0 with ``zero``, at ``a.b.c``; InputError for anything else."""
    if zero:
        return _number(report, path, "a number from 0", lambda value: 0 <= value < math.inf)
    return _number(report, path, "a positive number", lambda value: 0 < value < math.inf)


def share(report: Mapping[str, Any], path: str, rule: str = "a share from 0 to 1") -> float:
    """The number from 0 to 1 at ``a.b.c``; InputError for anything else."""
    return _number(report, path, rule, lambda value: 0 <= value <= 1)


def check_interval(value: Any, path: str) -> None:
    """InputError unless ``value`` is None or [low, high]."""
    if value is None:
        return
    fits = isinstance(value, Sequence) and len(value) == 2 and all(isinstance(end, Real) for end in value)
    if not fits or not value[0] <= value[1]:
        raise InputError.of(f"report.{path}", "[low, high]", value)


def _number(report: Mapping[str, Any], path: str, rule: str, fits: Callable[[float], bool]) -> float:
    value = entry(report, path)
    if isinstance(value, bool) or not isinstance(value, Real) or not fits(float(value)):
        raise InputError.of(f"report.{path}", rule, value)
    return float(value)


def number(value: float) -> str:
    """Three significant digits."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    digits = 3 - len(f"{abs(value):.0f}") if abs(value) >= 1 else 3
    return f"{value:.{max(digits, 0)}f}"


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


def _figure(name: str, figure: Figure, captions: Captions) -> dict[str, Any]:
    heading, caption = captions.get(name, (label(name), ""))
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
