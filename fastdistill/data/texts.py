# SPDX-License-Identifier: Apache-2.0
"""Texts of prompts: checks before they are encoded or written; files of prompts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdistill.data import tables
from fastdistill.errors import InputError, StorageError
from fastdistill.files import located

_COLUMNS = ("prompt", "caption", "text")


@dataclass(frozen=True)
class PromptFile:
    """The result of ``read_prompts``.

    texts: the prompts, in the order of the file. lines: the number of lines, or rows of a table, in the file. empty,
    duplicates: how many of them were left out.
    """

    texts: list[str]
    lines: int
    empty: int = 0
    duplicates: int = 0


def read_prompts(
    path: str | os.PathLike[str],
    *,
    column: str | None = None,
    strip: bool = True,
    unique: bool = True,
    skip_empty: bool = True,
) -> PromptFile:
    """Read the prompts of a file: text with one prompt per line, or a table (CSV or TSV with a header, JSON lines, or
    Parquet), if the name ends with ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet``.

    Text is UTF-8, with or without a byte order mark, and is not changed (no normalization); lines end with LF, CRLF or
    CR. Lines of JSON are objects or strings; empty lines are not counted. Memory holds only the prompts.

    Args:
        column: of a table. None: the only one, or the only one with the name prompt, caption or text.
        strip: remove white space at both ends of each prompt.
        unique: keep only the first of equal prompts. Otherwise each has its own row, and a random draw selects the text
            more often.
        skip_empty: leave out prompts of white space only. Otherwise they are treated like any other prompt.

    Raises:
        StorageError: the file cannot be read, is not UTF-8, has a row without a text (the line is named) or no prompts.
        InputError: a column that the table does not have, or no column if there is no obvious one.
    """
    file = located(path)
    kept: list[str] | dict[str, None] = {} if unique else []
    lines = empty = 0
    for _, (text,) in tables.read_rows(file, _column(file, column)):
        lines += 1
        text = text.strip() if strip else text
        if skip_empty and (not text or text.isspace()):
            empty += 1
        elif isinstance(kept, dict):
            kept[text] = None
        else:
            kept.append(text)
    texts = list(kept)
    if not texts:
        raise StorageError(f"{file}: expected at least one prompt, got {lines} lines without any")
    return PromptFile(texts, lines, empty, lines - empty - len(texts))


def listed(texts: Iterable[str], argument: str = "texts") -> list[str]:
    """The texts of any ordered iterable, such as a generator, a NumPy array or a pandas Series, as plain str.

    Raises:
        InputError: an item is not a str or cannot be written as UTF-8 (its position is named); ``texts`` is a single
            str, a mapping, a set or a table.
    """
    rule = "a list of at least one text"
    if isinstance(texts, str | bytes | Mapping | set | frozenset):
        raise InputError.of(argument, rule, repr(texts) if isinstance(texts, str) else f"a {type(texts).__name__}")
    if getattr(texts, "ndim", 1) != 1:
        raise InputError.of(argument, rule, f"{texts.ndim} axes")  # type: ignore[attr-defined]
    try:
        items = list(texts)
    except TypeError:
        raise InputError.of(argument, rule, type(texts).__name__) from None
    return [checked(text, f"{argument}[{place}]") for place, text in enumerate(items)]


def checked(text: Any, argument: str) -> str:
    """A text as a plain str; InputError if it is not a str or cannot be written as UTF-8."""
    if not isinstance(text, str):
        raise InputError.of(argument, "a str", f"{text!r} ({type(text).__name__})")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        bad = f"{text!r} (a lone surrogate at {error.start})"
        raise InputError.of(argument, "text that UTF-8 can write", bad) from None
    return str(text)


def warning(texts: list[str]) -> str | None:
    """A warning if some texts are empty or repeated, else None."""
    empty = sum(not text or text.isspace() for text in texts)
    duplicates = len(texts) - len(Counter(texts))
    if not (empty or duplicates):
        return None
    return (
        f"texts: {empty} empty and {duplicates} repeated texts get rows of their own and are drawn like any other "
        "(read_prompts leaves them out)"
    )


def _column(file: Path, column: str | None) -> tables.Pick:
    """Selects the column of the prompts."""

    def pick(names: list[str]) -> list[str]:
        if column is not None:
            return [tables.named(file, column, names)]
        found = names if len(names) == 1 else [name for name in names if name.strip().lower() in _COLUMNS]
        if names and (len(found) != 1 or len(found[0].split()) != 1):
            rule = f"the name of the column of prompts in {file}, one of {tables.spelled(names)}"
            raise InputError.of("column", rule, None)
        return found

    return pick
