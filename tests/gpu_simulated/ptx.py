# SPDX-License-Identifier: Apache-2.0
"""Parses PTX text into a list of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

BYTES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4, "s32": 4}
BYTES |= {"f32": 4, "f16x2": 4, "bf16x2": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "pred": 0}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
NUMPY = {f"{kind}{8 * n}": t for n, t in UNSIGNED.items() for kind in "bu"}
NUMPY |= {"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64}
NUMPY |= {"f16": np.float16, "f32": np.float32, "f64": np.float64}

Operand = str | tuple[str, ...]


@dataclass(frozen=True)
class Instruction:
    """``@!%p1 ld.global.b32 %r1, [%rd1]``: predicate ("%p1", True), parts ("ld", "global", "b32"), operands; a vector
    in braces is a tuple. ``line``: line number in the text, from 1."""

    line: int
    predicate: tuple[str, bool] | None
    parts: tuple[str, ...]
    operands: tuple[Operand, ...]

    def __str__(self) -> str:
        shown = (f"{{{', '.join(o)}}}" if isinstance(o, tuple) else o for o in self.operands)
        return f"{'.'.join(self.parts)} {', '.join(shown)}"


@dataclass
class Kernel:
    """The entry function of a module. ``parameters``: name -> (number, type). ``registers``: prefix or name -> bytes
    (0: a predicate). ``arrays``: names of dynamic shared memory, which all begin at offset 0."""

    name: str
    parameters: dict[str, tuple[int, str]]
    registers: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    arrays: frozenset[str] = frozenset({"global_smem"})

    def width(self, register: str) -> int | None:
        """Bytes of a register; None if it is not a register."""
        found = self.registers.get(register)
        return self.registers.get(register.rstrip("0123456789")) if found is None else found

    def without(self, pattern: str) -> Kernel:
        """The kernel with a planted bug: matching instructions do nothing."""
        nothing = ("nop",)
        kept = [Instruction(i.line, None, nothing, ()) if re.match(pattern, str(i)) else i for i in self.instructions]
        if kept == self.instructions:
            raise ValueError(f"{self.name} has no instruction that matches {pattern!r}")
        return Kernel(self.name, self.parameters, self.registers, kept, self.labels, self.arrays)


def parse(text: str) -> Kernel:
    """The kernel of a module with one entry function.

    Raises:
        ValueError: there is none.
    """
    head = re.search(r"\.entry (\w+)\((.*?)\)", text, re.S)
    if head is None:
        raise ValueError("no .entry in the PTX")
    parameters = {}
    for i, declared in enumerate(filter(None, map(str.strip, head[2].split(",")))):
        match = re.search(r"\.param\s+(?:\.align \d+ )?\.(\w+).*?(\w+)(?:\[\d+\])?$", declared, re.S)
        assert match is not None, declared
        parameters[match[2]] = (i, match[1])
    kernel = Kernel(head[1], parameters)
    kernel.arrays |= set(re.findall(r"\.extern \.shared [^;]*?(\w+)\[\];", text))
    begin = text.index("{", head.end()) + 1
    line = text.count("\n", 0, begin) + 1
    body = re.sub(r"//[^\n]*|^\s*\.(?:loc|file)\b[^\n]*", "", text[begin:], flags=re.M)
    depth = 0
    for chunk in body.split(";"):
        statement = chunk.lstrip()
        at = line + chunk.count("\n", 0, len(chunk) - len(statement))
        while statement:  # braces and labels may precede an instruction
            if statement[0] in "{}":
                depth += 1 if statement[0] == "{" else -1
                if depth < 0:
                    return kernel
                rest = statement[1:]
            elif label := re.match(r"([\w$]+):", statement):
                kernel.labels[label[1]] = len(kernel.instructions)
                rest = statement[label.end() :]
            else:
                break
            statement = rest.lstrip()
            at += rest.count("\n", 0, len(rest) - len(statement))
        line += chunk.count("\n")
        if declared := re.match(r"\.reg\s+\.(\w+)\s+(.*)$", statement, re.S):
            for name in declared[2].split(","):
                kernel.registers[re.sub(r"<\d+>", "", name.strip())] = BYTES[declared[1]]
        elif statement and not statement.startswith("."):
            kernel.instructions.append(_instruction(statement.strip(), at))
    raise ValueError("the entry of the PTX has no end")


def _instruction(text: str, line: int) -> Instruction:
    predicate = None
    if match := re.match(r"@(!?)([%\w]+)\s+", text):
        predicate = match[2], match[1] == "!"
        text = text[match.end() :]
    name, _, rest = text.partition(" ") if " " in text.split("\t")[0] else text.partition("\t")
    operands: list[Operand] = []
    for item in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", rest):
        if item.startswith("{"):
            operands.append(tuple(part.strip() for part in item[1:-1].split(",")))
        elif item.strip():
            operands.append(item.strip())
    return Instruction(line, predicate, tuple(name.strip().split(".")), tuple(operands))


def address(operand: Operand) -> tuple[str, int]:
    """Register (or name) and offset of ``[%rd1 + 16]``."""
    match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", str(operand))
    assert match is not None, operand
    return match[1], int(match[2], 0) if match[2] else 0
