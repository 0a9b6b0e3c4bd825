# SPDX-License-Identifier: Apache-2.0
"""The rules that ops check before a launch, each with the same message for all ops."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from fastdistill.errors import InputError, described
from fastdistill.ops import _native
from fastdistill.ops._dispatch import Kind, quiet

_passed: dict[object, Any] = {}  # a Kind or None
_MOST_PASSED = 4096
_is_wrapper = torch._C._functorch.is_functorch_wrapped_tensor
_look = operator.attrgetter("__class__", "shape", "dtype", "device", "layout")
LARGEST = torch.finfo(torch.float32).max
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def require(condition: bool, argument: str, rule: object, value: object) -> None:
    """Raise ``InputError`` "argument: expected rule, got value" unless the condition holds."""
    if not condition:
        raise InputError.of(argument, rule, value)


def _describe_unless(condition: bool, argument: str, rule: str, value: object) -> None:
    """``require`` for a value of any type. Its text is created only if the value is wrong: the text of a tensor needs
    synchronization with the device, that of a symbolic size cannot be traced."""
    if not condition:
        raise InputError.of(argument, rule, described(value))


def tensors(**given: object) -> None:
    """Each is a dense tensor, and not None, an array or a number."""
    for argument, value in given.items():
        require(isinstance(value, Tensor), argument, "a tensor", type(value).__name__)
        if value.layout is not torch.strided:  # type: ignore[attr-defined]
            require(False, argument, "a dense tensor", value.layout)  # type: ignore[attr-defined]


def valued(**given: object) -> None:
    """Each is a dense tensor with values."""
    tensors(**given)
    for argument, value in given.items():
        require(not value.is_meta, argument, "values", "a tensor on the meta device")  # type: ignore[attr-defined]


def real(value: Any, argument: str, rule: str = "a number") -> float:
    """A number as a float; a string is refused, even if it spells a number."""
    if not isinstance(value, (float, int)):
        one = isinstance(value, (Real, Tensor, torch.SymInt, torch.SymFloat))
        if isinstance(value, Tensor):
            one = value.numel() == 1 and not value.is_meta and not value.is_complex()
        _describe_unless(one, argument, rule, value)
    try:
        return float(value)
    except OverflowError:
        raise InputError.of(argument, f"{rule} within float64", type(value).__name__) from None


def one_of(value: Any, argument: str, names: Sequence[str]) -> None:
    """One of these strings."""
    known = isinstance(value, str) and value in names  # an array would be compared element by element
    _describe_unless(known, argument, f"one of {', '.join(names)}", value)


def listed(values: Any, argument: str, rule: str = "a list of tensors") -> list[Tensor]:
    """Dense tensors, as a list; a single tensor is refused, because it would be split into its rows."""
    several = isinstance(values, Iterable) and not isinstance(values, (Tensor, str, Mapping))
    require(several, argument, rule, type(values).__name__)
    found = list(values)
    if not all(isinstance(one, Tensor) and one.layout is torch.strided for one in found):
        tensors(**{f"{argument}[{i}]": one for i, one in enumerate(found)})
    return found


def own_memory(tensor: Tensor, argument: str) -> None:
    """No two elements share their memory (as in an expanded tensor), because the tensor will be written to."""
    if _native.overlaps(tensor):
        require(False, argument, "memory of its own for each element", f"strides {tensor.stride()}")


def single(value: Any, argument: str, rule: str = "a number") -> float:
    """A number that is also finite in float32, in which the ops compute, as a float."""
    number = real(value, argument, rule)
    require(not LARGEST < abs(number) < math.inf, argument, f"{rule} within float32", number)
    return number


def positive(value: Any, argument: str) -> None:
    """A number above 0, finite in float32."""
    require(0 < single(value, argument) < math.inf, argument, "a number > 0", value)


def within(value: Any, argument: str, low: float, high: float, rule: str) -> float:
    """A number from ``low`` to ``high`` as a float."""
    number = real(value, argument, rule)
    require(low <= number <= high, argument, rule, number)
    return number


def flag(value: Any, argument: str) -> bool:
    """True or False, and no other value such as 0 or 1."""
    _describe_unless(isinstance(value, bool), argument, "True or False", value)
    return bool(value)


def seed(value: Any, argument: str = "seed") -> int:
    """A whole number that fits int64, as an int."""
    is_one = isinstance(value, Integral) and not isinstance(value, bool)
    _describe_unless(is_one and -(2**63) <= value < 2**63, argument, "an int64", value)
    return int(value)


def whole(value: Any, argument: str, rule: str) -> None:
    """A whole number above 0."""
    is_one = isinstance(value, (int, torch.SymInt, Integral))
    _describe_unless(is_one and not isinstance(value, bool) and value > 0, argument, rule, value)


def integers(**given: object) -> None:
    """InputError for an argument that is not an integer."""
    for name, value in given.items():
        is_one = isinstance(value, (int, torch.SymInt, Integral)) and not isinstance(value, bool)
        _describe_unless(is_one, name, "a whole number", value)


def numbers(values: Any, argument: str) -> list[int]:
    """Whole numbers, as a list."""
    several = isinstance(values, Iterable) and not isinstance(values, (Tensor, str, Mapping))
    require(several, argument, "a list of whole numbers", type(values).__name__)
    found = list(values)
    integers(**{f"{argument}[{i}]": one for i, one in enumerate(found)})
    return found


def constants(**given: object) -> None:
    """None of the values requires a gradient, because the ops would not compute it."""
    tangents = forward_ad._current_level >= 0
    if not tangents and not torch.is_grad_enabled():
        return
    for argument, value in given.items():
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(tensor, Tensor):
                rule = "a tensor without gradient, which is not computed here (detach it)"
                require(not (tensor.requires_grad and torch.is_grad_enabled()), argument, rule, "requires_grad=True")
                if tangents:
                    tangent = forward_ad.unpack_dual(tensor).tangent
                    require(tangent is None, argument, rule, "a tensor with a tangent")


def scale(value: float | None, dim: int) -> float:
    """Of attention's scores: a number, or 1 / sqrt(dim)."""
    constants(scale=value)
    return float(max(dim, 1) ** -0.5) if value is None else single(value, "scale", "a number, or None")


def rows(index: Tensor, argument: str, count: int, of: str) -> None:
    """Each number is a row of another argument; checked only on a CPU (no synchronization) and outside of tracing."""
    if index.device.type != "cpu" or not quiet() or type(index) not in (Tensor, Parameter) or _is_wrapper(index):
        return
    outside = (index < 0) | (index >= count)
    if outside.any():
        at = int(outside.nonzero()[0])
        require(False, f"{argument}[{at}]", f"a row of {of}, 0 to {count - 1}", int(index[at]))


def shape(tensor: Tensor, argument: str, expected: tuple[int | None, ...], meaning: str) -> None:
    """The tensor has this shape (None: any size); ``meaning`` says in words what it must be."""
    fits = tensor.dim() == len(expected) and all(
        e is None or e == g for e, g in zip(expected, tensor.shape, strict=True)
    )
    require(fits, argument, meaning, tuple(tensor.shape))


def dtype(tensor: Tensor, argument: str, *allowed: torch.dtype) -> None:
    """The tensor has one of these dtypes."""
    names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
    require(tensor.dtype in allowed, argument, f"dtype {names}", str(tensor.dtype).removeprefix("torch."))


def device(tensor: Tensor, argument: str, expected: torch.device, of: str) -> None:
    """The tensor lives on the device of another argument."""
    require(tensor.device == expected, argument, f"the device of {of} ({expected})", tensor.device)


def once(check: Callable[[Any, Any], None], tensors: tuple[Tensor | None, ...], values: Any) -> Kind | None:
    """Run a check of shapes, dtypes and devices unless one of the same passed before; ``values`` must be hashable.

    A loop calls an op with the same kinds of tensors in every step; recognizing them takes a tenth of the checks' time.

    Returns:
        The kind of the call, with which kernels are launched without torch's dispatcher; None if that is not allowed.
    """
    if torch.compiler.is_compiling():
        check(tensors, values)
        return None
    try:
        key = (check, values, *[None if t is None else _look(t) for t in tensors])
        kind = _passed.get(key, False)
    except (TypeError, AttributeError):  # symbolic sizes during tracing, or a value that is no tensor
        check(tensors, values)
        return None
    if kind is False:
        check(tensors, values)
        if len(_passed) >= _MOST_PASSED:
            _passed.clear()
        kind = _passed[key] = Kind.of(tensors)
    if kind is None or not quiet():
        return None
    for tensor in tensors:
        if tensor is not None and _is_wrapper(tensor):  # it outlived a functorch transform: the dispatcher unwraps it
            return None
    known: Kind = kind
    return known
