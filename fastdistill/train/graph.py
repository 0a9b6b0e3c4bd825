# SPDX-License-Identifier: Apache-2.0
"""How a step runs: eager, compiled, or (either of them) as one CUDA graph that contains everything, also the draw."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

from fastdistill.data.fingerprint import listed
from fastdistill.distill.objective import as_captured
from fastdistill.errors import FastdistillError, KernelError
from fastdistill.models.sharding import sharded
from fastdistill.ops import _failures
from fastdistill.train import distributed
from fastdistill.train.config import Execution
from fastdistill.train.guard import NoHostSync, RandomnessError
from fastdistill.train.randomness import drawing, generator_states
from fastdistill.train.step import TrainStep

logger = logging.getLogger(__name__)
WARM_UP = 3  # steps before the capture: they allocate buffers and optimizer state, and tune kernels
_COMPILING = "compiling the training step: the first call takes minutes for a large model"
DDP_WARM_UP = 11  # as many as torch's notes on CUDA require; DDP orders its buckets and measures times in them
_AS_SET = "as set"
_UNSEEDED = "which a resumed run could not draw again; use 'eager', or switch that off"


class GraphedStep:
    """The first calls run eagerly on a separate stream, the next one is captured, and all later ones replay the graph.

    The last eager step runs on the streams of the capture and under ``NoHostSync``, so that an error names the line
    that cannot be captured. Every step counts: capturing executes nothing and changes no state. Data, random numbers,
    learning rate and EMA decay are in device memory, so between log intervals the host only launches the graph. With
    several ranks the graph also contains DDP's collectives, as described in torch's notes on CUDA; this has not been
    run on GPUs yet.

    For a compiled step (``compiled``) the calls before the capture compile and tune. They run without ``NoHostSync``,
    because torch would trace again under it; the capture itself refuses operations that wait for the device.

    If a step cannot be captured, ``strict`` raises KernelError with the reason. Otherwise there is a warning with the
    reason, and this step is repeated from its beginning and compiled, like all later ones. Too little memory for the
    capture, or an error that makes the device unusable, ends the run in both cases.
    """

    def __init__(self, step: TrainStep, student: nn.Module, *, strict: bool, compiled: bool = False) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self._step, self._student, self._strict, self._compiled = step, student, strict, compiled
        self._stream = step.stream or torch.cuda.Stream(step.counter.device)
        step.execution = "compiled CUDA graph" if compiled else "CUDA graph"
        step.why = _AS_SET if strict else "auto, and nothing is in its way"
        if compiled:
            logger.info(_COMPILING)
            step.compile()
        self._next: Callable[[], None] = self._eager
        self._warm, self._until = 0, WARM_UP if distributed.size() == 1 else DDP_WARM_UP

    def __call__(self) -> None:
        if self._strict:
            self._next()
            return
        try:
            self._next()
        except KernelError as error:
            draws = isinstance(error, RandomnessError)
            warnings.warn(f"{error}; going on {'eagerly' if draws else 'compiled'}, without a graph", stacklevel=2)
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._next = (_eager if draws else _compiled)(self._step, str(error))
            if not getattr(error, "finished", False):
                self._step.optimizer.zero_grad(set_to_none=True)  # the step has changed nothing else
                self._next()

    def _eager(self) -> None:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        self._warm += 1
        last = self._warm == self._until
        with self._step.randomness(), torch.cuda.stream(self._stream), contextlib.ExitStack() as stack:
            if last and self._compiled:
                stack.enter_context(_drawing_nothing(self._step.counter.device))
            elif last:  # after the tuning of the first calls
                stack.enter_context(NoHostSync())
                stack.enter_context(as_captured())
            with _compiler_errors() if self._compiled else contextlib.nullcontext():
                self._step()
        current.wait_stream(self._stream)
        if last:
            self._next = self._captured

    def _captured(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        graph = torch.cuda.CUDAGraph()
        cause: RuntimeError | None = None
        try:
            with (
                _checkpoints_without_rng(self._student),
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    self._step()
                except RuntimeError as error:
                    cause = error  # after a failed capture its end raises another error
                    raise
        except RuntimeError as error:
            cause = cause or error
            if _failures.is_final(cause):
                raise cause from None
        if distributed.anywhere(cause is not None, self._stream.device):  # all ranks replay, or none
            if distributed.anywhere(_out_of_memory(cause), self._stream.device):
                rule = "a smaller batch, or config.execution 'eager', needs less"
                why = f"step: out of memory while it was captured in a CUDA graph: {_first(cause)}"
                raise FastdistillError(f"{why}; {rule}") from cause
            raise KernelError(f"step: could not be captured in a CUDA graph: {_first(cause)}") from cause
        self.graph, self._next = graph, self._replay
        self._replay()

    def _replay(self) -> None:
        assert self.graph is not None
        self.graph.replay()
        self._step.replayed()


def _out_of_memory(error: Exception | None) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "STATUS_ALLOC_FAILED")
    )


def _first(error: Exception | None) -> str:
    """The first line of an error's message; None means an error of another rank."""
    lines = str(error or "another rank could not").strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def _checkpoints_without_rng(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing of diffusers saves the state of torch's generators, which cannot be read during a capture.
    Inside, it does not: a step draws nothing from them."""
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
    """Why this run cannot use one CUDA graph, as far as this is known before it starts."""
    if step.counter.device.type != "cuda":
        return _no_graph_on(step.counter.device)
    if step.shapes > 1:
        return f"it draws latents of {step.shapes} shapes, and a CUDA graph has one"
    if where := sharded(student):
        return f"{where}, which gathers and frees parameters on the host's schedule"
    return distributed.refuse_capture()


def refuse_compiled(step: TrainStep, student: nn.Module) -> str | None:
    """Why this version of torch cannot compile the step of this student."""
    if step.shapes > (limit := torch._dynamo.config.recompile_limit):
        return f"it draws latents of {step.shapes} shapes, of which torch compiles {limit} at most"
    if torch.__version__ < TorchVersion("2.13") and (where := sharded(student)):
        return f"{where}, whose step torch {torch.__version__} cannot compile (2.13 can)"
    return None


def _of_ranks() -> str | None:
    """Why the ranks of this run cannot capture a compiled step."""
    return None if distributed.size() == 1 else f"there are {distributed.size()} ranks, whose DDP torch compiles apart"


def _eager(step: TrainStep, why: str) -> Callable[[], None]:
    """The eager step; generators are seeded in each step if the student itself draws random numbers."""
    step.execution, step.why = "eager", why

    def advance() -> None:
        with step.randomness():
            step()

    return advance


@contextlib.contextmanager
def _compiler_errors() -> Iterator[None]:
    """FastdistillError if torch cannot compile what runs inside."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        why = f"step: torch.compile failed: {_first(getattr(error, 'inner_exception', error))}"
        raise FastdistillError(f"{why}; config.execution 'eager' does without it") from error


@contextlib.contextmanager
def _drawing_nothing(device: torch.device) -> Iterator[None]:
    """RandomnessError if the step inside has drawn random numbers from a generator with a state."""
    before = generator_states(device)
    yield
    if before != generator_states(device):
        error = RandomnessError(f"step: the student draws random numbers itself, {_UNSEEDED}")
        error.finished = True
        raise error


def _compiled(step: TrainStep, why: str) -> Callable[[], None]:
    """The step, compiled by its first call. FastdistillError if this fails, or if both the second and the third call
    draw random numbers from a generator with a state (compiling itself may do so once)."""
    step.execution, step.why = "compiled", why
    logger.info(_COMPILING)
    step.compile()
    calls = drawn = 0

    def advance() -> None:
        nonlocal calls, drawn
        calls += 1
        before = generator_states(step.counter.device) if calls in (2, 3) else None
        with _compiler_errors():
            step()
        drawn += before is not None and before != generator_states(step.counter.device)
        if drawn == 2:
            raise FastdistillError(f"step: the student draws random numbers itself, {_UNSEEDED}")

    return advance


def check_device(execution: Execution, device: torch.device) -> None:
    """FastdistillError if a step on this device cannot run as it is named, before there is one."""
    if execution in ("graph", "compiled_graph") and device.type != "cuda":
        raise FastdistillError(f"execution '{execution}': {_no_graph_on(device)}; use 'compiled'")


def _no_graph_on(device: torch.device) -> str:
    return f"it runs on {device.type}: a CUDA graph needs a CUDA device"


def check(step: TrainStep, student: nn.Module, execution: Execution) -> None:
    """FastdistillError if a step cannot run as it is named, as far as this is known before it starts."""
    if execution in ("auto", "eager"):
        return
    if draws := drawing([student, *step.objective.trained]):
        why = f"the student draws random numbers itself ({listed(draws)})"
        raise FastdistillError(f"execution '{execution}': {why}, {_UNSEEDED}")
    why_not = refuse_compiled(step, student)
    if execution == "compiled":
        if why_not is not None:
            raise FastdistillError(f"execution 'compiled': {why_not}; use 'eager'")
        return
    reason = refuse_graph(step, student)
    if execution == "compiled_graph":
        reason = reason or why_not or _of_ranks()
    if reason is not None:
        instead = "compiled" if why_not is None else "eager"
        raise FastdistillError(f"execution '{execution}': {reason}; use '{instead}'")


def runner(step: TrainStep, student: nn.Module, execution: Execution) -> Callable[[], None]:
    """The function that the loop calls for every step.

    ``eager``: the step itself. ``compiled``: draw, models and losses with ``torch.compile``. ``graph``: everything in
    one CUDA graph. ``compiled_graph``: the compiled step in one CUDA graph. ``auto``: on a GPU a graph, or compiled
    with a warning if a graph is not possible; on a CPU eager, unless something else was chosen (``choice``). A student
    that draws random numbers itself (dropout) runs eagerly, because only an eager step can seed the generators.

    Raises:
        FastdistillError: ``graph`` is not possible (with the reason); the student draws random numbers, and execution
            is not ``eager`` or ``auto``; ``compiled`` with a sharded student before torch 2.13; ``compiled_graph`` with
            several ranks; in the first three steps, something cannot be compiled.
    """
    check(step, student, execution)
    if execution == "compiled":
        return _compiled(step, _AS_SET)
    if execution in ("graph", "compiled_graph"):
        return GraphedStep(step, student, strict=True, compiled=execution == "compiled_graph")
    reason = refuse_graph(step, student) if execution == "auto" else None
    if execution == "eager" or (reason is not None and step.counter.device.type != "cuda"):
        return _eager(step, _AS_SET if execution == "eager" else "auto: nothing was measured")
    if draws := drawing([student, *step.objective.trained]):
        why = f"the student draws random numbers itself ({listed(draws)})"
        warnings.warn(f"step: no CUDA graph, as {why}; it runs eagerly", stacklevel=2)
        return _eager(step, why)
    if reason is None:
        return GraphedStep(step, student, strict=False)
    if (why_not := refuse_compiled(step, student)) is not None:
        warnings.warn(f"step: neither a CUDA graph nor compiled, as {why_not}; it runs eagerly", stacklevel=2)
        return _eager(step, why_not)
    warnings.warn(f"step: no CUDA graph, as {reason}; it is compiled", stacklevel=2)
    return _compiled(step, reason)
