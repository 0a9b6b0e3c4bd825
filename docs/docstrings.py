# SPDX-License-Identifier: Apache-2.0
"""An extension of griffe: docstrings of the package as lists of parameters.

In the sources an entry may name several parameters (``k, v: ...``), a line may hold several entries
(``lr: ... eps: ...``), and the text of a dataclass may list its fields without a heading. The reference gets one entry
for each.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any

import griffe

HEADINGS = ("Args:", "Attributes:")


class Separated(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        _rewrite(func, [parameter.name.lstrip("*") for parameter in func.parameters])

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        names = [name for name, member in cls.members.items() if not name.startswith("__")]
        if "__init__" in cls.members and cls.members["__init__"].is_function:
            names += [parameter.name for parameter in cls.members["__init__"].parameters]
        _rewrite(cls, names)


def _rewrite(found: griffe.Object, names: Iterable[str]) -> None:
    if found.docstring is not None:
        found.docstring.value = separated(found.docstring.value, set(names))


def separated(text: str, names: set[str]) -> str:
    """A docstring with one entry for each parameter, a line each."""
    lines, result = text.splitlines(), []
    place = 0
    while place < len(lines):
        line = lines[place]
        place += 1
        if line in HEADINGS:
            block, place = _block(lines, place, lambda line: line.startswith(" ") or not line)
            result += _section(line, [line[4:] for line in block], names)
        elif _begins(line, names):
            block, place = _block(lines, place - 1, bool)
            result += _section("Attributes:", [line if _begins(line, names) else f" {line}" for line in block], names)
        else:
            result.append(line)
    return "\n".join(result).strip()


def _block(lines: list[str], place: int, belongs: Callable[[str], bool]) -> tuple[list[str], int]:
    end = place
    while end < len(lines) and belongs(lines[end]):
        end += 1
    return lines[place:end], end


def _begins(line: str, names: set[str]) -> bool:
    """Whether a line begins with the entry of a parameter."""
    found = re.match(r"(\w+(?:, \w+)*): ", line)
    return found is not None and names.issuperset(found[1].split(", "))


def _section(heading: str, lines: list[str], names: set[str]) -> list[str]:
    """A section, and after it what is no entry."""
    joined: list[str] = []
    for line in lines:
        if line.startswith(" ") and joined:
            joined[-1] += f" {line.strip()}"
        elif line:
            joined.append(line)
    entries: dict[str, str] = {}
    others: list[str] = []
    for line in joined:
        for part in _parts(line, names):
            if found := re.match(r"(\*{0,2}\w+(?:, \w+)*): (.*)", part):
                entries |= dict.fromkeys(found[1].split(", "), found[2])
            else:
                others.append(part)
    result = [heading, *(f"    {name}: {text}" for name, text in entries.items()), ""] if entries else []
    return [*result, *(line for other in others for line in (other, ""))]


def _parts(line: str, names: set[str]) -> list[str]:
    """A line cut where the entry of another parameter begins."""
    cuts = [
        match.start(1)
        for match in re.finditer(r"[.;] ((\w+(?:, \w+)*): )", line)
        if names.issuperset(match[2].split(", "))
    ]
    edges = [0, *cuts, len(line)]
    return [line[start:end].strip().rstrip(";") for start, end in itertools.pairwise(edges)]
