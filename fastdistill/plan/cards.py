# SPDX-License-Identifier: Apache-2.0
"""Devices to plan for: their memory and speed, measured here or from the makers' figures."""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastdistill.errors import InputError

GIB = 2**30
#: Fractions of the makers' figures for a large copy, a large bfloat16 product, and a long training run (MLPerf 4.0:
#: Stable Diffusion 2 with 315 TFLOP/s on each of eight H100).
_COPY, _MATMUL, _SUSTAINED = 0.9, 0.81, 315 / 989
#: Makers' figures: name, GiB that torch can allocate, GB/s, dense bfloat16 TFLOP/s with float32 accumulation.
CARDS = {
    "a100-40gb": ("NVIDIA A100 SXM4 40GB", 39.4, 1555, 312),
    "a100-80gb": ("NVIDIA A100 SXM4 80GB", 79.1, 2039, 312),
    "b200": ("NVIDIA B200", 178.4, 8000, 2250),
    "h100": ("NVIDIA H100 SXM5 80GB", 79.1, 3350, 989),
    "h100-pcie": ("NVIDIA H100 PCIe 80GB", 79.1, 2000, 756),
    "h200": ("NVIDIA H200 SXM 141GB", 139.8, 4800, 989),
    "l4": ("NVIDIA L4", 22.0, 300, 121),
    "l40s": ("NVIDIA L40S", 44.4, 864, 362),
    "rtx3090": ("NVIDIA GeForce RTX 3090", 23.6, 936, 71),
    "rtx4090": ("NVIDIA GeForce RTX 4090", 23.6, 1008, 165),
    "rtx5090": ("NVIDIA GeForce RTX 5090", 31.4, 1792, 209),
}
#: Cards of the table without products in float8.
WITHOUT_FLOAT8 = frozenset(CARDS[name][0] for name in ("a100-40gb", "a100-80gb", "rtx3090"))


@dataclass(frozen=True)
class Card:
    """The properties of a device that a plan uses.

    memory: bytes that torch can allocate. copy: bytes per second that a large copy reads and writes. matmul: operations
    per second in a large matrix product, in bfloat16 on a GPU and in float32 on a CPU. sustained: maximum operations
    per second of a long training run. launch: minimum seconds of a kernel. device: its type. source: origin of these
    figures: "measured" (except ``sustained``), or "model": 0.9 of the maker's bandwidth, 0.81 of its peak in a product
    and 0.32 in a run, as published for an H100.
    """

    name: str
    memory: int
    copy: float
    matmul: float
    sustained: float
    launch: float
    device: str
    source: str


def card_named(name: str) -> Card:
    """A card of the table; InputError if there is none with this name."""
    if name not in CARDS:
        raise InputError.of("card", f"one of {', '.join(CARDS)}", repr(name))
    full, memory, copy, matmul = CARDS[name]
    peak = matmul * 1e12
    return Card(full, int(memory * GIB), _COPY * copy * 1e9, _MATMUL * peak, _SUSTAINED * peak, 2e-6, "cuda", "model")


@functools.cache
def card_here(device: str) -> Card:
    """The device of this machine, with speeds that are measured now (this takes a moment)."""
    where = torch.device(device)
    cuda = where.type == "cuda"
    size, n = (2**30, 8192) if cuda else (2**26, 512)
    source = torch.ones(size, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    a, b = torch.randn(2, n, n, device=where).to(torch.bfloat16 if cuda else torch.float32)
    out = torch.empty_like(a)
    copy = 2 * size / _seconds(lambda: target.copy_(source), where)
    matmul = 2 * n**3 / _seconds(lambda: torch.mm(a, b, out=out), where)
    if cuda:
        name, memory = torch.cuda.get_device_name(where), torch.cuda.get_device_properties(where).total_memory
    else:
        name, memory = "CPU", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    sustained = matmul * _SUSTAINED / _MATMUL if cuda else matmul
    return Card(name, memory, copy, matmul, sustained, 2e-6 if cuda else 5e-6, where.type, "measured")


def available(device: str | torch.device) -> int:
    """Free bytes on a device, including those that torch has reserved but does not use."""
    where = torch.device(device)
    if where.type != "cuda":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    free, _ = torch.cuda.mem_get_info(where)
    return int(free + torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where))


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The median time of several runs, after some that are not counted."""
    found = []
    for _ in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found[3:])
