# SPDX-License-Identifier: Apache-2.0
"""Rows that stay on disk: a bank larger than the memory, read row by row."""

from __future__ import annotations

import bisect
import itertools
import math
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdistill import files
from fastdistill.data.indexing import split
from fastdistill.data.manifest import Manifest, shard_name
from fastdistill.data.shard_file import bytes_of, fill, inode_of, layout, read_shard, readable
from fastdistill.data.shards import complete_manifest
from fastdistill.errors import InputError, StorageError


@dataclass(frozen=True)
class Part:
    """``rows`` consecutive rows of a file, from byte ``offset`` on.

    ``inode`` (device, number) identifies the opened file; another file with the same name is refused. None: any file.
    """

    file: Path
    offset: int
    rows: int
    inode: tuple[int, int] | None = None


class StoredRows:
    """A tensor [N, *S] whose rows stay on disk. Indexing reads the rows that are needed and returns a copy.

    It supports every index of torch or NumPy: ``rows[5]``, ``rows[-1]``, ``rows[a:b:step]``, ``rows[mask]``,
    ``rows[numbers, ..., 0]``. ``for row in rows`` reads one row at a time. Any number of threads can read. No file
    stays open.
    """

    device = torch.device("cpu")
    __contains__ = None  # "in" would read everything

    def __init__(self, parts: Sequence[Part], row_shape: Sequence[int], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._parts = list(parts)
        self._starts = [0, *itertools.accumulate(part.rows for part in parts)]
        self.shape = torch.Size((self._starts[-1], *row_shape))
        self._row_bytes = math.prod(row_shape) * dtype.itemsize

    @classmethod
    def of_memmap(cls, array: np.memmap) -> StoredRows:
        """The rows of a ``numpy.memmap``, or of a part of one (``memmap[1000:]``), read from its file.

        Raises:
            InputError: it has no file, is not in C order, has a dtype that torch does not have, or mode "c", whose
                changes are not in the file.
            StorageError: the file was replaced or truncated after it was mapped.
        """
        rule = "a numpy.memmap [N, ...] of a file, in C order"
        if not isinstance(array, np.memmap):
            raise InputError.of("array", rule, type(array).__name__)
        base: Any = array
        while base is not None and not isinstance(base, mmap.mmap):
            base = getattr(base, "base", None)
        if base is None or not array.filename or not array.ndim:
            raise InputError.of("array", rule, "a copy in memory" if base is None else "one without a file or an axis")
        if not array.flags.c_contiguous:
            got = f"one with the strides {array.strides} (StoredRows of the whole reads any part of it)"
            raise InputError.of("array", rule, got)
        if array.mode == "c":
            raise InputError.of("array", "mode 'r', 'r+' or 'w+'", "'c', whose changes are not in the file")
        try:
            dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        except (TypeError, ValueError):
            raise InputError.of("array", "a dtype of torch in this machine's byte order", array.dtype) from None
        # array.offset is that of the whole array, also for a part; the part's beginning follows from the address.
        mapped_from = array.offset - array.offset % mmap.ALLOCATIONGRANULARITY
        offset = mapped_from + _address(array) - _address(np.frombuffer(base, np.uint8))
        file = Path(array.filename)
        with readable(file) as descriptor:
            inode = inode_of(descriptor)
            _check_mapped(descriptor, file, offset, array)
        return cls([Part(file, offset, len(array), inode)], array.shape[1:], dtype)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, index: Any) -> Tensor:
        rows, rest = split(index, self.shape)
        out = torch.empty((len(rows), *self.shape[1:]), dtype=self.dtype, device="cpu")
        if isinstance(rows, range) and rows.step == 1:
            self._read_span(rows.start, len(rows), bytes_of(out))
        else:
            self._read_each(list(rows), out)
        if not rest:
            return out
        try:
            return out[rest]
        except (IndexError, TypeError, ValueError) as error:
            rule = f"an index of an array of shape {tuple(self.shape)}"
            raise InputError.of("index", rule, f"{index!r}: {error}") from error

    def read(self, index: Tensor, out: Tensor) -> None:
        """Copy rows ``index`` [B] int64, from 0, into ``out`` [B, *S], contiguous and in host memory.

        They are read in the order of the file.

        Raises:
            InputError: a row that does not exist; an ``out`` of another shape, dtype or device.
            StorageError: a file that is missing, replaced, truncated or unreadable; it is named.
        """
        wanted = (len(index), *self.shape[1:])
        fits = out.device.type == "cpu" and out.is_contiguous()
        if tuple(out.shape) != wanted or out.dtype != self.dtype or not fits:
            got = f"{out.dtype} {tuple(out.shape)} on {out.device}" + (" (strided)" * (not out.is_contiguous()))
            raise InputError.of("out", f"contiguous {self.dtype} {wanted} on cpu", got)
        self._read_each(index.tolist(), out)

    def _read_each(self, numbers: list[int], out: Tensor) -> None:
        target, size = bytes_of(out), self._row_bytes
        for place in sorted(range(len(numbers)), key=numbers.__getitem__):
            self._read_span(numbers[place], 1, target[place * size : (place + 1) * size])

    def _read_span(self, start: int, rows: int, target: memoryview) -> None:
        """``rows`` rows from ``start`` on."""
        if rows and not 0 <= start <= len(self) - rows:
            raise InputError.of("row", f"0 to {len(self) - 1}", start)
        size, done = self._row_bytes, 0
        while done < rows and size:
            number = bisect.bisect_right(self._starts, start + done) - 1
            part, before = self._parts[number], start + done - self._starts[number]
            some = min(part.rows - before, rows - done)
            _read(part, part.offset + before * size, target[done * size : (done + some) * size])
            done += some


def open_rows(
    path: str | Path,
    *,
    kind: str,
    verify: bool = True,
    check: Callable[[Manifest], object] | None = None,
) -> tuple[Manifest, dict[str, StoredRows]]:
    """Like ``load_rows``, but the rows stay on disk: manifest and name -> [rows, *row shape].

    ``verify`` reads and checks every shard once, block by block; without it only sizes and headers are read.
    Errors: those of ``load_rows``.
    """
    path = files.located(path)
    manifest = complete_manifest(path, kind, check)
    parts: dict[str, list[Part]] = {name: [] for name in manifest.tensors}
    for index in range(manifest.shard_count):
        file, stored, rows = path / shard_name(index), manifest.shards[index], manifest.shard_rows(index)
        found = layout(file, stored, manifest, rows)
        if verify:
            for _ in read_shard(file, stored, manifest, rows):
                pass
        for name, offset in found.offsets.items():
            parts[name].append(Part(file, offset, rows, found.inode))
    return manifest, {name: StoredRows(parts[name], spec.shape, spec.dtype) for name, spec in manifest.tensors.items()}


def _address(array: np.ndarray) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _check_mapped(descriptor: int, file: Path, offset: int, array: np.memmap) -> None:
    """StorageError if the file is too short, or differs from the memmap in samples of its values."""
    size, wanted = os.fstat(descriptor).st_size, offset + array.nbytes
    if size < wanted:  # reading a mapping beyond the end of the file would end the process
        raise StorageError(f"{file}: expected at least {wanted} bytes, got {size}")
    mapped = array.reshape(-1).view(np.uint8)
    for start in {0, len(mapped) // 2, max(len(mapped) - 4096, 0)}:
        sample = mapped[start : start + 4096].tobytes()
        found = bytearray(len(sample))
        fill(descriptor, file, offset + start, memoryview(found))
        if found != sample:
            raise StorageError(f"{file}: expected the values of the array, got others (replaced since it was opened?)")


def _read(part: Part, offset: int, target: memoryview) -> None:
    with readable(part.file) as descriptor:
        if part.inode not in (None, inode_of(descriptor)):
            raise StorageError(f"{part.file}: replaced since it was opened; open it again")
        fill(descriptor, part.file, offset, target)
