# SPDX-License-Identifier: Apache-2.0
"""Stored measurements: for each kind of call the fastest backend, in memory and in one small file of the user's cache.

    {"schema": 1, "calls": {"<kind of call>": {"backend": "cudnn", "ms": {"cudnn": 0.41}, "refused": {"fa3": "why"}}}}

The file is replaced as a whole; entries that another process wrote in the meantime are kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

from fastdistill.errors import StorageError
from fastdistill.schemas import TABLE

NAME = "attention.json"
measuring = threading.RLock()  # only one thread of a process at a time measures, or reads or writes the file
_calls: dict[str, dict[str, Any]] = {}
_PLACE = ("FASTDISTILL_CACHE", "XDG_CACHE_HOME", "HOME")
_read: tuple[str | None, ...] | None = None  # the environment variables when the file was read; they determine its path


def path() -> Path:
    """``attention.json`` in FASTDISTILL_CACHE, or in ``fastdistill`` of XDG_CACHE_HOME or ``~/.cache``. If there is no
    home directory or it is not writable, in a folder of the user in the directory for temporary files."""
    return _place()[0] / NAME


def _place() -> tuple[Path, str | None]:
    """The folder, and the reason if it is not the user's cache."""
    folder = _folder()
    if folder is not None and _can_be_written(folder):
        return folder, None
    why = "there is no home directory" if folder is None else f"{folder} cannot be written to"
    return Path(tempfile.gettempdir()) / f"fastdistill-{os.getuid()}", why


def _folder() -> Path | None:
    from fastdistill.files import located

    if folder := os.environ.get("FASTDISTILL_CACHE"):
        return located(folder, "FASTDISTILL_CACHE")
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return located(cache, "XDG_CACHE_HOME") / "fastdistill"
    try:
        return Path.home() / ".cache" / "fastdistill"
    except RuntimeError:  # no HOME, and the user is not in the password database
        return None


def _can_be_written(folder: Path) -> bool:
    """Create the folder: this is a better test than the permissions of its parents."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _is_own(folder: Path) -> bool:
    """Whether the folder belongs to this user: anybody can create a temporary folder of this name."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def found(key: str) -> dict[str, Any] | None:
    """The measurement of this kind of call, from this or an earlier process; None if there is none."""
    global _read
    place = tuple(map(os.environ.get, _PLACE))
    if _read != place:
        with measuring:
            if _read != place:
                calls = _load_all()
                _calls.clear()
                _calls.update(calls)
                _read = place
    return _calls.get(key)


def _load_all() -> dict[str, dict[str, Any]]:
    """All measurements, from the cache (which may be read-only) and from the folder that replaces it."""
    folder = _folder()
    calls = {} if folder is None else _load(folder / NAME)
    with contextlib.suppress(OSError):  # there may be no directory for temporary files
        stand_in, why = _place()
        if why and _is_own(stand_in):
            calls |= _load(stand_in / NAME)
    return calls


def _load(file: Path, *, named: bool = False) -> dict[str, dict[str, Any]]:
    """``named``: if the file is not a table, a warning was given already."""
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        if held["schema"] != TABLE.version:  # only a cache: measure again
            return {}
        calls: dict[str, dict[str, Any]] = held["calls"]
        if not all(isinstance(c["backend"], str) and isinstance(c["ms"], dict) for c in calls.values()):
            raise TypeError("a call without a backend")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if not named:
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(f"{file}: not a table of attention backends, measured again ({reason})", stacklevel=2)
        return {}
    return calls


def remember(key: str, result: dict[str, Any]) -> None:
    """Store a measurement, in memory if no file can be written; a warning tells if it is not in the cache."""
    from fastdistill.files import atomic_write

    with measuring:
        found(key)
        _calls[key] = result
        try:
            folder, why = _place()
            if why:
                _make_own(folder)
            merged = _load(folder / NAME, named=True) | _calls
            content = {"schema": TABLE.version, "calls": merged}
            atomic_write(folder / NAME, json.dumps(content, indent=1).encode())
        except OSError as error:  # a StorageError, or no directory for temporary files
            _warn_once(f"the measured attention backends are not kept: {error}")
            return
        if why:
            kept = f"the measured attention backends are kept in {folder / NAME}"
            _warn_once(f"{why}: {kept} (FASTDISTILL_CACHE names another folder)")


def _make_own(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: the directory could not be created: {error.strerror}") from error
    if not _is_own(folder):
        raise StorageError(f"{folder}: expected a directory of this user's, got another's")


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)
