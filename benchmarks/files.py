# SPDX-License-Identifier: Apache-2.0
"""The result files: one CSV per device; rows are appended, never overwritten."""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections.abc import Iterable
from pathlib import Path

from benchmarks.measure import FIELDS, Row
from fastdistill.errors import InputError

RESULTS = Path(__file__).parent / "results"


def read(path: Path, needed: Iterable[str] = ()) -> list[Row]:
    """The rows of a file, with "" for columns that it does not have.

    Raises:
        InputError: it has an unknown column, lacks one that is ``needed``, or a ratio is not a number.
    """
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or ())
        if strange := [column for column in columns if column not in FIELDS]:
            raise InputError.of(f"{path}", f"columns of {', '.join(FIELDS)}", ", ".join(strange))
        if missing := [column for column in needed if column not in columns]:
            raise InputError.of(f"{path}", f"the columns {', '.join(missing)} too", ", ".join(columns) or "none")
        found = []
        for row in reader:
            if None in row or None in row.values() or not re.fullmatch(r"(\d+(\.\d+)?)?", row.get("ratio", "")):
                where = f"{path}, line {reader.line_num}"
                raise InputError.of(where, f"{len(columns)} values, the ratio a number", list(row.values()))
            found.append(dict.fromkeys(FIELDS, "") | row)
    for row in found:
        row["mode"] = row["mode"] or "eager"  # older files have no column for the mode; all their rows are eager
    return found


def append(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to a file. If it lacks columns, they are added; its old rows keep their values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = path.open(encoding="utf-8").readline().strip().split(",") if path.exists() else None
    if header is not None and header != FIELDS:
        before = read(path)
        path.unlink()
        append(path, before)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def append_parts(path: Path, rows: Iterable[Row]) -> None:
    """Append where the milliseconds of training steps went, one line of JSON per contestant, next to the CSV
    ``path``."""
    about = "date op shape dtype threads torch commit".split()
    with contextlib.ExitStack() as stack:
        file = None
        for row in rows:
            for side in ("ours", "rival"):
                if parts := row.get(f"{side}_parts"):
                    file = file or stack.enter_context(path.with_suffix(".steps.jsonl").open("a", encoding="utf-8"))
                    name = "ours" if side == "ours" else row["rival"]
                    line = {key: row[key] for key in about} | {"contestant": name}
                    line |= {"ms": {group: round(ms, 4) for group, ms in parts.items()}}
                    file.write(json.dumps(line) + "\n")


def latest_parts(path: Path) -> list[Row]:
    """The last line of every contestant at every size, from the file next to the CSV ``path``."""
    beside = path.with_suffix(".steps.jsonl")
    lines = [json.loads(line) for line in beside.read_text(encoding="utf-8").splitlines()] if beside.exists() else []
    newest: dict[tuple[str, ...], Row] = {}
    for line in lines:
        newest[tuple(str(line[k]) for k in ("op", "shape", "dtype", "threads", "contestant"))] = line
    return list(newest.values())


def latest(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of the last run of each op, shape, dtype, mode and thread count, one per rival. Rows that only give the
    reason for a missing measurement are used if there never was one. Comparisons of two commits are left out."""
    newest: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["rival"].startswith("base "):
            continue
        key = tuple(row[k] for k in ("op", "shape", "dtype", "mode", "threads"))
        before = newest.setdefault(key, [])
        if before and before[0]["ours_ms"] and not row["ours_ms"]:
            continue
        if before and any(row[k] != before[0][k] for k in ("date", "run", "commit")):
            before.clear()
        before[:] = [other for other in before if other["rival"] != row["rival"]] + [row]
    return sorted(newest.values(), key=lambda some: some[0]["op"])
