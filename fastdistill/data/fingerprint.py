# SPDX-License-Identifier: Apache-2.0
"""Fingerprints: what made a file, as JSON values and hashes that do not depend on the machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdistill.data.values import blocks
from fastdistill.errors import InputError

_ABSENT = "nothing"


def sha256_of_tensors(tensors: Mapping[str, Any]) -> str:
    """Hash of named tensors, such as ``module.state_dict()``: names, dtypes, shapes and values, nothing else.

    Neither the order of the mapping, nor the device, nor the memory layout (strides, channels_last) changes it. Values
    are compared by their bits: ``-0.0`` differs from ``0.0``. Tensors on another device and banks on the disk
    (``StoredRows``) are read block by block. InputError for tensors without values (meta device).
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        if isinstance(tensor, Tensor) and tensor.is_meta:
            raise InputError.of(f"tensors[{name!r}]", "a tensor with values", "one on the meta device")
        header = json.dumps([name, dtype_name(tensor.dtype), list(tensor.shape)])
        digest.update(f"{len(header)}:{header}".encode())  # the length keeps header and values apart
        for _, block in blocks(tensor.reshape(1) if tensor.ndim == 0 else tensor):
            flat = block.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sha256_of_json(value: object) -> str:
    """Hash of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(canonical_json(value, "value").encode()).hexdigest()


def canonical_json(value: object, argument: str) -> str:
    """The one spelling of a JSON value (sorted keys, no spaces); InputError naming ``argument`` for anything else."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError.of(
            argument, "values that JSON holds (str, int, finite float, bool, list, dict)", error
        ) from None


def plain(fingerprint: Mapping[str, Any], argument: str = "fingerprint") -> dict[str, Any]:
    """``fingerprint`` as it reads back from a file: tuples become lists, and so on."""
    value: dict[str, Any] = json.loads(canonical_json(dict(fingerprint), argument))
    return value


def differences(wanted: Mapping[str, Any], found: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line a field of ``wanted`` or ``found`` that is not the same in both: ``teacher: expected 'a', got 'b'``."""
    lines = []
    for key in sorted(wanted.keys() | found.keys()):
        a, b = wanted.get(key, _ABSENT), found.get(key, _ABSENT)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: expected {_short(a)}, got {_short(b)}")
    return lines


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float16`` -> ``"float16"``."""
    return str(dtype).removeprefix("torch.")


def _short(value: object) -> str:
    text = _ABSENT if value is _ABSENT else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
