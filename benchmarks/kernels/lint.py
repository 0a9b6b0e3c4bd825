# SPDX-License-Identifier: Apache-2.0
"""What costs time in a compiled kernel (from its SASS for Hopper), and what became worse.

``make kernels-report`` writes benchmarks/kernels/lint.csv; a test compares it with the code that is compiled now.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.kernels.sass import Instruction, disassembled, is_load, is_store, main_loop
from benchmarks.kernels.timing import Multiprocessor

PATH = Path(__file__).parent / "lint.csv"
ARCH = 90
# Bytes per clock of a multiprocessor: an H100 SXM copies 3 TB/s with 132 of them at 1.7 GHz.
BYTES_A_CLOCK = 13.4
SLACK = 1.02  # tolerance of the modelled clocks, which change with the order of instructions
_LOCAL = "LDL", "STL"


@dataclass(frozen=True)
class Figures:
    """One compiled kernel of ``report.csv``. For one iteration of its main loop (see ``sass.main_loop``): 16-byte and
    narrower accesses of a thread to global memory, shuffles, barriers, clocks of a block in the model of ``timing``
    (with as many blocks as fit), and the clocks that its bytes take. ``local``: accesses to local memory in the whole
    kernel.
    ``compiler``: "triton 3.9.0" or "cuda 13.0"."""

    op: str
    kernel: str
    compiler: str
    wide_loads: int
    narrow_loads: int
    wide_stores: int
    narrow_stores: int
    local: int
    shuffles: int
    barriers: int
    clocks: int
    byte_clocks: int


def figures(
    op: str, kernel: str, compiler: str, code: Sequence[Instruction], threads: int, occupancy: float
) -> Figures:
    """``occupancy``: resident warps / maximum (64)."""
    body = main_loop(code)
    warps = -(-threads // 32)
    blocks = max(1, round(64 * occupancy) // warps)
    moved = [i for i in body if is_load(i) or is_store(i)]
    loads, stores = [i.bytes for i in body if is_load(i)], [i.bytes for i in body if is_store(i)]
    return Figures(
        op, kernel, compiler, sum(n == 16 for n in loads), sum(n < 16 for n in loads), sum(n == 16 for n in stores),
        sum(n < 16 for n in stores), sum(i.name in _LOCAL for i in code), sum(i.name == "SHFL" for i in body),
        sum(i.operation.startswith("BAR.SYNC") for i in body), round(Multiprocessor(body, warps, blocks).clocks()),
        round(sum(i.bytes for i in moved) * 32 * warps / BYTES_A_CLOCK),
    )  # fmt: skip


def code_of(path: str | Path) -> dict[str, list[Instruction]]:
    return disassembled(path, ARCH)


def read(path: Path = PATH) -> list[Figures]:
    with path.open(newline="", encoding="utf-8") as file:
        fields = dataclasses.fields(Figures)
        return [
            Figures(*(row[f.name] if f.type == "str" else int(row[f.name]) for f in fields))
            for row in csv.DictReader(file)
        ]


def write(rows: Iterable[Figures], path: Path = PATH) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Figures)])
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, rows))


def worse(before: Sequence[Figures], now: Sequence[Figures]) -> list[str]:
    """What is worse in ``now`` than in ``before``, with both figures, and kernels that only one of them has. Only
    compilers that both have are compared."""
    said = []
    for compiler in sorted({row.compiler for row in before} & {row.compiler for row in now}):
        old, new = ({_key(row, i): row for i, row in _numbered(rows, compiler)} for rows in (before, now))
        for key in old.keys() ^ new.keys():
            there = "no longer" if key in old else "not yet"
            said.append(f"{key[0]}, {key[1]}, {key[2]} ({compiler}): {there} there")
        for key in old.keys() & new.keys():
            said += [f"{', '.join(key[:2])} ({compiler}): {what}" for what in _changes(old[key], new[key])]
    return sorted(said)


def _numbered(rows: Sequence[Figures], compiler: str) -> list[tuple[int, Figures]]:
    """Each row with the number of earlier rows of the same name: a specialized kernel has several rows."""
    counts: dict[tuple[str, str], int] = {}
    found = []
    for row in rows:
        if row.compiler == compiler:
            number = counts[row.op, row.kernel] = counts.get((row.op, row.kernel), -1) + 1
            found.append((number, row))
    return found


def _key(row: Figures, number: int) -> tuple[str, str, int]:
    return row.op, row.kernel, number


def _changes(old: Figures, new: Figures) -> list[str]:
    said = []
    for name in ("narrow_loads", "narrow_stores", "local", "shuffles", "barriers", "byte_clocks", "clocks"):
        a, b = getattr(old, name), getattr(new, name)
        if b > a * (SLACK if name == "clocks" else 1):
            floor = f" (its bytes take {new.byte_clocks})" if name == "clocks" else ""
            said.append(f"{name.replace('_', ' ')} {a} -> {b}{floor}")
    return said
