# SPDX-License-Identifier: Apache-2.0
"""Row data on disk: a directory with ``manifest.json`` and safetensors shards; the one format of the package.

The manifest says what made the rows (fingerprint), how many are wanted, the tensors of a row, and for each shard its
size and SHA-256. Every file is written atomically and the manifest after each shard, so that whatever interrupts a
writer leaves a directory that the same call continues; a shard is read only when its checksum is right.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fastdistill.data import files
from fastdistill.data.fingerprint import differences, plain
from fastdistill.data.manifest import MANIFEST_NAME, Manifest, StoredFile, TensorSpec, read_manifest, shard_name
from fastdistill.errors import InputError, StorageError

_REMEDY = "run what made it again: only this file is made anew"


@dataclass(frozen=True)
class Span:
    """Rows ``start`` to ``stop`` (exclusive), the rows of shard ``index``."""

    index: int
    start: int
    stop: int


class RowWriter:
    """Writes (or continues) a directory of rows; use it in a ``with`` statement, which holds the directory's lock.

        with RowWriter(path, kind="latent_cache", fingerprint=..., rows=1000, tensors={"latents": spec}) as writer:
            for span in writer.missing:
                writer.write(span, {"latents": make(span.start, span.stop)})

    Shards that are already there and whole are kept; damaged ones are reported as a warning and are among ``missing``.
    Errors, all before anything is written: InputError for arguments that make no sense; StorageError where ``path``
    is not a directory, is not writable, is too small, is in use, or holds something made differently (the fields are
    named). ``attachments`` are small files that belong to the rows (name -> bytes).
    """

    def __init__(
        self,
        path: str | Path,
        *,
        kind: str,
        fingerprint: Mapping[str, Any],
        rows: int,
        tensors: Mapping[str, TensorSpec],
        rows_per_shard: int = 1024,
        attachments: Mapping[str, bytes] | None = None,
    ) -> None:
        if rows < 1:
            raise InputError.of("rows", "at least 1", rows)
        if rows_per_shard < 1:
            raise InputError.of("rows_per_shard", "at least 1", rows_per_shard)
        if not tensors:
            raise InputError.of("tensors", "at least one", "none")
        self.path = Path(path)
        self._attachments = dict(attachments or {})
        self._manifest = Manifest(
            kind=kind,
            fingerprint=plain(fingerprint),
            rows=rows,
            rows_per_shard=min(rows, rows_per_shard),
            tensors=dict(tensors),
            attachments={name: StoredFile.of(data) for name, data in self._attachments.items()},
        )
        self._row_bytes = sum(spec.row_bytes for spec in tensors.values())
        self._cleanup = contextlib.ExitStack()
        self._check()

    def __enter__(self) -> RowWriter:
        files.make_directory(self.path)
        with contextlib.ExitStack() as stack:
            stack.enter_context(files.locked(self.path))
            self._check()  # again, now that nobody else can change it
            files.sweep(self.path)
            self._manifest = replace(self._manifest, shards=self._good_shards())
            files.require_space(self.path, self._row_bytes * sum(span.stop - span.start for span in self.missing))
            for name, data in self._attachments.items():
                files.atomic_write(self.path / name, data)
            self._write_manifest()  # last, so that a manifest never lists an attachment that is not there
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._cleanup.close()

    @property
    def missing(self) -> list[Span]:
        """The shards still to be written, in order."""
        m = self._manifest
        return [
            Span(index, index * m.rows_per_shard, min((index + 1) * m.rows_per_shard, m.rows))
            for index in range(m.shard_count)
            if index not in m.shards
        ]

    @property
    def rows_done(self) -> int:
        """Rows in shards that are written and whole."""
        return self._manifest.rows - sum(span.stop - span.start for span in self.missing)

    def write(self, span: Span, tensors: Mapping[str, Tensor]) -> None:
        """Adds one shard: every tensor of the manifest, as [span.stop - span.start, *row shape] of its dtype."""
        m = self._manifest
        if tensors.keys() != m.tensors.keys():
            raise InputError.of("tensors", f"the names {sorted(m.tensors)}", sorted(tensors))
        for name, spec in m.tensors.items():
            _require(tensors[name], (span.stop - span.start, *spec.shape), spec.dtype, f"tensors[{name!r}]", InputError)
        data = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        files.atomic_write(self.path / shard_name(span.index), data)
        self._manifest = replace(m, shards={**m.shards, span.index: StoredFile.of(data)})
        self._write_manifest()

    def _write_manifest(self) -> None:
        files.atomic_write(self.path / MANIFEST_NAME, self._manifest.to_json().encode())

    def _check(self) -> None:
        """StorageError unless ``path`` can become, or already is, the directory that the manifest describes."""
        m = self._manifest
        if not os.path.isdir(self.path):
            if os.path.exists(self.path):
                raise StorageError(f"{self.path}: expected a directory, got a file")
            files.require_space(self.path, self._row_bytes * m.rows)
            return
        if not os.path.exists(self.path / MANIFEST_NAME):
            other = sorted(entry.name for entry in _entries(self.path) if not entry.name.startswith("."))
            other = [name for name in other if name not in m.attachments]  # written before the first manifest
            if other:
                raise StorageError(
                    f"{self.path}: expected an empty directory or one with {MANIFEST_NAME}, got one with {other[0]}"
                )
            return
        found = read_manifest(self.path)
        changed = differences(m.layout(), found.layout()) + differences(m.fingerprint, found.fingerprint)
        if changed:
            raise StorageError(
                f"{self.path}: holds a {found.kind} made differently ({'; '.join(changed)}); "
                "choose another directory, or delete this one to make it anew"
            )

    def _good_shards(self) -> dict[int, StoredFile]:
        if not os.path.exists(self.path / MANIFEST_NAME):
            return {}
        good = {}
        for index, stored in read_manifest(self.path).shards.items():
            try:
                read_stored(self.path / shard_name(index), stored)
                good[index] = stored
            except StorageError as error:
                warnings.warn(f"{error} (being made anew)", stacklevel=4)
        return good


def load_rows(
    path: str | Path,
    *,
    kind: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    verify: bool = True,
    check: Callable[[Manifest], object] | None = None,
) -> tuple[Manifest, dict[str, Tensor]]:
    """All rows of a complete directory: its manifest and name -> [rows, *row shape] on ``device``.

    Floating-point tensors come as ``dtype`` (None: as they are stored). StorageError, naming the file, for a
    directory that is not there, of another kind or unfinished, and for a shard that is missing, truncated or damaged;
    ``verify=False`` skips the checksums only. ``check`` may refuse a manifest, by raising, before any row is read.
    """
    path = Path(path)
    manifest = complete_manifest(path, kind, check)
    out = {
        name: torch.empty(
            (manifest.rows, *spec.shape),
            dtype=dtype if dtype is not None and spec.dtype.is_floating_point else spec.dtype,
            device=device,
        )
        for name, spec in manifest.tensors.items()
    }
    start = 0
    for index in range(manifest.shard_count):
        file, rows = path / shard_name(index), manifest.shard_rows(index)
        tensors = parse_shard(file, read_stored(file, manifest.shards[index], verify), manifest, rows)
        for name, tensor in tensors.items():
            out[name][start : start + rows].copy_(tensor)
        start += rows
    return manifest, out


def complete_manifest(path: Path, kind: str, check: Callable[[Manifest], object] | None = None) -> Manifest:
    """The manifest of a complete directory of this kind that ``check`` does not refuse; StorageError for any other."""
    manifest = read_manifest(path)
    if manifest.kind != kind:
        raise StorageError(f"{path}: expected a {kind}, got a {manifest.kind}")
    if check is not None:
        check(manifest)
    if not manifest.complete:
        done = sum(manifest.shard_rows(index) for index in manifest.shards)
        raise StorageError(
            f"{path}: unfinished: it has {done} of {manifest.rows} rows; run what made it again to go on from there"
        )
    return manifest


def load_attachment(path: str | Path, manifest: Manifest, name: str) -> bytes:
    """The bytes of a file that belongs to the rows; StorageError when it is not there or damaged."""
    if name not in manifest.attachments:
        raise StorageError(f"{path}: expected a file {name} in its manifest, got none")
    return read_stored(Path(path) / name, manifest.attachments[name])


def read_stored(file: Path, stored: StoredFile, verify: bool = True) -> bytes:
    """Reads once and checks what was read, so that what is used is what was checked."""
    try:
        size = file.stat().st_size
        if size != stored.size:
            raise StorageError(f"{file}: damaged: expected {stored.size} bytes, got {size}; {_REMEDY}")
        data = file.read_bytes()
    except FileNotFoundError:
        raise StorageError(f"{file}: missing: the manifest lists it, the directory lacks it; {_REMEDY}") from None
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{file}: could not be read: {files.reason(error)}") from error
    if verify:
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 != stored.sha256:
            raise StorageError(f"{file}: damaged: expected SHA-256 {stored.sha256}, got {sha256}; {_REMEDY}")
    return data


def parse_shard(file: Path, data: bytes, manifest: Manifest, rows: int) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise StorageError(f"{file}: damaged: {error}; {_REMEDY}") from error
    if tensors.keys() != manifest.tensors.keys():
        raise StorageError(f"{file}: expected the tensors {sorted(manifest.tensors)}, got {sorted(tensors)}")
    for name, spec in manifest.tensors.items():
        _require(tensors[name], (rows, *spec.shape), spec.dtype, f"{file}, tensor {name!r}", StorageError)
    return tensors


def _require(
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    what: str,
    error: type[InputError] | type[StorageError],
) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise error(f"{what}: expected {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")


def _entries(path: Path) -> list[Path]:
    try:
        return list(path.iterdir())
    except OSError as error:
        raise StorageError(f"{path}: could not be read: {files.reason(error)}") from error
