# SPDX-License-Identifier: Apache-2.0
"""Rows that stay on the disk: a bank larger than the memory, read row by row.

Files are read (``preadv``), not mapped: a mapped page that the disk cannot give ends the process with SIGBUS, a read
that fails is an error with a name.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdistill.data import files
from fastdistill.data.manifest import Manifest, shard_name
from fastdistill.data.shards import complete_manifest, parse_shard, read_stored
from fastdistill.errors import InputError, StorageError


@dataclass(frozen=True)
class Part:
    """``rows`` rows of a file, one after the other from byte ``offset`` on."""

    file: Path
    offset: int
    rows: int


class StoredRows:
    """A tensor [N, *S] whose rows stay on the disk. ``rows[5]``, ``rows[a:b]`` and ``rows[index]`` read some of them.

    Any number of threads may read. Nothing is kept open in between.
    """

    device = torch.device("cpu")

    def __init__(self, parts: Sequence[Part], row_shape: Sequence[int], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._parts = list(parts)
        self._starts = [0, *itertools.accumulate(part.rows for part in parts)]
        self.shape = torch.Size((self._starts[-1], *row_shape))
        self._row_bytes = math.prod(row_shape) * dtype.itemsize

    @classmethod
    def of_memmap(cls, array: np.memmap) -> StoredRows:
        """The rows of a ``numpy.memmap`` (C order), read from its file.

        Raises:
            InputError: it is not in C order, has no file, or has a dtype that torch has not.
        """
        if not (isinstance(array, np.memmap) and array.filename and array.flags.c_contiguous and array.ndim):
            raise InputError.of("array", "a numpy.memmap [N, ...] of a file in C order", type(array).__name__)
        try:
            dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        except TypeError:
            raise InputError.of("array", "a dtype that torch has", array.dtype) from None
        return cls([Part(Path(array.filename), array.offset, len(array))], array.shape[1:], dtype)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, which: int | slice | Tensor) -> Tensor:
        if isinstance(which, Tensor):
            out = torch.empty((len(which), *self.shape[1:]), dtype=self.dtype)
            self.read(which, out)
            return out
        if isinstance(which, slice):
            start, stop, step = which.indices(len(self))
            if step != 1:
                return self[torch.arange(start, stop, step)]
            out = torch.empty((max(stop - start, 0), *self.shape[1:]), dtype=self.dtype)
            self._read_span(start, out)
            return out
        return self[torch.tensor([which])][0]

    def read(self, index: Tensor, out: Tensor) -> None:
        """Copy rows ``index`` [B] int64 into ``out`` [B, *S], contiguous and in host memory; in the order of the disk.

        Raises:
            InputError: a row that is not there.
            StorageError: a file that is missing, cut short or cannot be read; with its name.
        """
        numbers = index.tolist()
        for place in sorted(range(len(numbers)), key=numbers.__getitem__):
            self._read_span(numbers[place], out[place : place + 1])

    def _read_span(self, start: int, out: Tensor) -> None:
        """Rows from ``start`` on, as many as ``out`` has."""
        if len(out) and not 0 <= start <= len(self) - len(out):
            raise InputError.of("row", f"0 to {len(self) - 1}", start)
        target = memoryview(out.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        done = 0
        while done < len(out) and self._row_bytes:
            number = bisect.bisect_right(self._starts, start + done) - 1
            part, before = self._parts[number], start + done - self._starts[number]
            rows = min(part.rows - before, len(out) - done)
            wanted = target[done * self._row_bytes : (done + rows) * self._row_bytes]
            _read(part.file, part.offset + before * self._row_bytes, wanted)
            done += rows


def open_rows(
    path: str | Path,
    *,
    kind: str,
    verify: bool = True,
    check: Callable[[Manifest], object] | None = None,
) -> tuple[Manifest, dict[str, StoredRows]]:
    """What ``load_rows`` loads, left on the disk: manifest and name -> [rows, *row shape].

    ``verify`` reads every shard once and checks it; without it only sizes and headers are read. Errors: those of
    ``load_rows``.
    """
    path = Path(path)
    manifest = complete_manifest(path, kind, check)
    parts: dict[str, list[Part]] = {name: [] for name in manifest.tensors}
    for index in range(manifest.shard_count):
        file, rows = path / shard_name(index), manifest.shard_rows(index)
        stored = manifest.shards[index]
        if verify:
            parse_shard(file, read_stored(file, stored), manifest, rows)
        for name, offset in _offsets(file, stored.size, manifest, rows).items():
            parts[name].append(Part(file, offset, rows))
    return manifest, {name: StoredRows(parts[name], spec.shape, spec.dtype) for name, spec in manifest.tensors.items()}


def _offsets(file: Path, size: int, manifest: Manifest, rows: int) -> dict[str, int]:
    """Where each tensor of a shard begins: after the 8 bytes of the header's length and the header (safetensors)."""
    try:
        found = file.stat().st_size
        if found != size:
            raise StorageError(f"{file}: damaged: expected {size} bytes, got {found}")
        length = bytearray(8)
        _read(file, 0, memoryview(length))
        header = bytearray(int.from_bytes(length, "little"))
        _read(file, 8, memoryview(header))
        entries = json.loads(header)
        offsets = {}
        for name, spec in manifest.tensors.items():
            start, stop = entries[name]["data_offsets"]
            if stop - start != rows * spec.row_bytes:
                raise ValueError(f"tensor {name!r} has {stop - start} bytes")
            offsets[name] = 8 + len(header) + start
        return offsets
    except FileNotFoundError:
        raise StorageError(f"{file}: missing: the manifest lists it, the directory lacks it") from None
    except (KeyError, ValueError, MemoryError, OverflowError) as error:
        raise StorageError(f"{file}: damaged: {error}") from error


def _read(file: Path, offset: int, target: memoryview) -> None:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            done = 0
            while done < len(target):
                count = os.preadv(descriptor, [target[done:]], offset + done)
                if count == 0:
                    raise StorageError(f"{file}: damaged: it ends after {offset + done} bytes, in the middle of a row")
                done += count
        finally:
            os.close(descriptor)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{file}: could not be read: {files.reason(error)}") from error
