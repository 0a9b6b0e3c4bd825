# SPDX-License-Identifier: Apache-2.0
"""The rules that ops check before anything is launched, each with one wording."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdistill.errors import InputError

_passed: set[object] = set()
_MOST_PASSED = 4096
_kind = operator.attrgetter("shape", "dtype", "device")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def require(condition: bool, argument: str, rule: object, value: object) -> None:
    """Raise ``InputError`` "argument: expected rule, got value" unless the condition holds."""
    if not condition:
        raise InputError.of(argument, rule, value)


def tensors(**given: object) -> None:
    """Each is a tensor: not None, an array or a number."""
    for argument, value in given.items():
        require(isinstance(value, Tensor), argument, "a tensor", type(value).__name__)


def shape(tensor: Tensor, argument: str, expected: tuple[int | None, ...], meaning: str) -> None:
    """The tensor has this shape (None: any size); ``meaning`` says in words what it must be."""
    fits = tensor.dim() == len(expected) and all(e in (None, g) for e, g in zip(expected, tensor.shape, strict=True))
    require(fits, argument, meaning, tuple(tensor.shape))


def dtype(tensor: Tensor, argument: str, *allowed: torch.dtype) -> None:
    """The tensor has one of these dtypes."""
    names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
    require(tensor.dtype in allowed, argument, f"dtype {names}", str(tensor.dtype).removeprefix("torch."))


def device(tensor: Tensor, argument: str, expected: torch.device, of: str) -> None:
    """The tensor lives on the device of another argument."""
    require(tensor.device == expected, argument, f"the device of {of} ({expected})", tensor.device)


def once(check: Callable[[tuple[Tensor, ...], Any], None], tensors: tuple[Tensor, ...], values: Any) -> None:
    """Run a check of shapes, dtypes and devices unless one of the same passed before; ``values`` must be hashable.

    A loop calls an op with the same kinds of tensors every step; telling that they are takes a tenth of checking them.
    """
    if torch.compiler.is_compiling():
        check(tensors, values)
        return
    key = (check, values, *map(_kind, tensors))
    try:
        passed = key in _passed
    except TypeError:  # symbolic sizes, while something traces
        check(tensors, values)
        return
    if not passed:
        check(tensors, values)
        if len(_passed) >= _MOST_PASSED:
            _passed.clear()
        _passed.add(key)
