# SPDX-License-Identifier: Apache-2.0
"""Row data on disk: a directory with ``manifest.json`` and safetensors shards; the only such format of the package.

The manifest has the origin of the rows (fingerprint), their total number, the tensors of a row, and the size and
SHA-256 of each shard. Every file is written atomically, and the manifest after each shard. So after any interruption
the same call continues the directory, and only shards with the right checksum are used. Any number of processes that
make the same call at the same time share its work by shards, without communication.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fastdistill import files
from fastdistill.data.fingerprint import differences, plain
from fastdistill.data.manifest import MANIFEST_NAME, Manifest, StoredFile, TensorSpec, read_manifest, shard_name
from fastdistill.data.shard_file import REMEDY, layout, read_shard
from fastdistill.data.values import cast, require_dtype, spelled
from fastdistill.errors import InputError, StorageError

_WRITERS = ".writers"
_PATIENCE = 0.2  # seconds between two checks of the other writers' progress
_LONG = 60.0  # seconds without a new shard after which a warning names the writers of the missing ones


@dataclass(frozen=True)
class Span:
    """Rows ``start`` to ``stop`` (exclusive), the rows of shard ``index``."""

    index: int
    start: int
    stop: int


class RowWriter:
    """Writes (or continues) a directory of rows; use it in a ``with`` statement.

        with RowWriter(path, kind="latent_cache", fingerprint=..., rows=1000, tensors={"latents": spec}) as writer:
            for span in writer.claims():
                writer.write(span, {"latents": make(span.start, span.stop)})

    Existing valid shards are kept; damaged ones are reported in a warning and are part of ``missing``. Several writers,
    in any processes, share the shards. Errors, all before anything is written: InputError for invalid arguments;
    StorageError if ``path`` is not a directory, is not writable, has too little space, or has contents of another
    origin (the fields are named). ``attachments`` are small files that belong to the rows (name -> bytes).
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
        for name, spec in tensors.items():
            if spelled(spec.dtype) is None:
                raise InputError.of(f"tensors[{name!r}]", "a dtype that safetensors stores", spec.dtype)
        self.path = files.located(path)
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
        self._claimed: tuple[int, Path, int] | None = None  # shard, its lock file and the open descriptor of the lock
        self._read: tuple[int, int, int] | None = None  # identifies the manifest on disk whose shards ``_manifest`` has
        self._check()

    def __enter__(self) -> RowWriter:
        files.make_directory(self.path)
        with contextlib.ExitStack() as stack:
            with files.locked(self.path, wait=True):
                self._check()  # again, now that no other process can change it
                alone = files.lock(self.path / _WRITERS)
                others = None if alone is not None else files.lock(self.path / _WRITERS, shared=True, wait=True)
                stack.callback(os.close, alone if others is None else others)  # type: ignore[arg-type]
                if alone is None:
                    self._refresh()
                else:
                    self._prepare()
                    fcntl.flock(alone, fcntl.LOCK_SH)
            stack.callback(self._release)
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
        """Number of rows in shards that are written and valid."""
        m = self._manifest
        return sum(m.shard_rows(index) for index in m.shards)

    def claims(self, waiting: Callable[[], object] = lambda: None) -> Iterator[Span]:
        """The missing shards that no other writer has claimed, each to be written before the next; ends when all shards
        are written, by any writer.

        If a writer fails or is killed, the others write its shards. ``waiting`` is called a few times per second while
        others write the last ones.
        """
        told, progressed = set[int](), time.monotonic()
        while missing := self.missing:
            mine = False
            for span in missing:
                if span.index not in self._manifest.shards and self._claim(span):
                    mine = True
                    yield span
                    self._release()
            if not mine:
                time.sleep(_PATIENCE)
                waiting()
                if time.monotonic() - progressed > _LONG:
                    self._tell(span.index for span in missing if span.index not in told)
                    told |= {span.index for span in missing}
            self._refresh()
            if len(self.missing) < len(missing):
                progressed = time.monotonic()

    def _tell(self, shards: Iterable[int]) -> None:
        """Warns about shards that other writers are making, and names the writers."""
        for index in shards:
            who = files.holder(self._lock(index))
            told = (
                f"waiting for {shard_name(index)}, which {who} makes; end that process if it hangs, and it is made here"
            )
            warnings.warn(f"{self.path}: {told}", stacklevel=4)

    def _lock(self, index: int) -> Path:
        return self.path / _lock_name(index)

    def write(self, span: Span, tensors: Mapping[str, Tensor]) -> None:
        """Adds one shard: every tensor of the manifest, as [span.stop - span.start, *row shape] of its dtype."""
        m = self._manifest
        if tensors.keys() != m.tensors.keys():
            raise InputError.of("tensors", f"the names {sorted(m.tensors)}", sorted(tensors))
        for name, spec in m.tensors.items():
            shape, tensor = (span.stop - span.start, *spec.shape), tensors[name]
            if tuple(tensor.shape) != shape or tensor.dtype != spec.dtype:
                got = f"{tensor.dtype} {tuple(tensor.shape)}"
                raise InputError.of(f"tensors[{name!r}]", f"{spec.dtype} {shape}", got)
        data = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        files.atomic_write(self.path / shard_name(span.index), data)
        with files.locked(self.path, wait=True):
            self._refresh()
            m = self._manifest
            self._manifest = replace(m, shards={**m.shards, span.index: StoredFile.of(data)})
            self._write_manifest()

    def _claim(self, span: Span) -> bool:
        """Whether this writer may write the shard: no other writer is writing it, or has written it."""
        path = self._lock(span.index)
        descriptor = files.lock(path)
        if descriptor is None:
            return False
        files.sign(descriptor)
        self._claimed = (span.index, path, descriptor)
        self._refresh()
        if span.index in self._manifest.shards:
            self._release()
            return False
        return True

    def _release(self) -> None:
        if self._claimed is not None:
            index, path, descriptor = self._claimed
            self._claimed = None
            if index in self._manifest.shards:  # processes that opened the lock file before notice it now
                with contextlib.suppress(OSError):
                    path.unlink()
            os.close(descriptor)

    def _prepare(self) -> None:
        """While there is no other writer: checks the existing files; the manifest then lists the valid ones."""
        files.sweep(self.path)
        self._manifest = replace(self._manifest, shards=self._good_shards())
        files.require_space(self.path, self._row_bytes * (self._manifest.rows - self.rows_done))
        for name, data in self._attachments.items():
            files.atomic_write(self.path / name, data)
        self._write_manifest()  # last, so that the manifest never lists a missing attachment
        tidy(self.path)

    def _refresh(self) -> None:
        """Reads the manifest on disk, to which other writers have added shards."""
        if (mark := self._mark()) != self._read:
            self._manifest = replace(self._manifest, shards=read_manifest(self.path).shards)
            self._read = mark

    def _mark(self) -> tuple[int, int, int]:
        """Identifies the present version of a file."""
        try:
            status = os.stat(self.path / MANIFEST_NAME)
        except OSError as error:
            raise StorageError(f"{self.path / MANIFEST_NAME}: could not be read: {files.reason(error)}") from error
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _write_manifest(self) -> None:
        files.atomic_write(self.path / MANIFEST_NAME, self._manifest.to_json().encode())
        self._read = self._mark()

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
            other = [name for name in other if name not in m.attachments]  # these are written before the first manifest
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
        found = read_manifest(self.path)
        damaged = damaged_shards(self.path, found)
        for error in damaged.values():
            warnings.warn(f"{error} (being made anew)", stacklevel=5)
        return {index: stored for index, stored in found.shards.items() if index not in damaged}


def tidy(path: Path) -> None:
    """Removes what killed writers left in a directory of rows: temporary files without a writer, and locks of finished
    shards. It can be called at any time; files that cannot be removed stay."""
    files.sweep(path)
    with contextlib.suppress(OSError):
        done = {_lock_name(index) for index in read_manifest(path).shards}
        for lock in path.glob(".*.lock"):
            if lock.name in done:
                lock.unlink(missing_ok=True)


def _lock_name(index: int) -> str:
    return f".{shard_name(index)}.lock"


def damaged_shards(path: Path, manifest: Manifest) -> dict[int, StorageError]:
    """The listed shards that are missing or damaged, each with the reason; all shards are read."""
    found = {}
    for index, stored in manifest.shards.items():
        try:
            for _ in read_shard(path / shard_name(index), stored, manifest, manifest.shard_rows(index)):
                pass
        except StorageError as error:
            found[index] = error
    return found


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

    Floating-point tensors are returned as ``dtype`` (None: as stored). In addition to the result, memory holds one
    block of a shard at a time. ``check`` may raise an error for a manifest before any row is read.

    Raises:
        StorageError: naming the file, for a directory that is missing, of another kind or unfinished, and for a shard
            that is missing, truncated or damaged; ``verify=False`` skips only the checksums.
        InputError: ``dtype`` is not a floating-point dtype, or a row is out of its range (``cast``).
    """
    path = files.located(path)
    if dtype is not None:
        require_dtype(dtype, "dtype")
    manifest = complete_manifest(path, kind, check)
    for index in range(manifest.shard_count):  # before memory is allocated for a damaged shard
        layout(path / shard_name(index), manifest.shards[index], manifest, manifest.shard_rows(index))
    out = {
        name: torch.empty(
            (manifest.rows, *spec.shape),
            dtype=dtype if dtype is not None and spec.dtype.is_floating_point else spec.dtype,
            device=device,
        )
        for name, spec in manifest.tensors.items()
    }
    first = 0
    for index in range(manifest.shard_count):
        file, rows = path / shard_name(index), manifest.shard_rows(index)
        misfit: InputError | None = None
        for name, start, block in read_shard(file, manifest.shards[index], manifest, rows, verify=verify):
            at = first + start
            try:
                out[name][at : at + len(block)] = cast(block, out[name].dtype, name, at)
            except InputError as error:  # unless the shard is damaged
                misfit = misfit or error
        if misfit is not None:
            raise misfit
        first += rows
    return manifest, out


def complete_manifest(path: Path, kind: str, check: Callable[[Manifest], object] | None = None) -> Manifest:
    """The manifest of a complete directory of this kind that passes ``check``; StorageError for any other."""
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
    """The bytes of a file that belongs to the rows; StorageError if it is missing or damaged."""
    if name not in manifest.attachments:
        raise StorageError(f"{path}: expected a file {name} in its manifest, got none")
    file, stored = files.located(path) / name, manifest.attachments[name]
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise StorageError(f"{file}: missing: the manifest lists it, the directory lacks it; {REMEDY}") from None
    except OSError as error:
        raise StorageError(f"{file}: could not be read: {files.reason(error)}") from error
    found = StoredFile.of(data)
    if found != stored:
        expected = f"{stored.size} bytes, SHA-256 {stored.sha256}"
        raise StorageError(f"{file}: damaged: expected {expected}, got {found.size} bytes, {found.sha256}; {REMEDY}")
    return data


def _entries(path: Path) -> list[Path]:
    try:
        return list(path.iterdir())
    except OSError as error:
        raise StorageError(f"{path}: could not be read: {files.reason(error)}") from error
