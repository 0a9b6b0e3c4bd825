# SPDX-License-Identifier: Apache-2.0
"""Checkpoints written beside the training: a copy of the state in host memory, and a thread that writes it.

    loop:    wait for the write before -> copy the state                    -> next step
    thread:                                write, hash, sync, rename, prune

The copy is made in the loop, so that no step changes what is written. Of a state on a GPU it goes to page-locked memory
and is waited for: what an event could hide is a fraction of a second per checkpoint.
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
from torch import Tensor

from fastdistill.data.fingerprint import hashed_blocks
from fastdistill.data.values import spelled
from fastdistill.files import atomic_write
from fastdistill.train import distributed

ALIGNMENT = 64  # bytes, of a tensor in the copy
Going = Callable[[], None]


class Cancelled(Exception):
    """The end of a write that is no longer wanted."""


def write(path: Path, tensors: Mapping[str, Tensor], head: Mapping[str, Any], going: Going = lambda: None) -> None:
    """A safetensors file of tensors on the CPU, written from where they are, ``head`` and their ``sha256`` in its
    metadata. ``going`` is called before each block of 64 MB; what it raises ends the write.

    The hash is that of ``sha256_of_tensors``, computed on the way: until the end other digits hold its place in the
    header of the temporary file.
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

    def content(file: BinaryIO) -> None:
        file.write(len(header).to_bytes(8, "little") + header)
        digest, current = hashlib.sha256(), ""
        for name, block in hashed_blocks(tensors, digest):
            going()
            if name != current:
                file.seek(8 + len(header) + entries[name]["data_offsets"][0])
                current = name
            file.write(block)
        file.seek(8 + header.index(place.encode()))
        file.write(digest.hexdigest().encode())

    atomic_write(path, content)


class Staging:
    """Host memory that holds a copy of a state, the same for every copy of the same names, dtypes and shapes."""

    def __init__(self) -> None:
        self._layout: list[Any] = []
        self._copies: dict[str, Tensor] = {}
        self._pinned = False
        self.memory = torch.empty(0, dtype=torch.uint8, device="cpu")  # where the copies are

    def hold(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Copies on the CPU, on rank 0, of tensors that may be cut over the ranks; every rank has to ask for them. The
        next call overwrites them."""
        first = distributed.rank() == 0
        layout = [(name, tensor.dtype, tuple(tensor.shape), _strides(tensor)) for name, tensor in state.items()]
        device = next((tensor.device for tensor in state.values() if tensor.is_cuda), None)
        if first and layout != self._layout:
            self.close()
            self._lay(layout, pinned=device is not None)
        for name, tensor in state.items():
            full = distributed.whole(tensor.detach())
            if first:
                self._copies[name].copy_(full, non_blocking=True)
        if first and device is not None:
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
    """Those of a copy of the tensor: its own where they leave no gaps, so that a copy is one of memory."""
    whole = hasattr(tensor, "full_tensor")
    return torch.empty_like(torch.empty(tensor.shape, device="meta") if whole else tensor, device="meta").stride()


class Writer:
    """Runs one write at a time in a thread of its own."""

    def __init__(self) -> None:
        self.staging = Staging()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._cancelled = threading.Event()

    def begin(self, act: Callable[[Going], object]) -> None:
        """Call ``act`` in a thread; the write before has to be waited for. It calls its argument now and then."""

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
        """Until nothing is being written; an exception in here, such as Ctrl-C, cancels the write."""
        if self._thread is not None:
            try:
                self._thread.join()
            except BaseException:
                self.cancel()
                raise
            self._thread = None

    def cancel(self) -> None:
        """End the write that is under way, at its next block, and leave nothing of it."""
        self._cancelled.set()
        while self._thread is not None and self._thread.is_alive():
            try:
                self._thread.join()
            except KeyboardInterrupt:  # whoever holds the directory has to outlive the thread
                continue
        self._thread = None
        self._cancelled.clear()

    def failure(self) -> Exception | None:
        """What ended a write, once."""
        error, self._failure = self._failure, None
        return error

    def _going(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled
