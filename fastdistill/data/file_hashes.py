# SPDX-License-Identifier: Apache-2.0
"""Hashes of files by content; a file is read again only if it has changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from fastdistill import files, schemas
from fastdistill.data.fingerprint import sha256_of_json
from fastdistill.errors import StorageError

_NOTES = ("transformers_version",)  # fields about the package that wrote a file, as are those with "_"


class FileHashes:
    """SHA-256 of files, the same on every machine and in every folder.

    ``memo``: a file that stores the hashes with the size, inode and last change of each file, so that large files are
    read only once; None: no such file.
    """

    def __init__(self, memo: Path | None = None) -> None:
        self._memo = memo
        self._known: dict[str, str] = {}
        if memo is not None:
            with contextlib.suppress(OSError, ValueError):
                found = files.json_value(memo.read_text(encoding="utf-8"))
                if found.get("schema", 1) == schemas.HASHES.version:  # other versions: all files are read again
                    known = found.get("hashes", found)  # before 0.1.0 the file had only the hashes
                    self._known = {str(key): str(value) for key, value in known.items()}

    def of(self, paths: Iterable[Path]) -> str:
        """The hash of several files and their names; of JSON files the values count, except for fields about the
        package that wrote them.

        Raises:
            StorageError: a file cannot be read.
        """
        given = list(paths)
        return sha256_of_json(dict(zip((path.name for path in given), self.each(given), strict=True)))

    def each(self, paths: Iterable[Path]) -> list[str]:
        """The hash of each file. All hashes are stored in the memo, even if a later file cannot be read.

        Raises:
            StorageError: a file cannot be read.
        """
        before = len(self._known)
        try:
            return [self._of(path) for path in paths]
        finally:
            if len(self._known) > before:
                self._remember()

    def _of(self, path: Path) -> str:
        try:
            status = path.stat()
            key = f"{path.resolve()} {status.st_size} {status.st_ino} {status.st_mtime_ns}"
            if key not in self._known:
                self._known[key] = _content(path)
        except OSError as error:
            raise StorageError(f"{path}: could not be read: {files.reason(error)}") from error
        return self._known[key]

    def _remember(self) -> None:
        if self._memo is not None and self._memo.parent.is_dir():
            content = {"schema": schemas.HASHES.version, "hashes": self._known}
            with contextlib.suppress(StorageError):  # if the memo cannot be written, files are read again
                files.atomic_write(self._memo, json.dumps(content, indent=0).encode())


def _content(path: Path) -> str:
    if path.suffix == ".json":
        with contextlib.suppress(ValueError):
            value = files.json_value(path.read_bytes())
            if isinstance(value, dict):
                value = {key: v for key, v in value.items() if not key.startswith("_") and key not in _NOTES}
            return sha256_of_json(value)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
