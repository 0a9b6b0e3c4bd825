# SPDX-License-Identifier: Apache-2.0
"""Measures the backends for one kind of call: first a check of correctness, then the time, in alternation.

The check uses this project's tolerance: the error against float64 is at most 2x (gradients 3x) that of eager code in
the same precision, or 4 eps of the largest magnitude. It covers a few queries of the outer heads of two samples. Only
these have a nonzero output gradient, so the check needs little memory at any size.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastdistill.errors import DeviceError
from fastdistill.ops import _failures
from fastdistill.ops.attention import reference
from fastdistill.ops.attention.backends import BACKENDS

QUERIES = 32  # that are checked at either end
ROUNDS, SECONDS = 5, 0.05  # of timing: at least so many rounds, then until so many seconds per backend are over


def measure(q: Tensor, k: Tensor, v: Tensor, scale: float, backward: bool, names: list[str]) -> dict[str, Any]:
    """``{"backend": fastest, "ms": {...}, "refused": {name: reason}}`` for random tensors laid out like these."""
    generator = torch.Generator(q.device).manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad(), _unseen():
        inputs = tuple(_like(t, generator).requires_grad_(backward) for t in (q, k, v))
        cotangent = torch.randn(q.shape, generator=generator, device=q.device).to(q.dtype) if backward else None
        gate = _Gate(inputs, scale, cotangent)
        refused = {name: reason for name in names if (reason := gate.refuse(name)) is not None}
        times: dict[str, list[float]] = {name: [] for name in names if name not in refused}
        started = time.perf_counter()
        while times:
            for name, taken in times.items():
                taken.append(_time(name, inputs, scale, cotangent))
            rounds = len(next(iter(times.values())))
            if rounds > ROUNDS and time.perf_counter() - started > SECONDS * len(times):
                break
    ms = {name: round(1e3 * statistics.median(taken[1:]), 5) for name, taken in times.items()}
    return {"backend": min(ms, key=ms.__getitem__) if ms else "reference", "ms": ms, "refused": refused}


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    """Hide the measurement's saved tensors from the caller's hooks, for example those of gradient checkpointing,
    which would count and keep them."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]  # no hooks allowed
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        yield


def _like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers from ``generator`` (not from the global one), with the layout of ``tensor``."""
    steps = tensor.stride()
    once = [1 if step == 0 else size for size, step in zip(tensor.shape, steps, strict=True)]  # expanded dimensions
    made = torch.empty_strided(once, steps, dtype=tensor.dtype, device=tensor.device)
    return made.copy_(torch.randn(once, generator=generator, device=tensor.device)).expand(tensor.shape)


def _run(name: str, inputs: tuple[Tensor, ...], scale: float, cotangent: Tensor | None) -> tuple[Tensor, ...]:
    q, k, v = inputs
    out = BACKENDS[name].run(q, k, v, scale)
    return (out,) if cotangent is None else (out.detach(), *torch.autograd.grad(out, inputs, cotangent))


def _time(name: str, inputs: tuple[Tensor, ...], scale: float, cotangent: Tensor | None) -> float:
    """Seconds of one call."""
    if not inputs[0].is_cuda:
        started = time.perf_counter()
        _run(name, inputs, scale, cotangent)
        return time.perf_counter() - started
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    _run(name, inputs, scale, cotangent)
    events[1].record()
    events[1].synchronize()
    return float(events[0].elapsed_time(events[1])) / 1e3


class _Gate:
    """The float64 result and the eager result for a part of the call."""

    def __init__(self, inputs: tuple[Tensor, ...], scale: float, cotangent: Tensor | None) -> None:
        self._inputs, self._scale = inputs, scale
        batch, tokens, heads, _ = inputs[0].shape
        self._samples, self._heads = ([*{0, n - 1}] for n in (batch, heads))
        self._queries = sorted({*range(min(QUERIES, tokens)), *range(max(0, tokens - QUERIES), tokens)})
        self._cotangent = None
        if cotangent is not None:
            kept = torch.zeros(tokens, 1, 1, dtype=cotangent.dtype, device=cotangent.device)
            kept[self._queries] = 1
            self._cotangent = cotangent * kept
        self._truth, self._eager = (self._expected(dtype) for dtype in (torch.float64, inputs[0].dtype))

    def _part(self, tensor: Tensor, queries: bool) -> Tensor:
        part = tensor.detach()[self._samples][:, :, self._heads]
        return part[:, self._queries] if queries else part

    def _expected(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        q, k, v = (self._part(t, i == 0).to(dtype).requires_grad_() for i, t in enumerate(self._inputs))
        out = reference.attention(q, k, v, self._scale)
        if self._cotangent is None:
            return (out.detach(),)
        return (out.detach(), *torch.autograd.grad(out, (q, k, v), self._part(self._cotangent, True).to(dtype)))

    def refuse(self, name: str) -> str | None:
        """Why the backend may not be chosen, or None."""
        try:
            results = _run(name, self._inputs, self._scale, self._cotangent)
            again = _run(name, self._inputs, self._scale, self._cotangent)
        except Exception as error:  # each backend refuses calls with errors of its own
            if _failures.is_final(error):
                raise DeviceError(f"attention: backend {name!r}, while it was measured: {error}") from error
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        for i, (got, truth, eager) in enumerate(zip(results, self._truth, self._eager, strict=True)):
            part = self._part(got, i < 2).double()
            allowed = max(
                (3.0 if i else 2.0) * (eager.double() - truth).abs().max().item(),
                4 * torch.finfo(got.dtype).eps * truth.abs().max().item(),
            )
            off = (part - truth).abs().max().item()
            if not off <= allowed:
                return f"wrong: error {off:.3g} against float64, allowed {allowed:.3g}"
        strict = torch.are_deterministic_algorithms_enabled()
        if strict and not all(torch.equal(a, b) for a, b in zip(results, again, strict=True)):
            return "two runs differ, in deterministic mode"
        return None
