# SPDX-License-Identifier: Apache-2.0
"""An interpreter of PTX: all threads of a block in lockstep, in NumPy.

It covers the code that Triton generates for this project's kernels for sm_80 and sm_90a, and nvcc's for
cross_attention. The data of a cp.async arrive at its wait. A wgmma computes at once, and its registers and shared
memory stay locked until its wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gpu_simulated import arithmetic, matrix
from tests.gpu_simulated.memory import NOT_AWAITED, Fault, Global, Report, Shared
from tests.gpu_simulated.ptx import BYTES, NUMPY, UNSIGNED, Instruction, Kernel, Operand, address

Array = NDArray[Any]
ACCUMULATOR_READ = "accumulator read while its wgmma is under way"
ACCUMULATOR_WRITTEN = "accumulator written while its wgmma is under way"
OPERAND_WRITTEN = "register operand written while its wgmma is under way"
NOT_FENCED = "wgmma uses a register that was written since the last wgmma.fence"
_CONVERGED = {"shfl", "ldmatrix", "stmatrix", "wgmma", "mma", "bar", "barrier"}
_NOTHING = {"nop", "membar", "prefetch"}


@dataclass
class _Wgmma:
    """A wgmma that has not been waited for: registers that it reads and writes, bytes of shared memory that it
    reads."""

    operands: set[str]
    accumulators: set[str]
    places: NDArray[np.int64]


class Block:
    """One block of a launch. ``arguments``: the bytes of each parameter."""

    def __init__(
        self, kernel: Kernel, threads: int, shared: int, arguments: list[bytes], at: tuple[int, ...],
        grid: tuple[int, ...], memory: Global, report: Report,
    ) -> None:  # fmt: skip
        self.kernel, self.threads, self.arguments, self.memory, self.report = kernel, threads, arguments, memory, report
        self.number = at[0] + grid[0] * (at[1] + grid[1] * at[2])
        self.shared = Shared(shared, report)
        self.warp = np.arange(threads) // 32
        self.executed = 0
        self._registers: dict[str, Array] = {}
        self._special: dict[str, Any] = {f"%ctaid.{axis}": i for axis, i in zip("xyz", at, strict=True)}
        self._special |= {f"%nctaid.{axis}": n for axis, n in zip("xyz", grid, strict=True)}
        self._special |= {"%tid.x": np.arange(threads), "%laneid": np.arange(threads) % 32, "%ntid.x": threads}
        self._special |= {"%tid.y": 0, "%tid.z": 0, "%ntid.y": 1, "%ntid.z": 1}
        self._copies: list[tuple[Array, Array, Array]] = []  # cp.async: bytes of shared memory, warps, data
        self._copy_groups: list[list[tuple[Array, Array, Array]]] = []
        self._products: list[_Wgmma] = []
        self._product_groups: list[list[_Wgmma]] = []
        self._multiplying = False
        self._unfenced: set[str] = set()  # registers that were written since the last wgmma.fence

    def run(self) -> None:
        """After a divergent branch, the threads that are furthest behind run first, until all are at the same
        instruction.

        Raises:
            Fault: a forbidden operation, or an unsupported instruction.
        """
        end = len(self.kernel.instructions)
        at, apart, active = 0, None, None
        with np.errstate(all="ignore"):
            while True:
                if apart is not None:
                    at = int(apart.min())
                    active = apart == at
                    if active.all():
                        apart = active = None
                if at >= end:
                    break
                instruction = self.kernel.instructions[at]
                self.report.line = instruction.line
                self.executed += 1
                mask, operation = active, instruction.parts[0]
                if instruction.predicate is not None:
                    name, negated = instruction.predicate
                    held = self.value(name, "pred") != negated
                    mask = held if mask is None else mask & held
                if operation in ("bra", "ret", "exit"):
                    to = self.kernel.labels[str(instruction.operands[0])] if operation == "bra" else end
                    if mask is None or (apart is None and mask.all()):
                        at = to
                    elif apart is None and not mask.any():
                        at += 1
                    else:
                        go = np.where(mask, to, at + 1)
                        apart = go if apart is None else np.where(active, go, apart)
                    continue
                if apart is not None and operation in _CONVERGED:
                    raise Fault(f"{instruction} where threads have parted")
                if mask is None or mask.any():
                    self._execute(instruction, mask)
                if apart is None:
                    at += 1
                else:
                    apart = np.where(active, at + 1, apart)
        if any((self._copies, self._copy_groups, self._products, self._product_groups)):
            self.report.add(NOT_AWAITED)

    # Registers.

    def value(self, operand: Operand, kind: str) -> Array:
        """An operand as numbers of a type, one per thread."""
        assert isinstance(operand, str), operand
        if operand in self._special:
            return np.broadcast_to(np.asarray(self._special[operand], NUMPY[kind]), (self.threads,))
        if self.kernel.width(operand) is not None:
            self._touch(operand, False)
            if operand not in self._registers:
                raise Fault(f"{operand} is read and was never written")
            held = self._registers[operand]
            if kind == "pred":
                return held
            n = BYTES[kind]
            if held.itemsize < n:
                raise Fault(f"{n} bytes of {operand}, which has {held.itemsize}")
            return held.astype(UNSIGNED[n]).view(NUMPY.get(kind, UNSIGNED[n]))
        if kind == "pred":
            return np.full(self.threads, int(operand, 0) != 0)
        if operand[:2].lower() in ("0f", "0d"):
            number = int(operand[2:], 16)
        else:
            begins = operand in self.kernel.arrays or operand in self.kernel.parameters
            number = 0 if begins else int(operand.rstrip("U"), 0)
        n = BYTES[kind]
        return np.full(self.threads, number & (1 << 8 * n) - 1, UNSIGNED[n]).view(NUMPY.get(kind, UNSIGNED[n]))

    def put(self, operand: Operand, value: Array, mask: Array | None) -> None:
        """Write one number per thread, extended to the register's size according to its type."""
        assert isinstance(operand, str), operand
        if operand == "_":
            return
        self._touch(operand, True)
        width = self.kernel.width(operand)
        if width is None:
            raise Fault(f"{operand} is no register")
        value = np.broadcast_to(np.asarray(value), (self.threads,))
        if width:
            n = value.itemsize
            extended = value.astype(f"{value.dtype.kind}{width}") if value.dtype.kind in "iu" and n != width else value
            value = np.ascontiguousarray(extended).view(UNSIGNED[width])
        if mask is not None:
            value = np.where(mask, value, self._registers.get(operand, np.zeros(1, value.dtype)))
        self._registers[operand] = value

    def _touch(self, register: str, write: bool) -> None:
        if self._multiplying:
            return
        if write:
            self._unfenced.add(register)
        for one in self._under_way():
            if register in one.accumulators:
                self.report.add(ACCUMULATOR_WRITTEN if write else ACCUMULATOR_READ)
            elif write and register in one.operands:
                self.report.add(OPERAND_WRITTEN)

    def _under_way(self) -> list[_Wgmma]:
        return [one for group in (*self._product_groups, self._products) for one in group]

    # Instructions.

    def _execute(self, instruction: Instruction, mask: Array | None) -> None:
        parts, operands = instruction.parts, instruction.operands
        special = getattr(self, f"_do_{parts[0]}", None)
        try:
            if special is not None:
                special(parts, operands, np.ones(self.threads, bool) if mask is None else mask)
            elif parts[0] not in _NOTHING:
                value = arithmetic.compute(parts, lambda i, kind: self.value(operands[1 + i], kind))
                self.put(operands[0], value, mask)
        except Fault as fault:
            raise Fault(f"{fault} ({self.kernel.name}, line {instruction.line}: {instruction})") from None
        except (KeyError, IndexError, ValueError, AssertionError) as error:
            raise Fault(f"not covered: {instruction} ({self.kernel.name}, line {instruction.line})") from error

    def _do_bar(self, parts: tuple[str, ...], operands: tuple[Operand, ...], mask: Array) -> None:
        if parts[1] == "warp":
            return
        if parts[1] != "sync" or int(str(operands[0]), 0) or len(operands) > 1 or not mask.all():
            raise Fault("not covered: a barrier of some of the block's threads")
        self.shared.barriers += 1

    _do_barrier = _do_bar

    def _do_fence(self, parts: tuple[str, ...], operands: tuple[Operand, ...], mask: Array) -> None:
        if "proxy" in parts:
            self.shared.fence()

    def _do_createpolicy(self, parts: tuple[str, ...], operands: tuple[Operand, ...], mask: Array) -> None:
        self.put(operands[0], np.zeros(self.threads, np.uint64), mask)

    def _do_setp(self, parts: tuple[str, ...], operands: tuple[Operand, ...], mask: Array) -> None:
        value = arithmetic.compare(parts, lambda i, kind: self.value(operands[1 + i], kind))
        for name, one in zip(str(operands[0]).split("|"), (value, ~value), strict=False):
            self.put(name, one, mask)

    def _do_mov(self, parts: tuple[str, ...], operands: tuple[Operand, ...], mask: Array) -> None:
        to, source = operands
        if parts[-1] == "pred":
            self.put(to, self.value(source, "pred"), mask)
            return
        n = BYTES[parts[-1]]
        if isinstance(source, tuple):
            self.put(to, self._join(self._bytes(source, n // len(source)), n), mask)
        elif isinstance(to, tuple):
            self._spread(to, self._bytes((source,), n), parts[-1], mask)
        else:
            self.put(to, self.value(source, f"b{8 * n}"), mask)

    def _bytes(self, operands: tuple[str, ...], n: int) -> NDArray[np.uint8]:
        """n bytes of each operand, concatenated, [threads, bytes]."""
        parts = [np.ascontiguousarray(self.value(o, f"b{8 * n}")).view(np.uint8) for o in operands]
        return np.concatenate([part.reshape(self.threads, n) for part in parts], 1)

    def _join(self, data: NDArray[np.uint8], n: int) -> Array:
        return np.ascontiguousarray(data).view(UNSIGNED[n])[:, 0]

    def _spread(self, to: tuple[str, ...], data: NDArray[np.uint8], kind: str, mask: Array) -> None:
        n = data.shape[1] // len(to)
        number = NUMPY.get(kind, UNSIGNED[n]) if BYTES[kind] == n else UNSIGNED[n]
        for i, register in enumerate(to):
            self.put(register, self._join(data[:, i * n : (i + 1) * n], n).view(number), mask)

    def _do_ld(self, parts: tuple[str, ...], operands: tuple[Operand, ...], mask: Array) -> None:
        kind = parts[-1]
        if parts[1] == "param":
            self._load_parameter(operands, kind, mask)
            return
        to = operands[0] if isinstance(operands[0], tuple) else (operands[0],)
        self._spread(to, self._move(parts, operands[1], len(to) * BYTES[kind], mask, None), kind, mask)

    def _load_parameter(self, operands: tuple[Operand, ...], kind: str, mask: Array) -> None:
        """By name, or by an address in a register, which is an offset into the first parameter."""
        name, offset = address(operands[1])
        to = operands[0] if isinstance(operands[0], tuple) else (operands[0],)
        named = name in self.kernel.parameters
        raw = np.frombuffer(self.arguments[self.kernel.parameters[name][0] if named else 0], np.uint8)
        begin = np.zeros(self.threads, np.int64) if named else self.value(name, "s64").astype(np.int64)
        n = len(to) * BYTES[kind]
        self._spread(to, raw[np.where(mask, begin + offset, 0)[:, None] + np.arange(n)], kind, mask)

    def _do_st(self, parts: tuple[str, ...], operands: tuple[Operand, ...], mask: Array) -> None:
        source = operands[1] if isinstance(operands[1], tuple) else (operands[1],)
        data = self._bytes(source, BYTES[parts[-1]])
        self._move(parts, operands[0], data.shape[1], mask, data)

    def _move(
        self, parts: tuple[str, ...], operand: Operand, n: int, mask: Array, data: NDArray[np.uint8] | None
    ) -> NDArray[np.uint8]:
        """Read or write n bytes per thread."""
        name, offset = address(operand)
        if parts[1] == "global":
            at = self.value(name, "u64") + np.uint64(offset & 2**64 - 1)
            return self.memory.access(self.number, at, mask, n, data)
        if not parts[1].startswith("shared"):
            raise Fault(f"not covered: state space {parts[1]}")
        whole = (self.value(name, "u32") + np.uint32(offset & 2**32 - 1))[mask]
        places, warps = self.shared.places(whole, n, n), self.warp[mask]
        if data is not None:
            self.shared.write(places, warps, data[mask])
            return data
        read = np.zeros((self.threads, n), np.uint8)
        read[mask] = self.shared.read(places, warps)
        return read

    def _do_shfl(self, parts: tuple[str, ...], operands: tuple[Operand, ...], mask: Array) -> None:
        words, by = (self.value(o, "u32").reshape(-1, 32) for o in operands[1:3])
        lane, by = matrix.LANE, by.astype(np.int64)
        source = {"bfly": lane ^ by, "idx": by + 0 * lane, "up": lane - by, "down": lane + by}[parts[2]]
        source = np.where((source < 0) | (source > 31), lane, source)
        self.put(str(operands[0]).split("|")[0], np.take_along_axis(words, source, 1).reshape(-1), mask)

    def _do_cp(self, parts: tuple[str, ...], operands: tuple[Operand, ...], mask: Array) -> None:
        if parts[2] == "commit_group":
            self._copy_groups.append(self._copies)
            self._copies = []
        elif parts[2] in ("wait_group", "wait_all"):
            if parts[2] == "wait_all":
                self._copy_groups.append(self._copies)
                self._copies = []
            keep = int(str(operands[0]), 0) if parts[2] == "wait_group" else 0
            while len(self._copy_groups) > keep:
                for places, warps, data in self._copy_groups.pop(0):
                    self.shared.copy_ends(places, warps, data)
        else:
            self._copy(operands, mask)

    def _copy(self, operands: tuple[Operand, ...], mask: Array) -> None:
        n = int(str(operands[2]), 0)
        (to, to_offset), (source, offset) = address(operands[0]), address(operands[1])
        size = self.value(operands[3], "u32") if len(operands) > 3 else np.full(self.threads, n)
        if not np.isin(size[mask], (0, n)).all():
            raise Fault("not covered: a cp.async of a part")
        at = self.value(source, "u64") + np.uint64(offset & 2**64 - 1)
        data = self.memory.access(self.number, at, mask & (size > 0), n, None)[mask]
        places = self.shared.places((self.value(to, "u32") + np.uint32(to_offset))[mask], n, n)
        self.shared.copy_begins(places, self.warp[mask])
        self._copies.append((places, self.warp[mask], data))

    def _do_ldmatrix(self, parts: tuple[str, ...], operands: tuple[Operand, ...], mask: Array) -> None:
        rows = self._rows(operands[1])
        to = operands[0] if isinstance(operands[0], tuple) else (operands[0],)
        for i, register in enumerate(to):
            read = self.shared.read(*rows(i)).reshape(-1, 8, 16)
            self.put(register, matrix.from_rows(read, "trans" in parts).reshape(-1), mask)

    def _do_stmatrix(self, parts: tuple[str, ...], operands: tuple[Operand, ...], mask: Array) -> None:
        rows = self._rows(operands[0])
        source = operands[1] if isinstance(operands[1], tuple) else (operands[1],)
        for i, register in enumerate(source):
            words = self.value(register, "b32").reshape(-1, 32)
            self.shared.write(*rows(i), matrix.to_rows(words, "trans" in parts).reshape(-1, 16))

    def _rows(self, operand: Operand) -> Any:
        """For the i-th matrix of each warp: the bytes of its rows (eight lanes hold the addresses), and their warps."""
        name, offset = address(operand)
        at = (self.value(name, "u32") + np.uint32(offset & 2**32 - 1)).reshape(-1, 32)
        warps = np.repeat(np.arange(len(at)), 8)
        return lambda i: (self.shared.places(at[:, 8 * i : 8 * i + 8].reshape(-1), 16, 16), warps)

    def _do_mma(self, parts: tuple[str, ...], operands: tuple[Operand, ...], mask: Array) -> None:
        assert "m16n8k16" in parts and parts[-1] == "f32", parts
        kind, warps = parts[-2], self.threads // 32
        to, *sources = operands
        a, b = (([self.value(o, "b32") for o in source]) for source in sources[:2])
        c = matrix.product(matrix.operand_a(a, kind, warps), matrix.operand_b(b, kind, warps))
        for i, (register, added) in enumerate(zip(to, sources[2], strict=True)):
            self.put(register, matrix.of_accumulator(c, i).reshape(-1) + self.value(added, "f32"), None)

    def _do_wgmma(self, parts: tuple[str, ...], operands: tuple[Operand, ...], mask: Array) -> None:
        if parts[1] == "commit_group":
            self._product_groups.append(self._products)
            self._products = []
        elif parts[1] == "wait_group":
            while len(self._product_groups) > int(str(operands[0]), 0):
                for one in self._product_groups.pop(0):
                    self.shared.read_by_wgmma[one.places] -= 1
                    self.shared.wgmma_ended(one.places)
        elif parts[1] == "fence":
            self._unfenced.clear()
        elif parts[1] == "mma_async":
            used = {register for operand in operands[:2] if isinstance(operand, tuple) for register in operand}
            if used & self._unfenced:
                self.report.add(NOT_FENCED)
            self._multiplying = True
            self._multiply(parts, operands)
            self._multiplying = False

    def _multiply(self, parts: tuple[str, ...], operands: tuple[Operand, ...]) -> None:
        shape = next(part for part in parts if part.startswith("m64n"))
        columns, kind = int(shape[4 : shape.index("k")]), parts[-1]
        assert shape.endswith("k16") and kind in ("bf16", "f16") and parts[-2] == kind, parts
        to, a, b, scale, *options = operands
        assert isinstance(to, tuple)
        flags = [int(str(option), 0) for option in options]  # signs of A and B, then which of them is transposed
        assert flags[:2] == [1, 1], options
        from_registers = isinstance(a, tuple)
        kept = self.value(scale, "pred")
        places: list[NDArray[np.int64]] = []
        results: list[Array] = []
        for group in range(self.threads // 128):
            own = slice(128 * group, 128 * group + 128)
            second = self._operand(b, own, columns, kind, bool(flags[-1]), places)
            if from_registers:
                first = matrix.operand_a([self.value(o, "b32")[own] for o in a], kind, 4)
            else:
                first = self._operand(a, own, 64, kind, bool(flags[2]), places).reshape(4, 16, 16)
            results.append(matrix.product(first, second.T))
        for i, register in enumerate(to):
            new = np.concatenate([matrix.of_accumulator(c, i).reshape(-1) for c in results])
            if kept.any():
                new = np.where(kept, self.value(register, "f32") + new, new)
            self.put(register, new, None)
        whole = np.unique(np.concatenate(places))
        whole = np.concatenate([whole, whole + 1])
        self.shared.read_by_wgmma[whole] += 1
        self._products.append(_Wgmma(set(a) if from_registers else set(), set(to), whole))

    def _operand(
        self, operand: Operand, own: slice, rows: int, kind: str, transposed: bool, places: list[NDArray[np.int64]]
    ) -> NDArray[np.float32]:
        values = self.value(operand, "u64")[own]
        if (values != values[0]).any():
            raise Fault("a descriptor that differs inside of a warpgroup")
        at = matrix.descriptor(int(values[0]), rows, 16, transposed)
        if at.max() + 2 > self.shared.size:
            raise Fault(f"wgmma reads shared memory at {at.max()}, of {self.shared.size}")
        self.shared.wgmma_reads(at)
        places.append(at.reshape(-1))
        pairs = np.stack([self.shared.bytes[at], self.shared.bytes[at + 1]], -1)
        return matrix.halves(np.ascontiguousarray(pairs).view(np.uint16)[..., 0], kind)
