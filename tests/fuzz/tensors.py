# SPDX-License-Identifier: Apache-2.0
"""Tensors of any layout. One is a window, given by strides, on a line of random values with margins at both ends, which
nothing may write to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "contiguous", "channels_last", "permuted", "gaps", "rows apart", "expanded", "overlapping")
VALUES = ("normal", "normal", "ones", "small", "large", "nan", "inf", "huge")
MARGIN = 8  # elements
MOST = 1200  # elements of a tensor

dtypes = st.sampled_from(FLOATS)
layouts = st.sampled_from(LAYOUTS)
sizes = st.sampled_from((1, 2, 3, 0, 4, 5, 7, 8, 9, 16, 17, 33))
small_sizes = st.sampled_from((1, 2, 3, 2, 1, 3, 4, 0))
seeds = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Spec:
    """What a tensor is but for its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    grad: bool = False
    offset: int = 0  # elements past a multiple of MARGIN
    below: int | None = None  # of integers: 0 to this (exclusive)
    scale: float = 1.0
    center: float = 0.0
    values: str | None = None  # always these

    def made(self, g: torch.Generator, values: str = "normal") -> Tensor:
        """A tensor with these values."""
        strides = strides_of(self.shape, self.layout)
        room = 1 + sum((n - 1) * step for n, step in zip(self.shape, strides, strict=True))
        count = (0 if 0 in self.shape else room) + 2 * MARGIN + self.offset
        if self.below is not None:
            line = torch.randint(max(self.below, 1), (count,), generator=g).to(self.dtype)
        elif self.dtype.is_floating_point:
            line = (self.center + self.scale * _values(count, g, self.values or values)).to(self.dtype)
        else:
            line = torch.randint(2, (count,), generator=g).to(self.dtype)
        tensor = line.as_strided(self.shape, strides, MARGIN + self.offset)
        return tensor.requires_grad_() if self.grad else tensor


def _values(count: int, g: torch.Generator, kind: str) -> Tensor:
    line = torch.randn(count, generator=g)
    if kind == "ones":
        return torch.ones(count)
    if kind in ("small", "large", "huge"):
        return line * {"small": 1e-6, "large": 100.0, "huge": 1e30}[kind]
    if kind in ("nan", "inf"):
        line[torch.randint(count, (1 + count // 16,), generator=g)] = {"nan": math.nan, "inf": math.inf}[kind]
    return line


def strides_of(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """The strides of a contiguous tensor, or of one with permuted dimensions, gaps, or elements that share memory."""
    order = list(range(len(shape)))
    if layout == "channels_last" and len(shape) > 2:
        order = [0, *order[2:], 1]
    elif layout == "permuted":
        order.reverse()
    step, strides = 2 if layout == "gaps" else 1, [0] * len(shape)
    for at in reversed(order):
        strides[at] = step
        step *= max(shape[at], 1)
        if layout == "rows apart" and at == order[-1]:
            step += 3
    if layout == "expanded" and shape:
        strides[sum(shape) % len(shape)] = 0
    if layout == "overlapping":
        strides = [1] * len(shape)
    return tuple(strides)


def limited(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape, with its largest sizes reduced if it has many elements."""
    while math.prod(shape) > MOST:
        largest = max(shape)
        shape = tuple(2 if n == largest else n for n in shape)
    return shape


def spec(draw: Any, shape: tuple[int, ...], dtype: torch.dtype | None = None, **options: Any) -> Spec:
    """A tensor with this shape in a random layout."""
    dtype = draw(dtypes) if dtype is None else dtype
    return Spec(shape, dtype, draw(layouts), draw(st.booleans()), draw(st.sampled_from((0, 1, 3))), **options)


def plain(made: Spec) -> Spec:
    """The same without requires_grad."""
    return replace(made, grad=False)


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Applies the function to the leaves of dicts, lists and tuples. (Torch's ``tree_map`` supports more types, but
    takes as long as a small kernel.)"""
    if isinstance(value, dict):
        return {key: mapped(function, one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)([mapped(function, one) for one in value])
    return function(value)


def leaves(value: Any) -> list[Any]:
    """The leaves of dicts, lists and tuples."""
    if isinstance(value, dict):
        return [leaf for one in value.values() for leaf in leaves(one)]
    if type(value) in (list, tuple):
        return [leaf for one in value for leaf in leaves(one)]
    return [value]


def line_of(tensor: Tensor) -> Tensor:
    """All of the memory that a tensor is a view of, as bytes."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def overlaps(tensor: Tensor) -> bool:
    """Whether two elements share memory."""
    step = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < step:
                return True
            step = stride * (size - 1) + step
    return False


def described(value: Any) -> str:
    """A readable form of a call's value."""
    if isinstance(value, Tensor):
        grad = ", grad" if value.requires_grad else ""
        kind = str(value.dtype).removeprefix("torch.")
        dense = "" if value.layout is not torch.strided or value.is_contiguous() else f" strides {list(value.stride())}"
        return f"{kind}{list(value.shape)}{dense}{grad}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {described(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        shown = ", ".join(described(one) for one in itertools.islice(value, 8))
        return f"{type(value).__name__}({shown})"
    return repr(value)[:60]
