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
        found = [dict.fromkeys(FIELDS, "") | row for row in csv.DictReader(file)]
    for row in found:
        row["mode"] = row["mode"] or "eager"  # the only one there was before it had a column
    return found


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


def latest(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of the last measurement of each op, shape, dtype, mode and thread count; those that only say why there
    is none where there never was one. Comparisons of two commits are left out."""
    newest: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["rival"].startswith("base "):
            continue
        key = tuple(row[k] for k in ("op", "shape", "dtype", "mode", "threads"))
        before = newest.setdefault(key, [])
        if before and before[0]["ours_ms"] and not row["ours_ms"]:
            continue
        if before and any(row[k] != before[0][k] for k in ("date", "commit", "ours_ms")):
            before.clear()
        before.append(row)
    return sorted(newest.values(), key=lambda some: some[0]["op"])
