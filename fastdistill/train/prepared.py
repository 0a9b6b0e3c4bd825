# SPDX-License-Identifier: Apache-2.0
"""The optimizer's two calls of ops, prepared once for parameters at fixed addresses: checked, and gathered into a table
of addresses.

A step of ``AdamWEMA`` passes seven tensors per parameter to its ops. Finding and checking them and reading their
addresses takes thirty times as long as recognizing those of the previous step (22 ms and .7 ms, 686 parameters).
"""

from __future__ import annotations

import contextlib
import importlib
import weakref
from collections import Counter
from collections.abc import Sequence
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from fastdistill.ops import OPS, AdamWGroup, _check, _dispatch
from fastdistill.ops.adamw_ema import table

_ADDRESS = 2  # column of the gradient in a table
_RATES, _GROUP = 7, 13  # among the arguments of the op ``adamw_ema``: lr, and before the hyper-parameters
_NATIVE = {("cpp",), ("cuda",)}  # kernels that are called with tables
_PLAIN = (Tensor, Parameter)
_is_wrapper = torch._C._functorch.is_functorch_wrapped_tensor


class Prepared:
    """The calls of ``grad_square_sum`` and ``adamw_ema`` in a step, for a kernel that takes tables.

    It can be used for the next step if ``fits`` is true: the same parameters and the same tensors of state at the same
    addresses. The gradients may be new tensors, but with the same shapes, strides and dtypes.
    """

    def __init__(self, kernel: str, parameters: Sequence[Tensor], optimizer: Optimizer, args: Sequence[Any]) -> None:
        self._kernel, self._forced, self._failures = kernel, _dispatch.forced(), _failures()
        self._module = importlib.import_module(f"fastdistill.ops.adamw_ema.{kernel}")
        self._parameters, self._device = list(parameters), parameters[0].device
        self._groups = _kinds(optimizer)
        self._resting = [p for group in optimizer.param_groups for p in group["params"] if p.grad is None]
        self._state, self._states = optimizer.state, list(optimizer.state.values())
        own = [optimizer.state[p] for p in parameters]
        names = {name for found in own for name, value in found.items() if isinstance(value, Tensor)}
        self._held = {name: (own, [found.get(name) for found in own]) for name in names}
        self._fixed = [*parameters, *(t for _, held in self._held.values() for t in held if t is not None)]
        self._places = [t.data_ptr() for t in self._fixed]
        self._shapes, self._layout = [p.shape for p in parameters], _layout(args[1])
        self._group: Sequence[int] = args[_GROUP]
        self._rows = table.parameters(*args[: _RATES + 1], *args[_GROUP : _GROUP + 2])
        self._gradients = np.ascontiguousarray(self._rows[:, :4])
        # Gradients between ``square_sum`` and ``update``, which nothing here keeps alive.
        self._found: list[weakref.ref[Tensor]] | None = None

    @staticmethod
    def of(
        parameters: Sequence[Tensor], optimizer: Optimizer, args: Sequence[Any], before: Sequence[Counter[str]]
    ) -> Prepared | None:
        """Create it after a step with these parameters and arguments of the op ``adamw_ema``; ``before``: ``calls``
        before that step. None if the next step must call the ops, too: tensors are not plain, kernels take no tables,
        or a dispatch mode, profiler or tracer is active."""
        kernels = {tuple(now - then) for now, then in zip(calls(), before, strict=False)}
        plain = all(type(p) in _PLAIN and type(p.grad) in _PLAIN for p in parameters)
        if not plain or not _dispatch.quiet() or len(kernels) != 1 or not kernels <= _NATIVE:
            return None
        return Prepared(kernels.pop()[0], parameters, optimizer, args)

    def fits(self, optimizer: Optimizer) -> bool:
        """Whether it can execute a step of the optimizer."""
        if not _dispatch.quiet() or _dispatch.forced() != self._forced or _failures() != self._failures:
            return False
        state = optimizer.state
        if state is not self._state or len(state) != len(self._states) or _kinds(optimizer) != self._groups:
            return False
        if not all(map(is_, state.values(), self._states)) or any(p.grad is not None for p in self._resting):
            return False
        for name, (states, held) in self._held.items():
            if not all(map(is_, [found.get(name) for found in states], held)):
                return False
        grads: list[Any] = [p.grad for p in self._parameters]
        try:
            same = _layout(grads) == self._layout and not any(map(_is_wrapper, grads))
        except (AttributeError, RuntimeError):  # None, a sparse one
            return False
        same = same and [p.shape for p in self._parameters] == self._shapes
        if not same or [t.data_ptr() for t in self._fixed] != self._places:
            return False
        self._rows[:, _ADDRESS] = self._gradients[:, _ADDRESS] = [g.data_ptr() for g in grads]
        self._found = [weakref.ref(g) for g in grads]
        return True

    def holds(self, optimizer: Optimizer) -> bool:
        """``fits``, but fast if it was true just before."""
        if self._found is None:
            return self.fits(optimizer)
        grads = [p.grad for p in self._parameters]
        found = [g() for g in self._found]
        there = not any(g is None for g in found)  # None are gradients that are gone
        return (there and all(map(is_, grads, found))) or self.fits(optimizer)

    def square_sum(self) -> Tensor:
        """Of the gradients that ``fits`` has found: 0-dim float64."""
        total = torch.empty((), dtype=torch.float64, device=self._device)
        with self._on_its_device():
            self._module.launch_square_sum(self._gradients, total)
        OPS["grad_square_sum"].calls[self._kernel] += 1
        return total

    def update(self, groups: Sequence[AdamWGroup], square_sum: Tensor, *scalars: Any) -> None:
        """``scalars``: grad_scale, found_inf, ema_weight, skipped, max_norm, ema_warmup, zero_grads."""
        _check.shape(square_sum, "square_sum", (), "a 0-dim tensor")
        _check.dtype(square_sum, "square_sum", torch.float64)
        _check.device(square_sum, "square_sum", self._device, "the parameters")
        table.set_groups(self._rows, [g.lr for g in groups], self._group, table.hyper(groups))
        self._found = None
        with self._on_its_device():
            self._module.launch(self._rows, square_sum, *scalars)
        OPS["adamw_ema"].calls[self._kernel] += 1

    def _on_its_device(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()


def calls() -> list[Counter[str]]:
    """How often each kernel of the two ops has run."""
    return [OPS[op].calls.copy() for op in ("grad_square_sum", "adamw_ema")]


def _failures() -> int:
    return len(OPS["grad_square_sum"].failures) + len(OPS["adamw_ema"].failures)


def _kinds(optimizer: Optimizer) -> list[tuple[int, bool]]:
    """Parameters of each group, and whether they are averaged."""
    return [(len(group["params"]), group["ema"]) for group in optimizer.param_groups]


def _layout(grads: Sequence[Any]) -> tuple[list[Any], ...]:
    return (
        [type(g) for g in grads],
        [g.dtype for g in grads],
        [g.shape for g in grads],
        [g.stride() for g in grads],
    )
