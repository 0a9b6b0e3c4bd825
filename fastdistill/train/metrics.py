# SPDX-License-Identifier: Apache-2.0
"""The file with the metrics of a run: one JSON line per log interval."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from fastdistill.errors import StorageError
from fastdistill.files import json_value, reason
from fastdistill.schemas import LINES
from fastdistill.train.callbacks import Metrics

METRICS = "metrics.jsonl"  # file of a run
_NEEDED = {"step", "loss", "seconds", "skipped"}  # in each of its lines


def line_of(metrics: Metrics) -> str:
    """A line of the file. Each line states the schema, because any part of the file may be missing after a kill."""
    return json.dumps({"schema": LINES.version, **metrics}) + "\n"


def read_metrics(path: Path) -> list[Metrics]:
    """The complete lines of a ``metrics.jsonl``; damaged lines (by a kill, the disk, an editor) are skipped.

    Raises:
        StorageError: it cannot be read, or a newer fastdistill wrote it.
    """
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise StorageError(f"{path}: could not be read: {reason(error)}") from error
    metrics: list[Metrics] = []
    for line in lines:
        with contextlib.suppress(ValueError):  # no JSON, or no UTF-8
            found = json_value(line)
            if isinstance(found, dict):
                LINES.check(found.pop("schema", 1), path)
                metrics += [found] if _is_line(found) else []
    return metrics


def _is_line(found: dict[str, Any]) -> bool:
    if not found.keys() >= _NEEDED or not all(map(_is_finite, found.values())):
        return False
    return isinstance(found["step"], int) and found["step"] > 0


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # False of NaN
