# SPDX-License-Identifier: Apache-2.0
"""The instructions of a compiled kernel with the compiler's scheduling information, and their loops."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.kernels.resources import binary, cuobjdump

_LOADS = "LDG", "LDGSTS"
_STORES = "STG", "RED", "ATOMG"


@dataclass(frozen=True)
class Instruction:
    """``text`` without its predicate. ``stall``: clocks until the warp's next instruction. ``sets`` and ``frees``: the
    scoreboards that its result and its operands release (7: none). ``waits``: one bit per scoreboard that it waits
    for."""

    address: int
    text: str
    predicate: str
    stall: int
    sets: int
    frees: int
    waits: int

    @cached_property
    def operation(self) -> str:
        """The opcode with its modifiers: LDG.E.128."""
        return self.text.split()[0]

    @cached_property
    def name(self) -> str:
        return self.operation.split(".")[0]

    @cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(part.strip() for part in self.text[len(self.operation) :].split(","))

    @cached_property
    def bytes(self) -> int:
        """Bytes that one thread accesses."""
        widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((widths[part] for part in self.operation.split(".")[1:] if part in widths), 4)

    @cached_property
    def target(self) -> int | None:
        """The target address of a branch."""
        found = re.search(r"\b0x([0-9a-f]+)\s*$", self.text) if self.name == "BRA" else None
        return int(found[1], 16) if found else None


def disassembled(path: str | Path, arch: int) -> dict[str, list[Instruction]]:
    """The instructions of every kernel in a cubin or a library, by mangled name."""
    command = [cuobjdump(), "-sass", "-arch", binary(arch), str(path)]
    if str(path).endswith(".cubin"):
        del command[2:4]
    return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def parse(text: str) -> dict[str, list[Instruction]]:
    """Parses the output of ``cuobjdump -sass``: an instruction takes two lines, each with half of its bits."""
    found: dict[str, list[Instruction]] = {}
    instructions: list[Instruction] = []
    pending: tuple[int, str] | None = None
    for line in text.splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            instructions = found.setdefault(match[1], [])
        elif match := re.match(r"\s*/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/", line):
            pending = int(match[1], 16), match[2]
        elif pending and (match := re.match(r"\s*/\* 0x([0-9a-f]{16}) \*/", line)):
            control = int(match[1], 16) >> 41
            predicate, body = _split(pending[1])
            fields = control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
            instructions.append(Instruction(pending[0], body, predicate, *fields))
            pending = None
    return found


def _split(text: str) -> tuple[str, str]:
    match = re.match(r"(@!?U?P\w+)\s+(.*)", text)
    return (match[1], match[2]) if match else ("", text)


def loops(instructions: Sequence[Instruction]) -> list[tuple[int, int]]:
    """First and last index of each loop: from the target of a backward branch to the branch. (The endless loop after
    the end of a kernel does not count.)"""
    index = {instruction.address: i for i, instruction in enumerate(instructions)}
    found = []
    for i, instruction in enumerate(instructions):
        to = index.get(instruction.target) if instruction.target is not None else None
        if to is not None and to < i:
            found.append((to, i))
    return found


def main_loop(instructions: Sequence[Instruction]) -> Sequence[Instruction]:
    """The innermost loop that loads from global memory; if there are several, the one with the most 16-byte loads, then
    the longest. If there are no loops, or only code outside of loops has such loads (one loop was unrolled and another
    handles the remainder), the whole kernel counts as one iteration."""
    loading = [(a, b) for a, b in loops(instructions) if any(map(is_load, instructions[a : b + 1]))]
    inner = [one for one in loading if not any(one[0] <= a and b <= one[1] and (a, b) != one for a, b in loading)]

    def size(loop: tuple[int, int]) -> tuple[int, int]:
        body = instructions[loop[0] : loop[1] + 1]
        return _wide(body), len(body)

    first, last = max(inner, key=size, default=(0, -1))
    if last < 0 or (not size((first, last))[0] and _wide(instructions)):
        first, last = 0, max((i for i, one in enumerate(instructions) if one.name == "EXIT"), default=len(instructions))
    return instructions[first : last + 1]


def _wide(instructions: Sequence[Instruction]) -> int:
    return sum(is_load(i) and i.bytes == 16 for i in instructions)


def is_load(instruction: Instruction) -> bool:
    return instruction.name in _LOADS


def is_store(instruction: Instruction) -> bool:
    return instruction.name in _STORES
