# SPDX-License-Identifier: Apache-2.0
"""A saved call of an op with its arguments: a safetensors file, with the values that are not tensors as JSON metadata.

The file may come from a stranger: it contains no code, sizes are checked before memory is allocated, and a call that
this package would not make is refused before a kernel gets it (kernels do not check shapes).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistill.errors import InputError, StorageError, described, quoted
from fastdistill.files import atomic_write, json_value, reason
from fastdistill.ops import _native
from fastdistill.ops._calls import CHECKS, check
from fastdistill.schemas import CALL

SUFFIX = ".safetensors"
_KEY, _RULE = "fastdistill", "a file that a profile left"


def save(path: Path, op: str, kernel: str, arguments: Sequence[Any]) -> None:
    """Write a call; StorageError if it cannot be written."""
    import safetensors.torch  # imported here: measurements of ops do not need it

    tensors: dict[str, Tensor] = {}

    def spelled(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            dense = value.detach() if _native.is_dense(value) else value.detach().contiguous()
            tensors[name] = dense.cpu().contiguous()
            return {"tensor": name, "strides": list(dense.stride())}
        return [spelled(one) for one in value] if isinstance(value, (list, tuple)) else value

    call: dict[str, Any] = {"schema": CALL.version, "op": op, "kernel": kernel}
    call["arguments"] = [spelled(one) for one in arguments]
    atomic_write(path, safetensors.torch.save(tensors, {_KEY: json.dumps(call)}))


def load(path: Path, device: str) -> tuple[str, list[Any]]:
    """The op of a file and its arguments, on a device.

    Raises:
        InputError: no such file, no saved call, or a call of an op that this version does not have. StorageError: it
            cannot be read, or a newer fastdistill wrote it.
    """
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            call = json_value((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        op, schema, stated = call["op"], call["schema"], call["arguments"]
        if not isinstance(stated, list):
            raise ValueError("no list of arguments")
        CALL.check(schema, path)
        arguments = [_argument(one, tensors, device) for one in stated]
    except StorageError:
        raise
    except FileNotFoundError as error:
        raise InputError.of("call", _RULE, f"{path}, which is not there") from error
    except OSError as error:
        raise StorageError(f"{path}: could not be read: {reason(error)}") from error
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError.of("call", _RULE, f"{path} ({quoted(error)})") from error
    if not isinstance(op, str) or op not in CHECKS:
        raise InputError.of("call", f"an op of this version ({', '.join(CHECKS)})", described(op))
    check(op, arguments)
    return op, arguments


def _argument(value: Any, tensors: dict[str, Tensor], device: str) -> Any:
    if isinstance(value, dict):
        tensor, strides = tensors[value["tensor"]], value["strides"]
        shape, listed = tensor.shape, isinstance(strides, list) and all(type(step) is int for step in strides)
        if not listed or len(strides) != len(shape) or not _is_dense(shape, strides):
            raise ValueError(f"strides {described(strides)} of a tensor of shape {tuple(shape)}")
        return torch.empty_strided(shape, strides, dtype=tensor.dtype, device=device).copy_(tensor)
    return [_argument(one, tensors, device) for one in value] if isinstance(value, list) else value


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor with these strides needs no more memory than its elements; checked before it is created."""
    steps = sorted((step, n) for step, n in zip(strides, shape, strict=True) if n != 1)
    sizes = [0, *(math.prod(n for _, n in steps[:i]) for i in range(len(steps)))][1:]
    largest = all(0 <= step <= 2**48 for step in strides)
    return largest and (0 in shape or [step for step, _ in steps] == sizes)
