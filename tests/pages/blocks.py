# SPDX-License-Identifier: Apache-2.0
"""The code on the pages of the documentation: fenced blocks, and commands between backticks in the text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: The kinds of fenced blocks; ``text`` is output or a drawing in letters.
LANGUAGES = ("bash", "python", "yaml", "text")
_FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_NEEDS = re.compile(r"\A(?:#!.*\n)?# needs (.+)\n")
_FILE = re.compile(r"\A# (\w+\.py)\n")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    needs: what it needs but the tests do not have, from its first line (``# needs ...``); else empty. file: the name of
    the file that it is, from its first line (``# train.py``).
    """

    language: str
    text: str
    line: int
    needs: str
    file: str


def pages() -> list[str]:
    """The paths of all pages with their own code: README, CONTRIBUTING and the site, without the API reference."""
    found = sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / "docs").glob("*.md"))
    return ["README.md", "CONTRIBUTING.md", *found]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    text = read(page)
    for found in _FENCE.finditer(text):
        needs, file = _NEEDS.match(found[2]), _FILE.match(found[2])
        line = text.count("\n", 0, found.start()) + 1
        yield Block(found[1], found[2], line, needs[1] if needs else "", file[1] if file else "")


def prose(page: str) -> str:
    """A page without its blocks."""
    return _FENCE.sub("", read(page))


def inline(page: str) -> Iterator[str]:
    """The texts between single backticks, on one line or two."""
    for found in re.finditer(r"(?<!`)`([^`]+)`(?!`)", prose(page)):
        yield " ".join(found[1].split())
