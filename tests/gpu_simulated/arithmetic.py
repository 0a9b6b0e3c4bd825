# SPDX-License-Identifier: Apache-2.0
"""Instructions without side effects, on one number per thread."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.gpu_simulated.ptx import BYTES, NUMPY, UNSIGNED

Array = NDArray[Any]
#: ``source(i, type)``: the i-th source operand as numbers of that type; "pred" as booleans.
Source = Callable[[int, str], Array]


def from_bf16(x: Array) -> NDArray[np.float32]:
    return (x.astype(np.uint32) << 16).view(np.float32)


def to_bf16(x: Array) -> NDArray[np.uint16]:
    """Rounds to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def halves(x: Array, kind: str) -> NDArray[np.float32]:
    """16-bit patterns of ``bf16`` or ``f16`` as float32."""
    return from_bf16(x) if kind == "bf16" else x.astype(np.uint16).view(np.float16).astype(np.float32)


def _to_half(x: Array, kind: str) -> NDArray[np.uint16]:
    return to_bf16(x) if kind == "bf16" else x.astype(np.float16).view(np.uint16)


def _to_e4m3(x: Array) -> NDArray[np.uint16]:
    """8-bit patterns: to the nearest, ties to even, limited to 448."""
    limited = torch.from_numpy(np.ascontiguousarray(x, np.float32)).clamp(-448, 448)
    return limited.to(torch.float8_e4m3fn).view(torch.uint8).numpy().astype(np.uint16)


def compute(parts: tuple[str, ...], source: Source) -> Array:
    """The result of an instruction for each thread.

    Raises:
        KeyError: an unknown instruction.
    """
    kind = parts[-1]
    if kind == "pred":
        return _LOGIC[parts[0]](*(source(i, kind) for i in range(1 if parts[0] == "not" else 2)))
    return _INSTRUCTIONS[parts[0]](parts, kind, source)


def _fma(kind: str, a: Array, b: Array, c: Array) -> Array:
    wide = np.float64 if kind == "f32" else np.longdouble
    return (a.astype(wide) * b + c).astype(a.dtype)


def _quotient(a: Array, b: Array) -> Array:
    b = np.where(b == 0, np.ones(1, b.dtype), b)
    q = a // b  # rounds toward minus infinity; PTX rounds toward zero
    return (q + ((q * b != a) & ((a < 0) != (b < 0)))).astype(a.dtype)


_LOGIC: dict[str, Callable[..., Array]] = {
    "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not, "mov": lambda a: a,
}  # fmt: skip
_FLOAT: dict[str, Callable[..., Array]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "neg": operator.neg,
    "abs": np.abs, "sqrt": np.sqrt, "rcp": lambda a: 1 / a, "rsqrt": lambda a: 1 / np.sqrt(a), "ex2": np.exp2,
    "lg2": np.log2, "sin": np.sin, "cos": np.cos,
}  # fmt: skip
_INTEGER: dict[str, Callable[..., Array]] = {
    "add": operator.add, "sub": operator.sub, "min": np.minimum, "max": np.maximum, "abs": np.abs,
    "neg": lambda a: np.zeros(1, a.dtype) - a, "div": _quotient, "rem": lambda a, b: np.fmod(a, np.where(b == 0, 1, b)),
}  # fmt: skip
_UNARY = {"neg", "abs", "sqrt", "rcp", "rsqrt", "ex2", "lg2", "sin", "cos"}


def _number(parts: tuple[str, ...], kind: str, source: Source) -> Array:
    values = [source(i, kind) for i in range(1 if parts[0] in _UNARY else 2)]
    if kind not in ("f32", "f64"):
        return _INTEGER[parts[0]](*values).astype(values[0].dtype)
    if parts[0] in ("min", "max"):
        propagating = "NaN" in parts
        least, most = (np.minimum, np.maximum) if propagating else (np.fmin, np.fmax)
        return (least if parts[0] == "min" else most)(*values)
    return _FLOAT[parts[0]](*values).astype(values[0].dtype)


def _product(parts: tuple[str, ...], kind: str, source: Source) -> Array:
    if kind in ("f32", "f64"):
        return _number(parts, kind, source)
    a, b = source(0, kind), source(1, kind)
    if "wide" in parts or ("hi" in parts and BYTES[kind] < 8):
        wide = NUMPY[f"{kind[0]}{16 * BYTES[kind]}"]
        whole = a.astype(wide) * b.astype(wide)
        return whole if "wide" in parts else (whole >> (8 * BYTES[kind])).astype(a.dtype)
    if "hi" in parts:
        products = [int(x) * int(y) >> 64 & (2**64 - 1) for x, y in zip(a, b, strict=True)]
        return np.array(products, np.uint64).view(a.dtype)
    return a * b


def _multiply_add(parts: tuple[str, ...], kind: str, source: Source) -> Array:
    wide = f"{kind[0]}{16 * BYTES[kind]}" if "wide" in parts else kind
    return _product(parts, kind, source) + source(2, wide)


def _shift(parts: tuple[str, ...], kind: str, source: Source) -> Array:
    bits = 8 * BYTES[kind]
    right = parts[0] == "shr"
    a = source(0, kind if right else f"u{bits}")
    by = source(1, "u32").astype(np.int64)
    far, by = by >= bits, np.minimum(by, bits - 1).astype(a.dtype)
    moved = a >> by if right else a << by
    return np.where(far & (not right or kind[0] != "s"), np.zeros(1, a.dtype), moved)


def _funnel(parts: tuple[str, ...], kind: str, source: Source) -> Array:
    low, high, by = (source(i, "u32").astype(np.uint64) for i in range(3))
    by = np.minimum(by, 32) if "clamp" in parts else by & 31
    whole = high << np.uint64(32) | low
    return (whole >> by if "r" in parts else whole << by >> np.uint64(32)).astype(np.uint32)


def _field(parts: tuple[str, ...], kind: str, source: Source) -> Array:
    word = UNSIGNED[BYTES[kind]]
    a = source(0, f"u{8 * BYTES[kind]}")
    begin, length = (source(i, "u32").astype(word) for i in (1, 2))
    value = (a >> begin) & ((word(1) << length) - word(1))
    if kind[0] == "s":
        sign = word(1) << (length - word(1))
        value = ((value ^ sign) - sign).view(NUMPY[kind])
    return value


def _insert(parts: tuple[str, ...], kind: str, source: Source) -> Array:
    a, b, begin, length = (source(i, "u32").astype(np.uint64) for i in range(4))
    mask = ((np.uint64(1) << length) - np.uint64(1)) << begin
    return (b & ~mask | a << begin & mask).astype(np.uint32)


def _permute(parts: tuple[str, ...], kind: str, source: Source) -> Array:
    a, b, chosen = (source(i, "u32") for i in range(3))
    eight = np.ascontiguousarray(np.stack([a, b], 1)).view(np.uint8)
    four = [eight[np.arange(len(a)), (chosen >> np.uint32(4 * i)) & 7] for i in range(4)]
    return np.ascontiguousarray(np.stack(four, 1)).view(np.uint32)[:, 0]


def _bits(parts: tuple[str, ...], kind: str, source: Source) -> Array:
    bits = f"b{8 * BYTES[kind]}"
    if parts[0] == "not":
        return ~source(0, bits)
    return {"and": operator.and_, "or": operator.or_, "xor": operator.xor}[parts[0]](source(0, bits), source(1, bits))


def _compare(parts: tuple[str, ...], kind: str, source: Source) -> NDArray[np.bool_]:
    a, b, how = source(0, kind), source(1, kind), parts[1]
    if how in ("num", "nan"):
        return (np.isnan(a) | np.isnan(b)) == (how == "nan")
    signs = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
    value: Array = getattr(operator, signs.get(how, how[:2]))(a, b)
    if kind in ("f32", "f64"):
        neither = np.isnan(a) | np.isnan(b)
        value = value | neither if how.endswith("u") else value & ~neither
    return value


def compare(parts: tuple[str, ...], source: Source) -> NDArray[np.bool_]:
    """``setp``, combined with a third operand if there is one."""
    value = _compare(parts, parts[-1], source)
    return _LOGIC[parts[2]](value, source(2, "pred")) if parts[2] in _LOGIC else value


def _select(parts: tuple[str, ...], kind: str, source: Source) -> Array:
    bits = f"b{8 * BYTES[kind]}"
    return np.where(source(2, "pred"), source(0, bits), source(1, bits))


def _convert(parts: tuple[str, ...], kind: str, source: Source) -> Array:
    to = parts[-2]
    if to in ("bf16x2", "f16x2"):
        high, low = (_to_half(source(i, "f32"), to[:-2]).astype(np.uint32) for i in (0, 1))
        return high << 16 | low
    if to == "e4m3x2":
        return _to_e4m3(source(0, "f32")) << 8 | _to_e4m3(source(1, "f32"))
    value = halves(source(0, "b16"), kind) if kind in ("bf16", "f16") else source(0, kind)
    if to in ("bf16", "f16"):
        return _to_half(value, to)
    if kind[-3] in "bf" and to[0] in "su":  # from a floating point number
        rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
        (how,) = (rounding[part] for part in parts if part in rounding)
        limits = np.iinfo(NUMPY[to])
        value = np.clip(np.nan_to_num(how(value.astype(np.float64))), limits.min, limits.max)
    return value.astype(NUMPY[to])


_INSTRUCTIONS: dict[str, Callable[[tuple[str, ...], str, Source], Array]] = {
    **dict.fromkeys([*_FLOAT, *_INTEGER], _number),
    **dict.fromkeys(["and", "or", "xor", "not"], _bits),
    **dict.fromkeys(["shl", "shr"], _shift),
    "mul": _product, "mad": _multiply_add, "shf": _funnel, "bfe": _field, "prmt": _permute, "selp": _select,
    "bfi": _insert, "cvta": lambda parts, kind, source: source(0, kind),
    "cvt": _convert, "fma": lambda parts, kind, source: _fma(kind, *(source(i, kind) for i in range(3))),
}  # fmt: skip
