# SPDX-License-Identifier: Apache-2.0
"""What was measured: for each kind of call the fastest backend, in memory and in one small file of the user's cache.

    {"schema": 1, "calls": {"<kind of call>": {"backend": "cudnn", "ms": {"cudnn": 0.41}, "refused": {"fa3": "why"}}}}

The file is replaced as a whole; what another process wrote in the meantime is kept.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

SCHEMA = 1
_calls: dict[str, dict[str, Any]] = {}
_PLACE = ("FASTDISTILL_CACHE", "XDG_CACHE_HOME", "HOME")
_read: tuple[str | None, ...] | None = None  # the variables that named the file when it was read


def path() -> Path:
    """``attention.json`` in FASTDISTILL_CACHE, or in ``fastdistill`` of XDG_CACHE_HOME or ``~/.cache``."""
    if folder := os.environ.get("FASTDISTILL_CACHE"):
        return Path(folder) / "attention.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdistill" / "attention.json"


def found(key: str) -> dict[str, Any] | None:
    """What was measured for this kind of call, here or by an earlier process."""
    global _read
    place = tuple(map(os.environ.get, _PLACE))
    if _read != place:
        _read = place
        _calls.clear()
        _calls.update(_load(path()))
    return _calls.get(key)


def _load(file: Path) -> dict[str, dict[str, Any]]:
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        if held["schema"] != SCHEMA:
            return {}
        calls: dict[str, dict[str, Any]] = held["calls"]
        if not all(isinstance(c["backend"], str) and isinstance(c["ms"], dict) for c in calls.values()):
            raise TypeError("a call without a backend")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"{file}: not a table of attention backends, measured again ({reason})", stacklevel=2)
        return {}
    return calls


def remember(key: str, result: dict[str, Any]) -> None:
    """Keep a measurement; a cache that cannot be written is named once in a warning, and kept in memory."""
    from fastdistill.errors import StorageError
    from fastdistill.files import atomic_write, make_directory

    found(key)
    _calls[key] = result
    file = path()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a file that was already named when it was first read
        merged = _load(file) | _calls
    try:
        make_directory(file.parent)
        atomic_write(file, json.dumps({"schema": SCHEMA, "calls": merged}, indent=1).encode())
    except StorageError as error:
        warnings.warn(f"the measured attention backends are not kept: {error}", stacklevel=2)
