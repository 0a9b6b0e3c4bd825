# SPDX-License-Identifier: Apache-2.0
"""Matrix instructions: which thread holds which element, and the meaning of a shared memory descriptor (PTX ISA,
"Matrix multiply-accumulate", "Asynchronous warpgroup level")."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gpu_simulated.arithmetic import halves

Array = NDArray[Any]
LANE = np.arange(32)
_SPAN, _SWIZZLE = (
    {0: 16, 1: 128, 2: 64, 3: 32},
    {0: 0, 1: 7, 2: 3, 3: 1},
)  # bytes of a row, and the permuted bits


def descriptor(value: int, rows: int, depth: int, transposed: bool) -> NDArray[np.int64]:
    """Addresses of the 16-bit elements [rows, depth] of a wgmma's operand. If transposed, ``rows`` is the contiguous
    dimension, else ``depth``."""
    start, leading, stride = ((value >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    mode = value >> 62 & 3
    row, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
    along, across = (row, k) if transposed else (k, row)
    if mode == 0 and transposed:  # without a swizzle the stride is across the sum here, too
        leading, stride = stride, leading
    elements = _SPAN[mode] // 2
    at = start + across // 8 * stride + across % 8 * _SPAN[mode] + along // elements * leading + along % elements * 2
    return at ^ ((at >> 7 & _SWIZZLE[mode]) << 4)


def operand_a(registers: list[Array], kind: str, warps: int) -> NDArray[np.float32]:
    """[warps, 16, 16] from four registers per thread with two elements each."""
    a = np.zeros((warps, 16, 16), np.float32)
    for i, register in enumerate(registers):
        row, column = LANE // 4 + 8 * (i % 2), 2 * (LANE % 4) + 8 * (i // 2)
        a[:, row, column], a[:, row, column + 1] = _pair(register.reshape(warps, 32), kind)
    return a


def operand_b(registers: list[Array], kind: str, warps: int) -> NDArray[np.float32]:
    """[warps, 16, 8] from two registers per thread."""
    b = np.zeros((warps, 16, 8), np.float32)
    for i, register in enumerate(registers):
        k, column = 2 * (LANE % 4) + 8 * i, LANE // 4
        b[:, k, column], b[:, k + 1, column] = _pair(register.reshape(warps, 32), kind)
    return b


def _pair(words: Array, kind: str) -> tuple[Array, Array]:
    return halves((words & 0xFFFF).astype(np.uint16), kind), halves((words >> 16).astype(np.uint16), kind)


def of_accumulator(c: Array, i: int) -> Array:
    """The elements of [warps, 16, columns] in the i-th accumulator of each thread, [warps, 32]."""
    return c[:, LANE // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (LANE % 4) + i % 2]


def product(a: Array, b: Array) -> NDArray[np.float32]:
    """The exact sum, rounded to float32; tensor cores are less precise."""
    return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.float32)


def from_rows(rows: Array, transposed: bool) -> NDArray[np.uint32]:
    """ldmatrix: the words that threads get from 8 rows of 16 bytes per warp, [warps, 8, 16]."""
    m = np.ascontiguousarray(rows).view(np.uint16)
    m = m.transpose(0, 2, 1) if transposed else m
    low, high = (m[:, LANE // 4, 2 * (LANE % 4) + i].astype(np.uint32) for i in (0, 1))
    return low | high << 16


def to_rows(words: Array, transposed: bool) -> NDArray[np.uint8]:
    """stmatrix: the 8 rows of 16 bytes per warp from the words of its threads, [warps, 32]."""
    m = np.zeros((len(words), 8, 8), np.uint16)
    m[:, LANE // 4, 2 * (LANE % 4)], m[:, LANE // 4, 2 * (LANE % 4) + 1] = words & 0xFFFF, words >> 16
    return np.ascontiguousarray(m.transpose(0, 2, 1) if transposed else m).view(np.uint8)
