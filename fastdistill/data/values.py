# SPDX-License-Identifier: Apache-2.0
"""Values of a bank: reading block by block, and checks that they are finite and fit the dtype of a cast."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastdistill.errors import InputError

BLOCK = 64 * 2**20  # bytes per read if a whole bank is read


def block_rows(row_bytes: int) -> int:
    """Rows per block, at least one; all if rows have no bytes."""
    return max(1, BLOCK // row_bytes) if row_bytes else 2**62


def blocks(rows: Any) -> Iterator[tuple[int, Tensor]]:
    """All of a bank (Tensor or StoredRows) [N, *S], in order, as (first row, at most BLOCK bytes of rows)."""
    size = block_rows(rows.shape[1:].numel() * rows.dtype.itemsize)
    for start in range(0, len(rows), size):
        yield start, rows[start : start + size]


def in_memory(rows: Any, device: torch.device | str, dtype: torch.dtype, argument: str) -> Tensor:
    """A bank (Tensor or StoredRows) as a tensor; InputError naming the first row that ``cast`` refuses."""
    if isinstance(rows, Tensor) and rows.dtype == dtype:
        return rows.to(device)
    out = torch.empty(rows.shape, dtype=dtype, device=device)
    for start, block in blocks(rows):
        out[start : start + len(block)] = cast(block.detach(), dtype, argument, start)
    return out


def cast(rows: Tensor, dtype: torch.dtype, argument: str, first: int = 0) -> Tensor:
    """Rows [n, *S] as another floating-point dtype; ``first`` is the number of rows[0] in the error.

    Raises:
        InputError: a row has a value that is not finite, or larger than the maximum of ``dtype`` (it would become
            infinite, NaN or, in some float8 types, the maximum).
    """
    if rows.dtype == dtype:
        return rows
    row = misfit(rows, dtype)
    if row is not None:
        raise InputError.of(argument, f"finite values within {range_of(dtype)}", f"others in row {first + row}")
    return rows.to(dtype)


def check_finite(rows: Any, argument: str) -> None:
    """InputError naming the first row of a bank (Tensor or StoredRows) with a value that is not finite."""
    if not rows.dtype.is_floating_point:
        return
    for start, block in blocks(rows):
        row = misfit(block.detach(), rows.dtype)
        if row is not None:
            raise InputError.of(argument, "finite values", f"others in row {start + row}")


def misfit(rows: Tensor, dtype: torch.dtype) -> int | None:
    """The first of rows [n, *S] with a value that is not finite or out of the range of ``dtype``; None if all fit."""
    if not rows.numel():
        return None
    flat = rows.reshape(len(rows), -1)
    flat = flat.float() if flat.dtype.itemsize == 1 else flat  # torch cannot compute in float8
    limit = torch.finfo(dtype).max

    def fits(extremes: tuple[Tensor, Tensor]) -> Tensor:  # both are NaN if a value is
        low, high = (extreme.double() for extreme in extremes)
        return (low >= -limit) & (high <= limit)

    if bool(fits(flat.reshape(-1).aminmax())):
        return None
    return int((~fits(flat.aminmax(dim=1))).nonzero()[0])


def require_bank(bank: Any, argument: str, *, floating: bool = True) -> None:
    """InputError unless it is a bank (Tensor or StoredRows) of (floating-point) values that a file can store."""
    if isinstance(bank, np.memmap):
        raise InputError.of(argument, "a tensor or StoredRows", "a numpy.memmap (StoredRows.of_memmap reads its file)")
    if isinstance(bank, np.ndarray):
        raise InputError.of(argument, "a tensor or StoredRows", "a NumPy array (torch.from_numpy makes it a tensor)")
    if not (isinstance(getattr(bank, "dtype", None), torch.dtype) and hasattr(bank, "shape")):
        raise InputError.of(argument, "a tensor or StoredRows", type(bank).__name__)
    if getattr(bank, "layout", torch.strided) is not torch.strided:
        raise InputError.of(argument, "a dense tensor or StoredRows", bank.layout)
    require_dtype(bank.dtype, argument, floating=floating)


def require_dtype(dtype: Any, argument: str, *, floating: bool = True) -> None:
    """InputError unless it is a dtype, by default a floating-point dtype, that a file can store."""
    if not isinstance(dtype, torch.dtype):
        raise InputError.of(argument, "a dtype of torch", repr(dtype))
    if (floating and not dtype.is_floating_point) or spelled(dtype) is None:
        kind = "a floating-point type" if floating else "a type"
        rule = kind + " that safetensors stores" * (dtype.is_floating_point or not floating)
        raise InputError.of(argument, rule, dtype)


def has_values(bank: Any) -> bool:
    """Whether it is a tensor with values in memory: not StoredRows, a meta tensor or a fake tensor."""
    return isinstance(bank, Tensor) and not bank.is_meta and not isinstance(bank, FakeTensor)


def as_tensor(value: Any, argument: str, rule: str) -> Tensor:
    """The output of a user's function, a tensor or a NumPy array; InputError for anything else."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.ndarray):
        try:
            return torch.from_numpy(np.ascontiguousarray(value))
        except (TypeError, ValueError):
            raise InputError.of(argument, rule, f"a NumPy array of {value.dtype}") from None
    raise InputError.of(argument, rule, type(value).__name__)


@cache
def spelled(dtype: torch.dtype) -> str | None:
    """The name of a dtype in the header of a safetensors file, such as "F16"; None if such a file cannot hold it."""
    import safetensors.torch  # imported here, because the ops and the optimizer work without it

    try:
        data = safetensors.torch.save({"x": torch.empty(0, dtype=dtype, device="cpu")})
        safetensors.torch.load(data)
    except (KeyError, TypeError, safetensors.SafetensorError):
        return None
    name: str = json.loads(data[8:].rstrip(b"\0 "))["x"]["dtype"]
    return name


def range_of(dtype: torch.dtype) -> str:
    """The range of finite values of a dtype, in words."""
    return f"+-{torch.finfo(dtype).max:g}, the range of {dtype}"
