# SPDX-License-Identifier: Apache-2.0
"""Damage to a file: bytes flipped, cut or appended, a JSON value replaced by another, a wrong safetensors header. And
the check of how a reader reacts."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st

from fastdistill.errors import FastdistillError
from tests.fuzz.calls import Fault

NUMBERS = st.sampled_from(
    (0, 1, -1, 2, 3, 5, 255, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64, 10**30, 0.5, 1e308, float("inf"), float("nan"))
)
WORDS = st.sampled_from(
    ("", "float32", "float16", "int64", "F32", "F16", "BOOL", "quint8", "Tensor", "..", "/etc/passwd", "\0", "shape",
     "shard-00000.safetensors", "manifest.json", "geglu", "adamw_ema", "reference", "9" * 400, "\ud800")
)  # fmt: skip
ATOMS = st.one_of(NUMBERS, WORDS, st.none(), st.booleans(), st.integers(-9, 9), st.text(max_size=4))
VALUES = st.recursive(ATOMS, lambda one: st.one_of(st.lists(one, max_size=3), st.dictionaries(WORDS, one, max_size=3)))
PLACES = st.lists(st.integers(0, 40), max_size=5)
DEEP = "[" * 100_000 + "]" * 100_000  # nested more deeply than Python's JSON parser allows

#: A change of bytes: (kind, position, bytes).
BYTES = st.tuples(
    st.sampled_from(("flip", "zero", "cut", "append", "insert", "set")), st.integers(0, 2**16), st.binary(max_size=9)
)
#: A change of JSON: (path, kind, value); the path has child numbers, modulo the number of children.
CHANGES = st.lists(st.tuples(PLACES, st.sampled_from(("set", "drop", "add", "swap")), VALUES), min_size=1, max_size=3)


def damaged(data: bytes, change: tuple[str, int, bytes]) -> bytes:
    """The bytes after one change."""
    kind, place, some = change
    at = place % (len(data) + 1)
    if kind == "cut":
        return data[:at]
    if kind == "append":
        return data + some
    if kind == "insert":
        return data[:at] + some + data[at:]
    if kind == "set":
        return data[:at] + some + data[at + len(some) :]
    if kind == "zero":
        return data[:at] + bytes(len(data[at : at + 64])) + data[at + 64 :]
    return data[:at] + bytes(b ^ (1 << (place >> 8) % 8) for b in data[at : at + 1]) + data[at + 1 :]


def changed(value: Any, changes: list[tuple[list[int], str, Any]]) -> Any:
    """A JSON value after changes."""
    value = copy.deepcopy(value)
    for places, kind, new in changes:
        value = _change(value, places or [0], kind, new)
    return value


def _change(value: Any, places: list[int], kind: str, new: Any) -> Any:
    if not isinstance(value, dict | list) or not value:
        return new
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, rest = keys[places[0] % len(keys)], places[1:]
    if rest:
        value[key] = _change(value[key], rest, kind, new)
    elif kind == "drop":
        del value[key]
    elif kind == "add":
        if isinstance(value, dict):
            value[repr(new)[:20]] = new
        else:
            value.append(new)
    elif kind == "swap":
        other = keys[(places[0] + 1) % len(keys)]
        value[key], value[other] = value[other], value[key]
    else:
        value[key] = new
    return value


def encoded(value: Any) -> bytes:
    """A JSON value as the bytes of a file, including lone surrogates."""
    return json.dumps(value).encode()


def with_header(data: bytes, changes: list[tuple[list[int], str, Any]], metadata: bool = False) -> bytes:
    """A safetensors file with changes in its header, or in the JSON of its metadata."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if metadata:
        inside = changed(json.loads(header["__metadata__"]["fastdistill"]), changes)
        header["__metadata__"]["fastdistill"] = json.dumps(inside)
    else:
        header = changed(header, changes)
    text = encoded(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def read(name: str, reader: Callable[[], Any], counts: Counter[str], what: str) -> Any:
    """What a reader returns; None if it refuses with one of this package's messages that names something."""
    try:
        found = reader()
    except FastdistillError as error:
        message = str(error)
        if ": " not in message or len(message) > 5000:
            raise Fault(f"{name}: a message that names nothing: {message[:300]!r}\n  {what}") from error
        counts[f"{name} reader refused"] += 1
        return None
    except MemoryError as error:
        raise Fault(f"{name}: allocates without bound\n  {what}") from error
    except Exception as error:
        place = _place(error)
        raise Fault(f"{name}: {type(error).__name__}: {str(error)[:300]} ({place})\n  {what}") from error
    counts[f"{name} reader accepted"] += 1
    return found


def _place(error: BaseException) -> str:
    """The last lines of this package in an error's traceback."""
    lines, step = [], error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        if "/fastdistill/" in code.co_filename:
            lines.append(f"{code.co_filename.rpartition('/fastdistill/')[2]}:{step.tb_lineno}")
        step = step.tb_next
    return ", ".join(lines[-2:])
