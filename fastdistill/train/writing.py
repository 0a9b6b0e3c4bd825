# SPDX-License-Identifier: Apache-2.0
"""Checkpoints written in the background: a copy of the state in host memory, and a thread that writes it.

    loop:    wait for the write before -> copy the state                    -> next step
    thread:                                write, hash, sync, rename, prune

For a sharded student each rank does this with its own part. Rank 0 renames its file to the final name, which makes the
checkpoint exist, after it has received the hashes of all other files.

The copy is made in the loop, so that no step changes what is written. From a GPU it goes to page-locked memory, and the
loop waits for it: an asynchronous copy would save only a fraction of a second per checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor

from fastdistill.data.fingerprint import hashed_blocks
from fastdistill.data.values import spelled
from fastdistill.errors import StorageError
from fastdistill.files import atomic_write
from fastdistill.train.stored import rank_file

ALIGNMENT = 64  # bytes, of a tensor in the copy
Going = Callable[[], None]


class Cancelled(Exception):
    """The end of a write that is no longer wanted."""

    def __str__(self) -> str:
        return "the write was cancelled"


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    head: Mapping[str, Any],
    going: Going = lambda: None,
    fill: Callable[[str], Mapping[str, str]] = lambda sha256: {},
) -> str:
    """Write a safetensors file of tensors on the CPU without copies, ``head`` and their ``sha256`` in its metadata;
    returns the hash. ``going`` is called before each block of 64 MB; an exception from it ends the write.

    The hash is that of ``sha256_of_tensors``, computed during the write; until the end the header of the temporary file
    contains a placeholder. ``head`` may contain more placeholders: ``fill`` is called with the hash after the tensors
    are written, and returns the texts (of equal length) that replace them.
    """
    place = secrets.token_hex(32)
    entries: dict[str, Any] = {"__metadata__": {"fastdistill": json.dumps({**head, "sha256": place})}}
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):  # each is aligned
        tensor = tensors[name]
        offsets = [end, end := end + tensor.nbytes]
        entries[name] = {"dtype": spelled(tensor.dtype), "shape": list(tensor.shape), "data_offsets": offsets}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()

    def content(file: BinaryIO) -> None:
        file.write(len(header).to_bytes(8, "little") + header)
        current = ""
        for name, block in hashed_blocks(tensors, digest):
            going()
            if name != current:
                file.seek(8 + len(header) + entries[name]["data_offsets"][0])
                current = name
            file.write(block)
        for held, text in {place: digest.hexdigest(), **fill(digest.hexdigest())}.items():
            file.seek(8 + header.index(held.encode()))
            file.write(text.encode())

    atomic_write(path, content)
    return digest.hexdigest()


def write_together(
    path: Path, tensors: Mapping[str, Tensor], head: Mapping[str, Any], going: Going, group: dist.ProcessGroup
) -> None:
    """Like ``write``, for all ranks of a group; each writes a file of its own tensors. The file of rank 0, ``path``,
    contains the hashes of the others (``files``), and exists only if they exist. If the write of a rank fails, rank 0
    raises its error, and no file of the checkpoint remains."""
    number, count = dist.get_rank(group), dist.get_world_size(group)
    if number:
        own = rank_file(path, number, count)
        short = {name: head[name] for name in ("schema", "step", "parts")}
        try:
            outcome: str | Exception = write(own, tensors, short, going)
        except Exception as error:
            outcome = error
        if _failures(_outcomes(outcome, group)):
            own.unlink(missing_ok=True)
        return
    places = [secrets.token_hex(32) for _ in range(1, count)]
    asked = False

    def fill(sha256: str) -> dict[str, str]:
        nonlocal asked
        asked = True
        outcomes = _outcomes(sha256, group)
        if failures := _failures(outcomes):
            raise StorageError(failures[0])
        return {place: found for place, (found, _) in zip(places, outcomes[1:], strict=True)}

    try:
        write(path, tensors, {**head, "files": places}, going, fill)
    except Exception as error:
        if not asked:  # the others wait for it
            _outcomes(error, group)
        raise


def _outcomes(own: str | Exception, group: dist.ProcessGroup) -> list[tuple[str, str]]:
    """The hash that each rank has written, and the error that it met instead."""
    failed = isinstance(own, Exception)
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, ("", str(own) or type(own).__name__) if failed else (own, ""), group=group)
    return found


def _failures(outcomes: list[tuple[str, str]]) -> list[str]:
    return [f"rank {number}: {error}" for number, (_, error) in enumerate(outcomes) if error]


class Staging:
    """Host memory that holds a copy of a state, the same for every copy of the same names, dtypes and shapes."""

    def __init__(self) -> None:
        self._layout: list[Any] = []
        self._copies: dict[str, Tensor] = {}
        self._pinned = False
        self.memory = torch.empty(0, dtype=torch.uint8, device="cpu")  # where the copies are

    def hold(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Copies of these tensors on the CPU. The next call overwrites them."""
        layout = [(name, tensor.dtype, tuple(tensor.shape), _strides(tensor)) for name, tensor in state.items()]
        device = next((tensor.device for tensor in state.values() if tensor.is_cuda), None)
        if layout != self._layout:
            self.close()
            self._lay(layout, pinned=device is not None)
        for name, tensor in state.items():
            self._copies[name].copy_(tensor.detach(), non_blocking=True)
        if device is not None:
            torch.cuda.current_stream(device).synchronize()
        return self._copies

    def close(self) -> None:
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr())
        self._layout, self._copies, self._pinned, self.memory = [], {}, False, self.memory.new_empty(0)

    def _lay(self, layout: list[Any], *, pinned: bool) -> None:
        sizes = [torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape, _ in layout]
        room = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        memory = self.memory = torch.empty(sum(room), dtype=torch.uint8, device="cpu")
        start = 0
        for (name, dtype, shape, strides), size, taken in zip(layout, sizes, room, strict=True):
            self._copies[name] = memory[start : start + size].view(dtype).as_strided(shape, strides)
            start += taken
        if pinned and len(memory):  # torch's own page-locked memory is rounded up to a power of two
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), len(memory), 0))
            self._pinned = True
        self._layout = layout


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides for a copy of the tensor: its own if they leave no gaps, so that the copy is a plain memory copy."""
    return torch.empty_like(tensor, device="meta").stride()


class Writer:
    """Runs one write at a time in a separate thread."""

    def __init__(self) -> None:
        self.staging = Staging()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._cancelled = threading.Event()

    def begin(self, act: Callable[[Going], object]) -> None:
        """Call ``act`` in a thread, after ``wait`` for the previous write. ``act`` must regularly call its argument."""

        def run() -> None:
            try:
                act(self._going)
            except Cancelled:
                pass
            except Exception as error:
                self._failure = error

        self._thread = threading.Thread(target=run, name="fastdistill checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the end of the write; an exception during the wait, such as Ctrl-C, cancels it."""
        if self._thread is not None:
            try:
                self._thread.join()
            except BaseException:
                self.cancel()
                raise
            self._thread = None

    def cancel(self) -> None:
        """Cancel the running write at its next block, and remove its files."""
        self._cancelled.set()
        while self._thread is not None and self._thread.is_alive():
            try:
                self._thread.join()
            except KeyboardInterrupt:  # whoever holds the directory has to outlive the thread
                continue
        self._thread = None
        self._cancelled.clear()

    def failure(self) -> Exception | None:
        """The error that ended a write; returned only once."""
        error, self._failure = self._failure, None
        return error

    def _going(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled
