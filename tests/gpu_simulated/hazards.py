# SPDX-License-Identifier: Apache-2.0
"""Register hazards of asynchronous wgmmas in SASS: errors of an assembler although the PTX is right. (ptxas 12.9 reused
registers with the operand A of an asynchronous wgmma: triton-lang/triton #9433, #11781.)"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.kernels.sass import Instruction, loops

OPERAND_WRITTEN = "operand of a wgmma under way written"
ACCUMULATOR_WRITTEN = "accumulator of a wgmma under way written"
ACCUMULATOR_READ = "accumulator of a wgmma under way read"
# Without a destination register.
_STORES = {"STG", "STS", "STSM", "STL", "RED", "LDGSTS"}
_NONE = _STORES | set(
    "BRA BAR EXIT LDGDEPBAR DEPBAR FENCE MEMBAR NOP WARPSYNC ERRBAR CCTL BSYNC BSSY SYNCS WARPGROUP ISETP FSETP DSETP "
    "PLOP3 R2UR UMOV".split()
)
_WIDE = {"DADD", "DMUL", "DFMA", "CS2R"}  # two registers per value


@dataclass(frozen=True)
class _Wgmma:
    operands: frozenset[int]
    accumulators: frozenset[int]


def hazards(instructions: Sequence[Instruction]) -> set[tuple[int, str]]:
    """(address, description) of each instruction that accesses registers that an unfinished wgmma reads or writes.
    Every loop is traversed twice, so that a wgmma of one iteration meets the next one."""
    groups: list[list[_Wgmma]] = []
    begun: list[_Wgmma] = []
    found: set[tuple[int, str]] = set()
    for i in _walk(instructions):
        if i.operation.startswith("WARPGROUP.DEPBAR"):
            keep = int(re.findall(r"gsb0,\s*0x([0-9a-f]+)", i.text)[0], 16)
            groups = groups[len(groups) - keep :]
            continue
        multiplies = i.name.endswith("GMMA")
        written, read = _written(i), set() if multiplies else _read(i)
        for one in (wgmma for group in (*groups, begun) for wgmma in group):
            if written & one.operands:
                found.add((i.address, OPERAND_WRITTEN))
            if not multiplies and written & one.accumulators:  # wgmmas add to the same accumulators in order
                found.add((i.address, ACCUMULATOR_WRITTEN))
            if read & one.accumulators:
                found.add((i.address, ACCUMULATOR_READ))
        if multiplies:
            operands = _registers(i.operands[1], 4) if i.operands[1].startswith("R") else set()
            begun.append(_Wgmma(frozenset(operands), frozenset(written)))
            if "gsb0" in i.text:
                groups.append(begun)
                begun = []
    return found


def _walk(instructions: Sequence[Instruction]) -> Iterator[Instruction]:
    back = {last: first for first, last in loops(instructions)}
    at = 0
    while at < len(instructions):
        yield instructions[at]
        at = back.pop(at) if at in back else at + 1


def _registers(operand: str, count: int) -> set[int]:
    match = re.match(r"R(\d+)\b", operand)
    return set(range(int(match[1]), int(match[1]) + count)) if match else set()


def _written(i: Instruction) -> set[int]:
    if i.name in _NONE:
        return set()
    if i.name.endswith("GMMA"):
        columns = re.search(r"64x(\d+)x", i.operation)
        assert columns is not None, i.text
        return _registers(i.operands[0], int(columns[1]) // 2)
    to = next((o for o in i.operands if not re.match(r"U?P", o)), "")  # behind predicates: SHFL.BFLY PT, R4, ...
    return _registers(to, _width(i))


def _width(i: Instruction) -> int:
    """The number of registers of a result."""
    if i.name == "LDSM":
        return next((n for n in (4, 2) if f".{n}" in i.operation), 1)
    if i.name in ("LDG", "LDS", "LDL", "LDC"):
        return max(i.bytes // 4, 1)
    if i.name == "HMMA":
        return 4
    return 2 if ".WIDE" in i.operation or ".64" in i.operation or (i.name in _WIDE and ".32" not in i.operation) else 1


def _read(i: Instruction) -> set[int]:
    """The first register of each source; the following registers of a wide source belong to it."""
    sources = i.operands if i.name in _NONE else i.operands[1:]
    found = {int(n) for source in sources for n in re.findall(r"\bR(\d+)\b", source)}
    if i.name in _STORES and i.name != "LDGSTS":
        last = re.findall(r"\bR(\d+)\b", sources[-1])
        found |= {int(n) + k for n in last for k in range(max(i.bytes // 4, 1))}
    return found
