# SPDX-License-Identifier: Apache-2.0
"""Fingerprints: the origin of a file, as JSON values and hashes that do not depend on the machine.

A hash is computed from stored bits (weights of a file, rows of a bank), never from results of floating-point
computations, which differ between processors. These are identified by their inputs, or by ``up_to_rounding``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdistill.data.values import blocks
from fastdistill.errors import InputError

_ABSENT = "nothing"
_ROUNDED = "up_to_rounding"


def sha256_of_tensors(tensors: Mapping[str, Any]) -> str:
    """Hash of named tensors, such as ``module.state_dict()``: only of names, dtypes, shapes and values.

    The order of the mapping, the device and the memory layout (strides, channels_last) do not change it. Values are
    compared by their bits: ``-0.0`` differs from ``0.0``. Tensors on another device and banks on disk (``StoredRows``)
    are read block by block. InputError for tensors without values (meta device).
    """
    digest = hashlib.sha256()
    for _ in hashed_blocks(tensors, digest):
        pass
    return digest.hexdigest()


def hashed_blocks(tensors: Mapping[str, Any], digest: Any) -> Iterator[tuple[str, memoryview]]:
    """The bytes of named tensors, by name and block by block, after adding each to the digest
    (``sha256_of_tensors``)."""
    for name in sorted(tensors):
        tensor = tensors[name]
        if isinstance(tensor, Tensor) and tensor.is_meta:
            raise InputError.of(f"tensors[{name!r}]", "a tensor with values", "one on the meta device")
        header = json.dumps([name, dtype_name(tensor.dtype), list(tensor.shape)])
        digest.update(f"{len(header)}:{header}".encode())  # the length separates header and values
        for _, block in blocks(tensor.reshape(1) if tensor.ndim == 0 else tensor):
            flat = block.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            data = flat.view(torch.uint8).numpy().data
            digest.update(data)
            yield name, data


def sha256_of_json(value: object) -> str:
    """Hash of a JSON value; the order of keys does not matter."""
    return hashlib.sha256(canonical_json(value, "value").encode()).hexdigest()


def canonical_json(value: object, argument: str) -> str:
    """The canonical text of a JSON value (sorted keys, no spaces); InputError naming ``argument`` if it is not JSON.

    Scalars of NumPy and torch are treated as plain numbers. An infinite float becomes "inf" or "-inf".
    """
    try:
        return json.dumps(_finite(value), sort_keys=True, separators=(",", ":"), allow_nan=False, default=number)
    except (TypeError, ValueError, RecursionError) as error:
        rule = "values that JSON holds (str, int, float but NaN, bool, list, dict)"
        raise InputError.of(argument, rule, error) from None


def number(value: Any) -> Any:
    """The Python number in a scalar of NumPy or torch.

    Raises:
        TypeError: the value is no such scalar, or has no value (meta device).
    """
    scalar = isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0 and not value.is_meta)
    if not scalar:
        raise TypeError(f"a value of type {type(value).__name__}")
    return _finite(value.item())


def up_to_rounding(values: Tensor) -> dict[str, Any]:
    """Computed floating-point values as a JSON value. ``differences`` compares two of them with a tolerance: each value
    may differ by 1e-3 of itself or by 1e-6. Rounding in 1000 float32 operations is less; the effect of a setting is
    more."""
    return {_ROUNDED: values.detach().double().cpu().reshape(-1).tolist()}


def hashes(*values: object) -> bool:
    """Whether all values are hashes of equal length and can be compared; other fingerprints are names chosen by
    users."""
    texts = [value for value in values if isinstance(value, str) and re.fullmatch("[0-9a-f]{32,}", value)]
    return len(texts) == len(values) and len(set(map(len, texts))) == 1


def plain(fingerprint: Mapping[str, Any], argument: str = "fingerprint") -> dict[str, Any]:
    """``fingerprint`` as it would be read from a file: tuples become lists, and so on."""
    value: dict[str, Any] = json.loads(canonical_json(dict(fingerprint), argument))
    return value


def differences(wanted: Mapping[str, Any], found: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line per field that differs between ``wanted`` and ``found``: ``teacher: expected 'a', got 'b'``."""
    lines = []
    for key in sorted(wanted.keys() | found.keys()):
        a, b = wanted.get(key, _ABSENT), found.get(key, _ABSENT)
        if key == _ROUNDED and isinstance(a, list) and isinstance(b, list) and _close(a, b):
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: expected {_short(a)}, got {_short(b)}")
    return lines


def listed(lines: list[str], limit: int = 6) -> str:
    """Several lines as one; if there are many, only the number of the last ones is given."""
    rest = len(lines) - limit
    return "; ".join(lines[:limit]) + (f"; and {rest} more" if rest > 0 else "")


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float16`` -> ``"float16"``."""
    return str(dtype).removeprefix("torch.")


def _close(a: list[Any], b: list[Any]) -> bool:
    if len(a) != len(b) or not all(isinstance(value, float) for value in (*a, *b)):
        return False
    return all(math.isclose(x, y, rel_tol=1e-3, abs_tol=1e-6) for x, y in zip(a, b, strict=True))


def _finite(value: Any) -> Any:
    """A JSON value with its infinite floats as text."""
    if isinstance(value, float):
        return str(float(value)) if math.isinf(value) else value
    if isinstance(value, Mapping):
        return {key: _finite(element) for key, element in value.items()}
    return [_finite(element) for element in value] if isinstance(value, list | tuple) else value


def _short(value: object) -> str:
    text = _ABSENT if value is _ABSENT else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
