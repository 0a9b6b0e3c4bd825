# SPDX-License-Identifier: Apache-2.0
"""The files of results: one CSV a device, appended to and never overwritten."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from benchmarks.measure import FIELDS, Row

RESULTS = Path(__file__).parent / "results"


def read(path: Path) -> list[Row]:
    """The rows of a file, with "" for columns that it does not have."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [dict.fromkeys(FIELDS, "") | found for found in csv.DictReader(file)]


def append(path: Path, rows: Iterable[Row]) -> None:
    """Rows after those of a file. A file of fewer columns is given the new ones; its rows stay as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = path.open(encoding="utf-8").readline().strip().split(",") if path.exists() else None
    if header is not None and header != FIELDS:
        before = read(path)
        path.unlink()
        append(path, before)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each op, shape, dtype, mode, thread count and rival."""
    newest: dict[tuple[str, ...], Row] = {}
    for row in rows:
        newest[tuple(str(row[k]) for k in ("op", "shape", "dtype", "mode", "threads", "rival"))] = row
    return list(newest.values())
