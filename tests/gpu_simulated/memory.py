# SPDX-License-Identifier: Apache-2.0
"""Memory of an interpreted block, and the detection of forbidden accesses."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from tests.gpu_simulated.driver import built

# What is detected, as a report names it.
OUTSIDE, MISALIGNED = "global memory touched outside of every tensor", "misaligned access to global memory"
BETWEEN_BLOCKS = "two blocks touch a byte of global memory that one of them writes"
UNEQUAL = "threads write different values to a byte at once"
NOT_AWAITED = "a block ended before what it began asynchronously was waited for"
UNWRITTEN = "shared memory read that nothing has written"
READ_AFTER_WRITE = "shared memory read without a barrier after another warp's write"
WRITE_AFTER_WRITE = "shared memory written without a barrier after another warp's write"
WRITE_AFTER_READ = "shared memory written without a barrier after another warp's read"
COPY_UNDER_WAY = "shared memory touched while a cp.async writes it"
READ_BY_WGMMA = "shared memory written while a wgmma may still read it"
NO_BARRIER = "wgmma reads shared memory that was written since the last barrier"
NO_FENCE = "wgmma reads shared memory that was written without fence.proxy.async since"

_NOBODY, _SEVERAL = -1, -2


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(built("memory.c", "memory.so")))


class Fault(Exception):
    """A forbidden operation, or something that this interpreter does not support."""


class Report(Counter[tuple[str, int]]):
    """How often each problem was found at each line of the PTX. ``line``: the current instruction."""

    line = 0

    def add(self, what: str) -> None:
        self[what, self.line] += 1


class Global:
    """The host's memory as global memory: for one launch, ``places`` are the (begin, end) that it may access."""

    def __init__(self, places: Iterable[tuple[int, int]]) -> None:
        whole = sorted(set(places))
        self._owners = [np.full((2, end - begin), _NOBODY, np.int32) for begin, end in whole]
        rows = [(b, e, *(o.ctypes.data for o in owner)) for (b, e), owner in zip(whole, self._owners, strict=True)]
        self._regions = np.array(rows, np.uint64).reshape(-1, 4)

    def access(
        self, block: int, address: NDArray[np.uint64], mask: NDArray[np.bool_], n: int, data: NDArray[np.uint8] | None
    ) -> NDArray[np.uint8]:
        """n bytes per thread, [threads, n], read or (with ``data``) written.

        Raises:
            Fault: an access is out of bounds, not aligned, or races with another block.
        """
        moved = np.zeros((len(address), n), np.uint8) if data is None else np.ascontiguousarray(data)
        address, on, thread = np.ascontiguousarray(address), np.ascontiguousarray(mask, np.uint8), ctypes.c_int()
        arrays = [ctypes.c_void_p(a.ctypes.data) for a in (address, on, moved, self._regions)]
        wrong = _library().simulated_access(
            len(address), arrays[0], arrays[1], n, data is not None, arrays[2], block, arrays[3], len(self._regions),
            ctypes.byref(thread),
        )  # fmt: skip
        if wrong:
            what = {1: OUTSIDE, 2: MISALIGNED, 3: BETWEEN_BLOCKS, 4: UNEQUAL}[wrong]
            raise Fault(f"{what}: {n} bytes at {int(address[thread.value]):#x} by thread {thread.value}")
        return moved


class Shared:
    """Shared memory of a block. For each byte it stores which warp last wrote and read it, and after how many
    barriers."""

    def __init__(self, size: int, report: Report) -> None:
        self.size, self.report, self.barriers = size, report, 0
        self.bytes = np.zeros(size, np.uint8)
        self.written, self.fenced, self.arriving = (np.zeros(size, bool) for _ in range(3))
        self.read_by_wgmma = np.zeros(size, np.int16)  # number of unfinished wgmmas that read it
        self.writer, self.reader = (np.full(size, _NOBODY, np.int32) for _ in range(2))
        self.write_time, self.read_time = (np.full(size, -1, np.int64) for _ in range(2))

    def places(self, address: NDArray[np.uint32], n: int, alignment: int) -> NDArray[np.int64]:
        """The bytes that each thread accesses, [threads, n]."""
        at = address.astype(np.int64)
        if at.size and (at.min() < 0 or at.max() + n > self.size):
            raise Fault(f"{n} bytes of shared memory at {at.max()}, of {self.size}")
        if (at % alignment).any():
            raise Fault(f"misaligned access to {n} bytes of shared memory")
        return at[:, None] + np.arange(n)

    def read(self, at: NDArray[np.int64], warps: NDArray[np.int64]) -> NDArray[np.uint8]:
        if at.size:
            self._saw_read(at, warps[:, None])
        return self.bytes[at]

    def write(self, at: NDArray[np.int64], warps: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        if at.size:
            self._saw_write(at, warps[:, None])
            self.bytes[at], self.written[at] = data, True
            if (self.bytes[at] != data).any():  # writing equal values is harmless
                self.report.add(UNEQUAL)

    def copy_begins(self, at: NDArray[np.int64], warps: NDArray[np.int64]) -> None:
        """From now on, a cp.async may write here until its wait."""
        self._saw_write(at, warps[:, None])
        self.arriving[at] = True

    def copy_ends(self, at: NDArray[np.int64], warps: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        self.arriving[at] = False
        self.write(at, warps, data)

    def fence(self) -> None:
        """fence.proxy.async between a write and a wgmma; it may come before or after the barrier between them."""
        self.fenced[:] = True

    def wgmma_reads(self, at: NDArray[np.int64]) -> None:
        """Two-byte elements that a wgmma reads from now on until its wait."""
        if not self.written[at].all():
            self.report.add(UNWRITTEN)
        if (self.write_time[at] == self.barriers).any():
            self.report.add(NO_BARRIER)
        if not self.fenced[at][self.written[at]].all():
            self.report.add(NO_FENCE)
        if self.arriving[at].any():
            self.report.add(COPY_UNDER_WAY)

    def wgmma_ended(self, at: NDArray[np.int64]) -> None:
        """A warp knows that its own wgmma has ended; for those of other warps a barrier is needed."""
        self.reader[at], self.read_time[at] = _SEVERAL, self.barriers

    def _saw_read(self, at: NDArray[np.int64], warp: NDArray[np.int64]) -> None:
        if not self.written[at].all():
            self.report.add(UNWRITTEN)
        if ((self.write_time[at] == self.barriers) & (self.writer[at] != warp)).any():
            self.report.add(READ_AFTER_WRITE)
        if self.arriving[at].any():
            self.report.add(COPY_UNDER_WAY)
        for one in np.unique(warp):  # if two warps read a byte at once, both are recorded
            own = at[warp[:, 0] == one]
            known = (self.read_time[own] == self.barriers) & (self.reader[own] != one)
            self.reader[own] = np.where(known, _SEVERAL, one)
            self.read_time[own] = self.barriers

    def _saw_write(self, at: NDArray[np.int64], warp: NDArray[np.int64]) -> None:
        if ((self.write_time[at] == self.barriers) & (self.writer[at] != warp)).any():
            self.report.add(WRITE_AFTER_WRITE)
        if ((self.read_time[at] == self.barriers) & (self.reader[at] != warp)).any():
            self.report.add(WRITE_AFTER_READ)
        if self.arriving[at].any():
            self.report.add(COPY_UNDER_WAY)
        if self.read_by_wgmma[at].any():
            self.report.add(READ_BY_WGMMA)
        self.writer[at] = np.broadcast_to(warp, at.shape)
        self.write_time[at], self.fenced[at] = self.barriers, False
