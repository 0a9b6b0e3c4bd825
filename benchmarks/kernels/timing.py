# SPDX-License-Identifier: Apache-2.0
"""A model of one Hopper multiprocessor that repeats a loop of SASS. Warps issue in order, with the compiler's stalls
and scoreboards, into pipes with published rates; memory has a latency and unlimited bandwidth.

Use it to see what limits a loop, and to compare two loops. It was compared with published rates of FlashAttention-2 in
Triton (forward: 396 TFLOP/s, published 396 to 403, at head dim 64; 365 to 485, published 389 to 477, at 128), before
partitions took turns at the memory pipe. It was not compared with a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.kernels.sass import Instruction

PARTITIONS = 4
MEMORY, BARRIER, TENSOR = 700, 22, 34  # clocks: of a cp.async, a barrier, and a wgmma without its multiplications
SHARED_QUEUE = 8  # the memory pipe may be this many clocks behind
_NEVER = 1 << 60


@dataclass(frozen=True)
class _Cost:
    """``pipe`` of a partition and the clocks that it is busy; clocks until the result; clocks of the memory pipe, which
    the partitions share."""

    pipe: str
    taken: int
    latency: int
    memory: int = 0


_ALU = _Cost("alu", 2, 5)
_COSTS = {
    **dict.fromkeys(("FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2"), _Cost("fma", 1, 4)),
    **dict.fromkeys(("DADD", "DMUL", "DFMA", "DSETP"), _Cost("double", 2, 10)),
    **dict.fromkeys("BRA S2R S2UR R2UR NOP WARPSYNC EXIT BSSY BSYNC".split(), _Cost("uniform", 2, 10)),
    "IMAD": _Cost("imad", 2, 5), "MUFU": _Cost("mufu", 8, 18), "SHFL": _Cost("memory", 2, 24, 1),
    "LDG": _Cost("memory", 2, 500, 2), "HGMMA": _Cost("tensor", 0, 0),
}  # fmt: skip


def _cost(i: Instruction) -> _Cost:
    words = max(i.bytes // 4, 1)
    if i.name in ("LDS", "STS"):
        return _Cost("memory", 2, 24 + words, words)
    if i.name in ("LDSM", "STSM"):
        return _Cost("memory", 2, 28, next((n for n in (4, 2) if f".{n}" in i.operation), 1))
    if i.name == "LDGSTS":
        return _Cost("memory", 2, 10, max(words, 2))
    if i.name == "STG":
        return _Cost("memory", 2, 10, max(words, 2))
    if i.name.startswith("U") and i.name != "UTMALDG":
        return _Cost("uniform", 2, 10)
    return _COSTS.get(i.name, _ALU)


@dataclass
class _Warp:
    block: int
    number: int
    at: int = 0
    turn: int = 0
    ready: int = 0
    scoreboards: list[int] = field(default_factory=lambda: [0] * 6)
    products: list[int] = field(default_factory=list)  # when each group of wgmmas ends; _NEVER: some have not started
    copies: int = 0  # when the committed copies arrive
    copying: int = 0


class Multiprocessor:
    """``body`` is executed by ``warps`` warps of each of ``blocks`` blocks."""

    def __init__(self, body: Sequence[Instruction], warps: int, blocks: int) -> None:
        self.body, self.costs, self.size = body, [_cost(i) for i in body], warps
        self.warps = [_Warp(b, w) for b in range(blocks) for w in range(warps)]
        self.blocks = blocks
        self._of = [[w for w in self.warps if w.number % PARTITIONS == p] for p in range(PARTITIONS)]
        self._pipes: list[dict[str, int]] = [{} for _ in range(PARTITIONS)]
        self._tensor = [0] * PARTITIONS
        self._memory = 0
        self._soonest = [0] * PARTITIONS  # per partition the earliest clock at which a warp may issue
        self._arrived: dict[int, list[_Warp]] = {}
        self._together: dict[tuple[int, int, int, int], list[_Warp]] = {}

    def clocks(self, turns: int = 5) -> float:
        """Clocks per iteration of one block in the steady state; the first iteration does not count.

        Raises:
            RuntimeError: warps wait for each other.
        """
        now, last, left = 0, [0] * PARTITIONS, len(self.warps)
        ends: dict[tuple[int, int], int] = {}
        while left > 0:
            for p in range(now, now + PARTITIONS):  # the partitions take turns at shared resources
                p %= PARTITIONS
                if self._soonest[p] > now:
                    continue
                own, soonest = self._of[p], _NEVER
                for k in range(len(own)):
                    warp = own[(last[p] + 1 + k) % len(own)]
                    when = warp.ready if warp.ready > now else self._when(warp, p, now)
                    if when > now:
                        warp.ready = max(warp.ready, when) if when < _NEVER else warp.ready
                        soonest = min(soonest, when)
                        continue
                    self._issue(warp, p, now)
                    last[p] = (last[p] + 1 + k) % len(own)
                    soonest = now + 1
                    if warp.at == len(self.body):
                        warp.at, warp.turn = 0, warp.turn + 1
                        ends[warp.block, warp.turn] = now  # the last warp of the block overwrites the others
                        if warp.turn == turns:
                            warp.ready = _NEVER
                            left -= 1
                    break
                self._soonest[p] = max(soonest, now + 1)
            soonest = min(self._soonest)
            if soonest == _NEVER and left:
                raise RuntimeError("the warps of the modelled loop wait for each other")
            now = max(now + 1, soonest)
        each = [(ends[b, turns] - ends[b, 2]) / (turns - 2) for b in range(self.blocks)]
        return sum(each) / len(each) / self.blocks

    def _when(self, warp: _Warp, p: int, now: int) -> int:
        """The earliest clock at which a warp may issue, as far as known."""
        if warp.ready > now:
            return warp.ready
        i, cost = self.body[warp.at], self.costs[warp.at]
        when = now
        if i.waits:
            when = max(board for n, board in enumerate(warp.scoreboards) if i.waits >> n & 1)
        if i.name == "DEPBAR":
            when = max(when, warp.copies)
        elif i.name == "WARPGROUP" and "DEPBAR" in i.operation:
            when = max([when, *warp.products[: len(warp.products) - _kept(i)]])
        if cost.taken:
            when = max(when, self._pipes[p].get(cost.pipe, 0))
        if cost.memory:
            when = max(when, self._memory - SHARED_QUEUE)
        return when

    def _issue(self, warp: _Warp, p: int, now: int) -> None:
        i, cost = self.body[warp.at], self.costs[warp.at]
        done = now + cost.latency
        if cost.taken:
            self._pipes[p][cost.pipe] = now + cost.taken
        if cost.memory:
            self._memory = max(self._memory, now) + cost.memory
            done = max(done, self._memory + cost.latency - cost.memory)
        if i.sets != 7:
            warp.scoreboards[i.sets] = max(warp.scoreboards[i.sets], done)
        if i.frees != 7:
            held = now + (12 if cost.memory else 8)
            warp.scoreboards[i.frees] = max(warp.scoreboards[i.frees], held)
        warp.ready = now + max(i.stall, 1)
        if i.name == "HGMMA":
            self._multiply(warp, i, now)
        elif i.name == "WARPGROUP" and "DEPBAR" in i.operation:
            warp.products = warp.products[len(warp.products) - _kept(i) :]
        elif i.name == "LDGSTS":
            warp.copying = now + MEMORY
        elif i.name == "LDGDEPBAR":
            warp.copies = warp.copying
        elif i.operation.startswith("BAR.SYNC"):
            self._arrive(warp, now)
        warp.at += 1

    def _arrive(self, warp: _Warp, now: int) -> None:
        waiting = self._arrived.setdefault(warp.block, [])
        waiting.append(warp)
        warp.ready = _NEVER
        if len(waiting) == self.size:
            for one in waiting:
                one.ready = now + BARRIER
            waiting.clear()
            self._soonest = [now + 1] * PARTITIONS

    def _multiply(self, warp: _Warp, i: Instruction, now: int) -> None:
        """A wgmma starts when the last of its four warps has issued it."""
        commits = "gsb0" in i.text
        if commits:
            warp.products.append(_NEVER)
        four = self._together.setdefault((warp.block, warp.number // 4, warp.turn, warp.at), [])
        four.append(warp)
        if len(four) < 4:
            return
        columns = re.search(r"64x(\d+)x", i.operation)
        assert columns is not None, i.text
        takes = max(int(columns[1]) // 2, 16 if i.operands[1].startswith("gdesc") else 8)
        end = 0
        for one in four:
            part = one.number % PARTITIONS
            self._tensor[part] = max(self._tensor[part], now) + takes
            end = max(end, self._tensor[part])
        if commits:
            for one in four:
                one.products[one.products.index(_NEVER)] = end + TENSOR
            self._soonest = [now + 1] * PARTITIONS


def _kept(i: Instruction) -> int:
    """How many groups of wgmmas may still run after a wait."""
    found = re.search(r"gsb0,\s*0x([0-9a-f]+)", i.text)
    return int(found[1], 16) if found else 0
