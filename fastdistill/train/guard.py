# SPDX-License-Identifier: Apache-2.0
"""``NoHostSync``: a mode in which forbidden operations of a step raise an error at their line.

A step that reads nothing from the device and does not use a stateful generator runs ahead of the device, can be
captured in a CUDA graph, and draws the same numbers after any resume.
"""

from __future__ import annotations

import pickle
import random
import traceback
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdistill.errors import KernelError

_aten = torch.ops.aten
_RANDOM = "random numbers of a stateful generator"
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default)


class RandomnessError(KernelError):
    """Random numbers from a generator with a state. ``finished``: detected only at the end of the guarded block."""

    finished = False


class NoHostSync(TorchDispatchMode):
    """Inside, these operations raise a ``KernelError`` that names the operator and the line: ``.item()`` and similar
    ones, results with a data-dependent size (boolean indexing, ``nonzero``), copies between devices, and random numbers
    from the generators of torch, Python or NumPy. Works on any device, also on the meta device.
    """

    def __enter__(self) -> NoHostSync:
        self._states = _random_states()
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        moved = [name for name, state in _random_states().items() if state != self._states[name]]
        if kind is None and moved:
            late = RandomnessError(f"step: expected no random numbers but Philox's, got some of {' and '.join(moved)}")
            late.finished = True
            raise late

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reason = _reason(func, args, kwargs or {})
        if reason is not None:
            kind = RandomnessError if reason == _RANDOM else KernelError
            raise kind(f"step: expected nothing that waits for the device, got {reason} ({func}) at {_line()}")
        result = func(*args, **(kwargs or {}))
        devices = _devices((args, kwargs)) | _devices(result)
        if len(devices) > 1 and func.namespace != "fastdistill":
            got = " and ".join(sorted(map(str, devices)))
            raise KernelError(f"step: expected tensors of one device, got a copy between {got} ({func}) at {_line()}")
        return result


def _reason(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    if func in _INDEXING:
        indices = tree_leaves(args[1])
        chosen = any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)
        return "an index of booleans" if chosen else None
    if torch.Tag.nondeterministic_seeded in func.tags:
        seeded = _draws(func, args, kwargs)
        return _RANDOM if seeded else None
    if torch.Tag.data_dependent_output in func.tags:
        return "a value read on the host"
    if torch.Tag.dynamic_output_shape in func.tags:
        return "a result whose size depends on values"
    return None


def _draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call draws random numbers: a dropout with probability 0 does not."""
    arguments = func._schema.arguments
    values = {a.name: a.default_value for a in arguments if a.has_default_value()} | kwargs
    values |= {a.name: v for a, v in zip(arguments, args, strict=False)}
    return values.get("dropout_p", values.get("p", 1.0)) != 0.0 and values.get("train") is not False


def _devices(tree: Any) -> set[torch.device]:
    """The devices of all tensors except scalars: a 0-dim tensor on the host is allowed as a number."""
    leaves: Iterable[Any] = tree_leaves(tree)
    return {leaf.device for leaf in leaves if isinstance(leaf, Tensor) and not (leaf.dim() == 0 and leaf.is_cpu)}


def _random_states() -> dict[str, object]:
    return {"Python's random": random.getstate(), "NumPy's random": pickle.dumps(np.random.get_state())}  # noqa: NPY002


def _line() -> str:
    """The innermost line that is neither in torch nor in this file."""
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and frame.filename != __file__:
            return f"{frame.filename}:{frame.lineno}"
    return "an unknown line"
