# SPDX-License-Identifier: Apache-2.0
"""Prompt files: the texts that are read can be written as UTF-8 and are in the file's order; other lines are
refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow
import pyarrow.parquet

from fastdistill.data.texts import PromptFile, read_prompts
from tests.fuzz.damage import BYTES, DEEP, VALUES, damaged, read
from tests.fuzz.stored import Parts, folder

CELLS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ("a photo", "", " ", "\0", "\ufeff", "a,b", '"', '"a""b"', "a\r\nb", "\u2028", "\U0001f600", "é" * 99)
    ),
    st.sampled_from(("\ud800", "x" * 200_000)),
)
ENDS = st.sampled_from(("\n", "\r\n", "\r", "\n\n", "\x0b", "\x85", ""))
OPTIONS = st.fixed_dictionaries({
    "column": st.sampled_from((None, None, "prompt", "caption", "nothing", "")),
    "strip": st.booleans(), "unique": st.booleans(), "skip_empty": st.booleans(),
})  # fmt: skip


def _check(name: str, path: Path, options: dict[str, Any], counts: Counter[str], what: str) -> None:
    found = read(name, lambda: read_prompts(path, **options), counts, what)
    if isinstance(found, PromptFile):
        assert found.texts and found.lines == len(found.texts) + found.empty + found.duplicates
        "".join(found.texts).encode()


def texts() -> Parts:
    """Lines of text with unusual line ends and bytes."""
    lines = st.lists(st.tuples(CELLS, ENDS), max_size=6)
    drawn = st.tuples(lines, st.sampled_from((b"", b"\xef\xbb\xbf", b"\xff\xfe")), st.none() | BYTES, OPTIONS)

    def check(example: Any, counts: Counter[str]) -> None:
        pairs, mark, change, options = example
        data = mark + "".join(cell + end for cell, end in pairs).encode("utf-8", "surrogatepass")
        path = folder() / "prompts.txt"
        path.write_bytes(data if change is None else damaged(data, change))
        _check("text", path, options, counts, repr(example)[:1000])

    return drawn, check


def tables() -> Parts:
    """CSV, TSV, JSON lines and Parquet."""
    names = st.lists(st.sampled_from(("prompt", "caption", "text", "x", "", " Prompt ")), min_size=1, max_size=3)
    rows = st.lists(st.lists(st.one_of(CELLS, VALUES), max_size=3), max_size=5)
    kinds = st.sampled_from(("csv", "tsv", "jsonl", "parquet", "json"))
    drawn = st.tuples(kinds, names, rows, ENDS, st.none() | BYTES, OPTIONS, st.integers(0, 99))

    def check(example: Any, counts: Counter[str]) -> None:
        kind, header, cells, end, change, options, deep = example
        data = _table(kind, header, cells, end or "\n")
        if deep == 99:
            data += b"\n" + DEEP.encode()
        path = folder() / f"prompts.{kind}"
        path.write_bytes(data if change is None else damaged(data, change))
        _check(kind, path, options, counts, repr(example)[:1000])

    return drawn, check


def _table(kind: str, header: list[str], rows: list[list[Any]], end: str) -> bytes:
    if kind in ("jsonl", "json"):
        lines = [json.dumps(dict(zip(header, row, strict=False)) if len(row) != 1 else row[0]) for row in rows]
        return end.join(lines).encode()
    if kind == "parquet":
        columns = [[row[i] if i < len(row) else None for row in rows] for i in range(len(header))]
        sink = pyarrow.BufferOutputStream()
        try:
            table = pyarrow.Table.from_arrays([pyarrow.array(column) for column in columns], names=header)
            pyarrow.parquet.write_table(table, sink)
        except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError, TypeError, ValueError):
            return b"PAR1" + repr(rows).encode("utf-8", "replace")
        return sink.getvalue().to_pybytes()
    delimiter = "," if kind == "csv" else "\t"
    lines = [delimiter.join(header), *(delimiter.join(map(str, row)) for row in rows)]
    return end.join(lines).encode("utf-8", "surrogatepass")
