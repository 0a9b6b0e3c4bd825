# SPDX-License-Identifier: Apache-2.0
"""Tensors between protected pages: a kernel that goes out of bounds is stopped at the first byte."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from tests.cuda_on_cpu import loaded
from tests.sanitizers import SANITIZE

PAGE = mmap.PAGESIZE
CANARY = 0xA5
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Guarded:
    """A copy of a tensor whose memory ends at a protected page and begins less than a page after another.

    It has the same address modulo 16 as the original, so up to 15 bytes may lie behind it. These bytes and those before
    it contain a canary, and watched kernels must not access them.
    """

    def __init__(self, original: Tensor) -> None:
        self.original = original
        ends = sum((n - 1) * step for n, step in zip(original.shape, original.stride(), strict=True))
        size = (1 + ends) * original.element_size() if original.numel() else 0
        past = original.data_ptr() % 16
        self._slack = -(size + past) % 16
        pages = -(-(size + past + self._slack) // PAGE)
        self._map = mmap.mmap(-1, (pages + 2) * PAGE)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        end = (pages + 1) * PAGE
        start = end - self._slack - size
        self._map[PAGE:start] = bytes([CANARY]) * (start - PAGE)
        self._map[end - self._slack : end] = bytes([CANARY]) * self._slack
        self._start, self._end = start, end
        flat = torch.frombuffer(self._map, dtype=torch.uint8, count=size, offset=start) if size else torch.empty(0)
        self.tensor = flat.view(original.dtype).as_strided(original.shape, original.stride()) if size else original
        if size:
            self.tensor.copy_(original)
        self._protect(0)
        self._forbid(True)

    def _forbid(self, forbidden: bool) -> None:
        for library in loaded:
            library.fd_forbid(self._base + PAGE, self._base + self._start, forbidden)
            library.fd_forbid(self._base + self._end - self._slack, self._base + self._end, forbidden)

    def _protect(self, access: int) -> None:
        for page in (self._base, self._base + len(self._map) - PAGE):
            if _libc.mprotect(page, PAGE, access) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")

    def open(self) -> None:
        """Make all of the memory accessible again."""
        self._protect(mmap.PROT_READ | mmap.PROT_WRITE)
        self._forbid(False)

    def release(self) -> None:
        """Copy the content back.

        Raises:
            AssertionError: bytes next to the tensor were written.
        """
        if self.tensor is not self.original:
            self.original.copy_(self.tensor)
        beside = self._map[PAGE : self._start] + self._map[self._end - self._slack : self._end]
        assert set(beside) <= {CANARY}, f"wrote beside a tensor of shape {tuple(self.original.shape)}"


def guarded(launch: Callable[..., None]) -> Callable[..., None]:
    """The launch function with guarded copies of its tensors; afterwards they are copied back. Sanitizers themselves
    check the ends of tensors."""
    if SANITIZE:
        return launch

    def run(*args: Any) -> None:
        leaves, structure = tree_flatten(list(args))
        guards = [Guarded(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]
        inside = [leaf if guard is None else guard.tensor for leaf, guard in zip(leaves, guards, strict=True)]
        held = [guard for guard in guards if guard is not None]
        try:
            launch(*tree_unflatten(inside, structure))
        finally:
            for guard in held:
                guard.open()
        for guard in held:
            guard.release()

    return run
