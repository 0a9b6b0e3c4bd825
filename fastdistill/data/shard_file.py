# SPDX-License-Identifier: Apache-2.0
"""Reads one shard (a safetensors file) in blocks and checks it in the same pass.

Files are read (``preadv``), not mapped: a failed read is an error that names the file, while a failed page of a mapping
ends the process with SIGBUS.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistill import files
from fastdistill.data.manifest import Manifest, StoredFile
from fastdistill.data.values import block_rows, spelled
from fastdistill.errors import StorageError

REMEDY = "run what made it again: only this file is made anew"


@dataclass(frozen=True)
class Layout:
    """The positions of the tensors in a shard."""

    offsets: dict[str, int]  # by name, in the order of the file: the tensor's first byte
    header: bytes  # the bytes before the tensors
    inode: tuple[int, int]


def layout(file: Path, stored: StoredFile, manifest: Manifest, rows: int) -> Layout:
    """The layout of a shard of ``rows`` rows; StorageError unless its size and header agree with the manifest."""
    with _opened(file, stored) as descriptor:
        return _layout(descriptor, file, stored, manifest, rows)


def read_shard(
    file: Path, stored: StoredFile, manifest: Manifest, rows: int, *, verify: bool = True
) -> Iterator[tuple[str, int, Tensor]]:
    """Yield a shard as (name, first row, block [b, *row shape]), reading each byte once.

    The checksum is compared after the last block, so do not use any block before the end. ``verify=False`` skips it.

    Raises:
        StorageError: the file is missing, cannot be read or is damaged.
    """
    with _opened(file, stored) as descriptor:
        found = _layout(descriptor, file, stored, manifest, rows)
        digest = hashlib.sha256(found.header)
        for name, offset in found.offsets.items():
            spec = manifest.tensors[name]
            size = block_rows(spec.row_bytes)
            for start in range(0, rows, size):
                block = torch.empty((min(size, rows - start), *spec.shape), dtype=spec.dtype, device="cpu")
                target = bytes_of(block)
                fill(descriptor, file, offset + start * spec.row_bytes, target)
                if verify:
                    digest.update(target)
                yield name, start, block
        if verify and digest.hexdigest() != stored.sha256:
            raise StorageError(f"{file}: damaged: expected SHA-256 {stored.sha256}, got {digest.hexdigest()}; {REMEDY}")


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def fill(descriptor: int, file: Path, offset: int, target: memoryview) -> None:
    """Fill ``target`` from byte ``offset`` on; StorageError if the file is too short."""
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], offset + done)
        if count == 0:
            raise StorageError(f"{file}: damaged: it ends after {offset + done} bytes, in the middle of a row")
        done += count


@contextlib.contextmanager
def readable(file: Path) -> Iterator[int]:
    """An open descriptor; any OSError while it is open becomes a StorageError."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{file}: could not be read: {files.reason(error)}") from error


def inode_of(descriptor: int) -> tuple[int, int]:
    """(device, inode number): distinguishes a file from another file that later has the same name."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _opened(file: Path, stored: StoredFile) -> Iterator[int]:
    if not file.exists():
        raise StorageError(f"{file}: missing: the manifest lists it, the directory lacks it; {REMEDY}")
    with readable(file) as descriptor:
        size = os.fstat(descriptor).st_size
        if size != stored.size:
            raise StorageError(f"{file}: damaged: expected {stored.size} bytes, got {size}; {REMEDY}")
        yield descriptor


def _layout(descriptor: int, file: Path, stored: StoredFile, manifest: Manifest, rows: int) -> Layout:
    """safetensors: the header's length (8 bytes), the header (JSON), then the tensors."""
    prefix = bytearray(8)
    fill(descriptor, file, 0, memoryview(prefix))
    length = int.from_bytes(prefix, "little")
    if length > stored.size - 8:
        raise StorageError(f"{file}: damaged: it has no room for a header of {length} bytes; {REMEDY}")
    header = bytearray(length)
    fill(descriptor, file, 8, memoryview(header))
    try:
        entries = {name: entry for name, entry in files.json_value(bytes(header)).items() if name != "__metadata__"}
        if entries.keys() != manifest.tensors.keys():
            raise StorageError(f"{file}: expected the tensors {sorted(manifest.tensors)}, got {sorted(entries)}")
        end, offsets = 0, {}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            _check_entry(file, name, entry, manifest, rows)
            start, stop = entry["data_offsets"]
            if start != end or stop - start != rows * manifest.tensors[name].row_bytes:
                raise ValueError(f"tensor {name!r} has bytes {start} to {stop}")
            offsets[name], end = 8 + length + start, stop
        if 8 + length + end != stored.size:
            raise ValueError(f"its tensors end at byte {8 + length + end} of {stored.size}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{file}: damaged: {error}; {REMEDY}") from error
    return Layout(offsets, bytes(prefix + header), inode_of(descriptor))


def _check_entry(file: Path, name: str, entry: dict[str, Any], manifest: Manifest, rows: int) -> None:
    spec = manifest.tensors[name]
    shape, found = (rows, *spec.shape), tuple(entry["shape"])
    if found != shape or entry["dtype"] != spelled(spec.dtype):
        raise StorageError(f"{file}, tensor {name!r}: expected {spec.dtype} {shape}, got {entry['dtype']} {found}")
