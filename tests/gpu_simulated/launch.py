# SPDX-License-Identifier: Apache-2.0
"""Launches of PTX on CPU tensors."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from tests.gpu_simulated.block import Block
from tests.gpu_simulated.memory import Global, Report
from tests.gpu_simulated.ptx import BYTES, Kernel, parse


def storages() -> set[tuple[int, int]]:
    """(begin, end) of the memory of all tensors in this process."""
    found = set()
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            if thing.layout is not torch.strided:  # no kernel is given one
                continue
            storage = thing.untyped_storage()
            with contextlib.suppress(RuntimeError):  # a tensor of a compiler, without memory
                if storage.nbytes():
                    found.add((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
    return found


def run(
    kernel: Kernel, arguments: list[bytes], places: Iterable[tuple[int, int]], report: Report,
    grid: tuple[int, ...] = (1, 1, 1), threads: int = 128, shared: int = 0,
) -> int:  # fmt: skip
    """A launch whose blocks run one after another; returns the number of executed instructions.

    Raises:
        Fault: something that ends a launch.
    """
    memory, executed = Global(places), 0
    for z, y, x in itertools.product(*map(range, reversed(grid))):
        block = Block(kernel, threads, shared, arguments, (x, y, z), grid, memory, report)
        block.run()
        executed += block.executed
    return executed


class Simulation:
    """What ``driver.simulated`` calls. ``planted``: a function that changes a kernel before it runs. ``found``:
    (kernel, finding, instruction) -> count; ``ran``: kernel -> blocks, instructions."""

    def __init__(self, planted: Callable[[Kernel], Kernel] = lambda kernel: kernel) -> None:
        self.planted = planted
        self.found: dict[tuple[str, str, str], int] = {}
        self.ran: dict[str, list[int]] = {}
        self._kernels: dict[int, Kernel] = {}

    def __call__(self, compiled: Any, grid: tuple[int, ...], threads: int, shared: int, addresses: Any) -> None:
        text = compiled.asm["ptx"]
        if compiled.function not in self._kernels:
            self._kernels[compiled.function] = self.planted(parse(text))
        kernel = self._kernels[compiled.function]
        arguments = [ctypes.string_at(addresses[i], BYTES[kind]) for i, kind in kernel.parameters.values()]
        counts, report = self.ran.setdefault(kernel.name, [0, 0]), Report()
        try:
            most = max(shared, compiled.metadata.shared)
            counts[1] += run(kernel, arguments, storages(), report, grid, threads, most)
            counts[0] += grid[0] * grid[1] * grid[2]
        finally:
            lines = text.splitlines()
            for (what, line), times in report.items():
                key = kernel.name, what, lines[line - 1].strip()[:100]
                self.found[key] = self.found.get(key, 0) + times
