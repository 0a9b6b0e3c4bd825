# SPDX-License-Identifier: Apache-2.0
"""Splits an index of an array of rows into the rows to read and an index into these rows."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdistill.errors import InputError

_RULE = "integers, slices, Ellipsis, None, or lists, arrays and tensors of integers or booleans"


class RowIndexError(InputError, IndexError):
    """A row that does not exist. Also an IndexError, which Python expects from sequences."""


def split(index: Any, shape: Sequence[int]) -> tuple[range | list[int], tuple[Any, ...]]:
    """The rows that ``array[index]`` needs, and an index into these rows that gives the result.

    ``array[index]`` equals ``read(rows)[rest]``; numbers in ``rows`` are from 0 to N - 1, and an empty ``rest`` means
    no further indexing. An index means the same as in torch, or as in NumPy if torch does not support it (slices of
    rows with a negative step, unsigned arrays).

    Args:
        index: the value between the brackets. shape: of the array, the rows first.

    Raises:
        InputError: an unsupported index; a uint8 tensor, which torch reads as a mask and NumPy as numbers.
        RowIndexError: a row that does not exist.
    """
    items = [_plain(item) for item in (index if isinstance(index, tuple) else (index,))]
    used = sum(item.ndim if _is_mask(item) else item is not None and item is not ... for item in items)
    if used > len(shape) or sum(item is ... for item in items) > 1:
        raise InputError.of("index", f"at most {len(shape)} axes, at most one Ellipsis", repr(index))
    for place, item in enumerate(items):
        if item is None or (item is ... and used == len(shape)):
            continue
        if item is ...:
            break
        rows, instead = _rows(item, shape)
        whole = len(items) == 1 and (isinstance(item, slice) or (isinstance(item, np.ndarray) and item.ndim == 1))
        return rows, () if whole else tuple(map(_for_torch, [*items[:place], *instead, *items[place + 1 :]]))
    return range(shape[0]), () if index is ... else tuple(map(_for_torch, items))


def _plain(item: Any) -> Any:
    """An item as None, Ellipsis, slice, int, or an array of integers or booleans."""
    if item is None or item is ... or isinstance(item, slice):
        return item
    if isinstance(item, Tensor):
        if item.dtype == torch.uint8:
            rule = "int64 (row numbers) or bool (a mask), as torch and NumPy read uint8 differently"
            raise InputError.of("index", rule, "a uint8 tensor")
        if item.is_floating_point() or item.is_complex():
            raise InputError.of("index", _RULE, f"a tensor of {item.dtype}")
        item = item.detach().cpu().numpy()
    if isinstance(item, list | tuple | range):
        try:
            array = np.asarray(item)
        except (TypeError, ValueError):
            raise InputError.of("index", _RULE, repr(item)) from None
        item = array if array.size else array.astype(np.int64)
    if isinstance(item, np.ndarray) and item.ndim:
        if item.dtype.kind not in "iub":
            raise InputError.of("index", _RULE, f"an array of {item.dtype}")
        return item
    try:
        if isinstance(item, np.ndarray):
            item = item[()]
        if not isinstance(item, bool | np.bool_):
            return operator.index(item)
    except TypeError:
        pass
    raise InputError.of("index", _RULE, f"{item!r} ({type(item).__name__})")


def _is_mask(item: Any) -> bool:
    return isinstance(item, np.ndarray) and item.dtype == np.bool_


def _rows(item: Any, shape: Sequence[int]) -> tuple[range | list[int], list[Any]]:
    """The rows that an item of the first axis selects, and the items that replace it in an index of these rows."""
    many = shape[0]
    if isinstance(item, slice):
        return range(*item.indices(many)), [slice(None)]
    if isinstance(item, int):
        row = _row(item, many)
        return range(row, row + 1), [0]
    others: list[Any] = []
    if _is_mask(item):
        if item.shape != tuple(shape[: item.ndim]):
            raise InputError.of("index", f"a mask of shape {tuple(shape[: item.ndim])}", f"one of {item.shape}")
        item, *others = item.nonzero()
    if item.size:
        _row(int(item.min()), many)
        _row(int(item.max()), many)
    rows = item.reshape(-1).astype(np.int64)
    rows = np.where(rows < 0, rows + many, rows)
    return rows.tolist(), [np.arange(len(rows)).reshape(item.shape), *others]


def _row(number: int, many: int) -> int:
    if not -many <= number < many:
        rule = f"{0 if number >= 0 else -many} to {many - 1}" if many else "no row, as there are none"
        raise RowIndexError.of("row", rule, number)
    return number % many


def _for_torch(item: Any) -> Any:
    if isinstance(item, np.ndarray):
        return torch.from_numpy(item if item.dtype == np.bool_ else item.astype(np.int64))
    return item
