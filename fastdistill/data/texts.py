# SPDX-License-Identifier: Apache-2.0
"""Texts of prompts: checked before anything is encoded or written; files with one prompt per line."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdistill import files
from fastdistill.errors import InputError, StorageError


@dataclass(frozen=True)
class PromptFile:
    """The result of ``read_prompts``.

    texts: the prompts, in the order of the file. lines: how many lines the file has. empty, duplicates: how many of
    them were left out.
    """

    texts: list[str]
    lines: int
    empty: int = 0
    duplicates: int = 0


def read_prompts(
    path: str | os.PathLike[str], *, strip: bool = True, unique: bool = True, skip_empty: bool = True
) -> PromptFile:
    """Read the prompts of a UTF-8 text file, one per line.

    A byte order mark is skipped; lines end in LF, CRLF or CR.

    Args:
        strip: remove white space at both ends of each line.
        unique: keep only the first of equal lines. Otherwise each is a prompt of its own, and a random draw finds that
            text more often.
        skip_empty: leave out lines of white space alone. Otherwise each is a prompt like any other.

    Raises:
        StorageError: the file cannot be read, is not UTF-8 (the line is named), or has no prompts.
    """
    file = Path(path)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise StorageError(f"{file}: could not be read: {files.reason(error)}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise StorageError(f"{file}: expected UTF-8, got other bytes in line {line} ({error.reason})") from None
    lines = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n") if text else []
    kept = [line.strip() for line in lines] if strip else lines
    if skip_empty:
        kept = [line for line in kept if line and not line.isspace()]
    texts = list(dict.fromkeys(kept)) if unique else kept
    if not texts:
        raise StorageError(f"{file}: expected at least one prompt, got {len(lines)} lines without any")
    return PromptFile(texts, len(lines), empty=len(lines) - len(kept), duplicates=len(kept) - len(texts))


def listed(texts: Iterable[str], argument: str = "texts") -> list[str]:
    """The texts of any iterable with an order, such as a generator, a NumPy array or a pandas Series, as plain str.

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
