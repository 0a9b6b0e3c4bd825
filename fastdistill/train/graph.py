# SPDX-License-Identifier: Apache-2.0
"""How a step runs: eagerly, compiled, or as one CUDA graph with everything in it, the draw too."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastdistill.errors import FastdistillError, KernelError
from fastdistill.models.sharding import sharded
from fastdistill.train.config import Execution
from fastdistill.train.guard import NoHostSync
from fastdistill.train.step import TrainStep

WARM_UP = 3  # steps of a run before it is captured: buffers, optimizer state and tuned kernels come to be in them


class GraphedStep:
    """Calls run the first steps eagerly on a stream of its own, capture the next one and replay it from then on.

    The second of them runs under ``NoHostSync``, so what cannot be captured is named with its line. Every step counts:
    capturing executes nothing and touches no state. Data, random numbers, learning rate and EMA decay come from device
    memory, so between log intervals the host does nothing but launch the graph.

    Where a step cannot be captured, ``strict`` raises KernelError with the reason; otherwise a warning gives it and the
    step runs again from its beginning, and every later one, eagerly.
    """

    def __init__(self, step: TrainStep, student: nn.Module, *, strict: bool) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self._step, self._student, self._strict = step, student, strict
        self._stream = torch.cuda.Stream(step.counter.device)
        self._next: Callable[[], None] = self._eager
        self._warm = 0

    def __call__(self) -> None:
        if self._strict:
            self._next()
            return
        try:
            self._next()
        except KernelError as error:
            warnings.warn(f"{error}; going on without a graph", stacklevel=2)
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._step.optimizer.zero_grad(set_to_none=True)  # nothing else of the step has been done
            self._next = self._step
            self._step()

    def _eager(self) -> None:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        guard = NoHostSync() if self._warm == 1 else contextlib.nullcontext()  # after what is tuned at first calls
        with torch.cuda.stream(self._stream), guard:
            self._step()
        current.wait_stream(self._stream)
        self._warm += 1
        if self._warm == WARM_UP:
            self._next = self._captured

    def _captured(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                _checkpoints_without_rng(self._student),
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                self._step()
        except RuntimeError as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise KernelError(f"step: could not be captured in a CUDA graph: {first}") from error
        self.graph, self._next = graph, graph.replay
        graph.replay()


@contextlib.contextmanager
def _checkpoints_without_rng(model: nn.Module) -> Iterator[None]:
    """diffusers' gradient checkpoints keep the state of torch's generators, which cannot be read during a capture; a
    step draws nothing from them."""
    name = "_gradient_checkpointing_func"
    before = [(module, getattr(module, name)) for module in model.modules() if hasattr(module, name)]
    try:
        for module, _ in before:
            setattr(module, name, functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
        yield
    finally:
        for module, function in before:
            setattr(module, name, function)


def refuse_graph(step: TrainStep, student: nn.Module) -> str | None:
    """Why this run cannot be one CUDA graph, as far as can be told before it begins."""
    if step.counter.device.type != "cuda":
        return f"it runs on {step.counter.device.type}: a CUDA graph needs a CUDA device"
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in student.modules()):
        return "DistributedDataParallel reduces gradients on streams of its own: use 'compiled'"
    if where := sharded(student):
        return f"{where}, which gathers and frees parameters on the host's schedule: use 'compiled'"
    return None


def runner(step: TrainStep, student: nn.Module, execution: Execution) -> Callable[[], None]:
    """What the loop calls every step.

    ``eager``: the step itself. ``compiled``: draw, models and losses through ``torch.compile``. ``graph``: everything
    in one CUDA graph. ``auto``: a graph where there is a GPU and the step allows it, else eagerly.

    Raises:
        FastdistillError: ``graph`` where it cannot be; with the reason.
    """
    if execution == "compiled":
        step.compile()
        return step
    if execution == "eager":
        return step
    reason = refuse_graph(step, student)
    if reason is None:
        return GraphedStep(step, student, strict=execution == "graph")
    if execution == "graph":
        raise FastdistillError(f"execution 'graph': {reason}")
    return step
