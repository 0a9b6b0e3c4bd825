# SPDX-License-Identifier: Apache-2.0
"""Registers, spills and shared memory of a cubin, the occupancy that they allow, and forbidden patterns in PTX."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

# Per multiprocessor: threads, blocks, bytes of shared memory (CUDA C++ Programming Guide, compute capabilities).
_LIMITS = {80: (2048, 32, 167936), 86: (1536, 16, 102400), 89: (1536, 24, 102400), 90: (2048, 32, 233472)}
_LIMITS[100] = _LIMITS[90]
SYSTEM_SHARED = 1024  # bytes of shared memory that the system reserves in every block
_REGISTERS, _PARTITIONS, _GRANULE = 65536, 4, 256


@dataclass(frozen=True)
class Row:
    """One compiled kernel. ``triton``: the version that compiled it, "" for nvcc. ``spill_bytes``: local memory per
    thread. ``occupancy``: resident warps / maximum."""

    op: str
    kernel: str
    backend: str
    triton: str
    arch: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    threads: int
    occupancy: float


def cuobjdump() -> str:
    """The path of the tool: from the CUDA toolkit, or from Triton's wheel."""
    found = shutil.which("cuobjdump")
    if found is None:
        import triton

        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found


def binary(arch: int) -> str:
    """The target that setup.py and Triton compile for: for Hopper sm_90a, with its own instructions."""
    return "sm_90a" if arch == 90 else f"sm_{arch}"


def usage(path: str | Path) -> list[tuple[int, str, dict[str, int]]]:
    """(architecture, mangled kernel name, {REG, STACK, SHARED, LOCAL, ...}) of each kernel in a cubin or a library."""
    done = subprocess.run([cuobjdump(), "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True)
    arch, name, found = 0, "", []
    for line in done.stdout.splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            found.append((arch, name, {k: int(v) for k, v in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", line)}))
    return found


def occupancy(arch: int, registers: int, shared: int, threads: int) -> float:
    """Resident warps of a multiprocessor / maximum, as limited by registers, shared memory, threads and blocks."""
    most_threads, most_blocks, most_shared = _LIMITS[arch]
    warps = math.ceil(threads / 32)
    of_warp = math.ceil(max(registers, 1) * 32 / _GRANULE) * _GRANULE
    by_registers = _REGISTERS // _PARTITIONS // of_warp * _PARTITIONS // warps
    by_shared = most_shared // (shared + SYSTEM_SHARED)
    blocks = min(by_registers, by_shared, most_threads // threads, most_blocks)
    return blocks * warps / (most_threads // 32)


def unequal_copies(ptx: str) -> list[str]:
    """Instructions after which threads hold unequal copies of a sum that they computed together. Each of them fuses its
    own product into the addition of a neighbour's value, which was rounded before the shuffle; any copy may be
    stored."""
    sent: set[str] = set()
    found = []
    for line in ptx.splitlines():
        if match := re.match(r"\s*(?:@!?%\w+\s+)?([a-z]+)\.\S+\s+(.+);", line):
            to, *operands = re.findall(r"[%\w.-]+", match[2])
            if match[1] == "fma" and operands[-1] in sent:
                found.append(line.strip())
            brings = match[1] == "shfl" or (match[1] == "mov" and not sent.isdisjoint(operands))
            (sent.add if brings else sent.discard)(to)
    return found
