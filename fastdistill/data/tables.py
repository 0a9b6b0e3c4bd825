# SPDX-License-Identifier: Apache-2.0
"""Texts in files, row by row: lines of text, or columns of CSV, TSV, JSON lines and Parquet."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from fastdistill import files
from fastdistill.errors import FastdistillError, InputError, StorageError, described

Pick = Callable[[list[str]], list[str]]
_ABSENT = object()
_LONGEST = 60  # longest name in a message, in characters
_ARCHIVES = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar")


def read_rows(file: Path, pick: Pick) -> Iterator[tuple[str, list[str]]]:
    """The rows of a file, one at a time, as (position, texts). By the file name's ending: ``.csv``, ``.tsv``,
    ``.jsonl`` (or ``.ndjson``, ``.json``) and ``.parquet`` are tables; in any other file each line is a row with one
    text.

    ``pick`` gets the columns of the file (none if its rows are single texts), and returns those that are wanted.

    Raises:
        StorageError: a file that cannot be read or is not UTF-8, or a row that does not fit the first; with the line.
    """
    suffix = file.suffix.lower()
    if suffix in _ARCHIVES:
        raise StorageError(f"{file}: expected a file that is not compressed, got {suffix}")
    if suffix == ".parquet":
        return _parquet(file, pick)
    if suffix in (".csv", ".tsv"):
        return _separated(file, pick, "\t" if suffix == ".tsv" else ",")
    return _json_lines(file, pick) if suffix in (".jsonl", ".ndjson", ".json") else _lines(file, pick)


def named(file: Path, column: str, names: list[str]) -> str:
    """``column``; InputError if it is not among the ``names``."""
    if not names:
        raise InputError.of("column", f"none, as {file} is no table", spelled([column]))
    if column not in names:
        near = difflib.get_close_matches(column, names, n=1)
        hint = f" (near: {spelled(near)})" if near else ""
        raise InputError.of("column", f"one of {spelled(names)} in {file}{hint}", spelled([column]))
    return column


def _lines(file: Path, pick: Pick) -> Iterator[tuple[str, list[str]]]:
    pick([])
    for number, line in enumerate(_decoded(file, None), 1):
        yield f"line {number}", [line.removesuffix("\n")]


def _separated(file: Path, pick: Pick, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    reader = csv.reader(_decoded(file, ""), delimiter=delimiter, strict=True)
    first, header, places = 1, None, [0]
    try:
        for row in reader:
            where, first = f"line {first}", reader.line_num + 1
            if header is None:
                header = row
                _once(file, header)
                places = [header.index(name) for name in pick(header)]
            elif row or len(header) == 1:
                row = row or [""]
                if len(row) != len(header):
                    _refuse(file, where, f"{len(header)} cells as in its first line", len(row))
                yield where, [row[place] for place in places]
    except csv.Error as error:
        _refuse(file, f"line {first}", "cells separated and quoted as in CSV", error)


def _json_lines(file: Path, pick: Pick) -> Iterator[tuple[str, list[str]]]:
    columns: list[str] | None = None
    for number, line in enumerate(_decoded(file, None), 1):
        if not line.strip():
            continue
        where, row = f"line {number}", None
        try:
            row = files.json_value(line)
        except ValueError as error:
            _refuse(file, where, "a JSON value", error)
        if not isinstance(row, dict | str):
            _refuse(file, where, "a JSON object or string", described(row))
        if columns is None:
            columns = pick(list(row) if isinstance(row, dict) else [])
        if isinstance(row, dict) != bool(columns):
            _refuse(file, where, "an object" if columns else "a string", described(row))
        cells = {name: row.get(name, _ABSENT) for name in columns} if isinstance(row, dict) else {"": row}
        for name, cell in cells.items():
            if cell is _ABSENT:
                _refuse(file, where, f"a value for {spelled([name])}", f"only {spelled(row)}")
        yield where, [_text(file, where, name, cell) for name, cell in cells.items()]


def _parquet(file: Path, pick: Pick) -> Iterator[tuple[str, list[str]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        message = "pyarrow: expected to be installed for Parquet files; run: pip install 'fastdistill[tables]'"
        raise FastdistillError(message) from error
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            schema = table.schema_arrow
            _once(file, schema.names)
            columns = pick(schema.names)
            for name in columns:
                kind = schema.field(name).type
                kind = getattr(kind, "value_type", kind) if pyarrow.types.is_dictionary(kind) else kind
                if str(kind) not in ("string", "large_string", "string_view"):
                    _refuse(file, f"column {name!r}", "strings", kind)
            number = 0
            for batch in table.iter_batches(batch_size=4096, columns=columns):
                read = [iter(batch.column(name)) for name in columns]
                for cells in zip(*read, strict=True):
                    number += 1
                    where = f"row {number}"
                    yield where, [_cell(file, where, *pair) for pair in zip(columns, cells, strict=True)]
    except (OSError, pyarrow.ArrowException) as error:
        if isinstance(error, StorageError):
            raise
        reason = files.reason(error) if isinstance(error, OSError) else str(error).splitlines()[0]
        raise StorageError(f"{file}: could not be read: {reason}") from error


def _cell(file: Path, where: str, name: str, cell: Any) -> str:
    try:
        return _text(file, where, name, cell.as_py())
    except UnicodeDecodeError as error:
        _refuse(file, where, f"UTF-8 in {name!r}", f"other bytes ({error.reason})")


def _text(file: Path, where: str, name: str, cell: Any) -> str:
    place = where + (f", {name!r}" if name else "")
    if not isinstance(cell, str):
        _refuse(file, place, "a text", described(cell))
    try:
        cell.encode()
    except UnicodeEncodeError as error:
        _refuse(file, place, "text that UTF-8 can write", f"a lone surrogate at {error.start}")
    return cell


def _decoded(file: Path, newline: str | None) -> Iterator[str]:
    """The lines of a UTF-8 file with their line ends, as for ``open(newline=)``; without a byte order mark."""
    try:
        with file.open(encoding="utf-8-sig", newline=newline) as lines:
            yield from lines
    except UnicodeDecodeError:
        number, reason = _undecodable(file)
        _refuse(file, f"line {number}", "UTF-8", f"other bytes ({reason})")
    except OSError as error:
        raise StorageError(f"{file}: could not be read: {files.reason(error)}") from error


def _undecodable(file: Path) -> tuple[int, str]:
    """The first line that is not UTF-8, and the reason."""
    number = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return number, error.reason
    return number, "changed while it was read"


def _once(file: Path, names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise StorageError(f"{file}: expected columns of different names, got {twice!r} twice")


def spelled(names: Iterable[str]) -> str:
    """At most twenty names for a message, long ones shortened."""
    shown = [name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..." for name in names]
    return ", ".join(map(repr, shown[:20])) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")


def _refuse(file: Path, where: str, rule: object, value: object) -> NoReturn:
    raise StorageError(f"{file}, {where}: expected {rule}, got {value}")
