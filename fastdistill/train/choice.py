# SPDX-License-Identifier: Apache-2.0
"""A run on a CPU measures once, before its first step, which way to execute a step is the fastest.

The choice changes the last bits of the results, so checkpoints store it and a resumed run uses it. Two runs with the
same seed may choose differently, unless the configuration names the execution.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fastdistill.errors import quoted
from fastdistill.models.fuse import fuse, unfuse
from fastdistill.models.sharding import sharded
from fastdistill.models.weights import shared
from fastdistill.train import distributed
from fastdistill.train.callbacks import Undisturbed
from fastdistill.train.config import TrainConfig
from fastdistill.train.graph import refuse_compiled, runner
from fastdistill.train.randomness import drawing
from fastdistill.train.step import TrainStep

logger = logging.getLogger(__name__)
LEAST = 500  # minimum steps of a run that measures: a measurement takes as long as about ten steps
PATIENCE = 20.0  # minimum seconds of remaining training; below, nothing is measured
SHARE = 0.15  # fraction of the time of an eager step that compiling is expected to save
COMPILING = 0.25  # estimated seconds of compiling per layer of the models, to decide whether to try it
ROUNDS = 5
PRECISION_ROUNDS = 3  # of each way in two precisions
MARGIN = 0.98  # another way counts as faster only below this fraction of the first way's time


@dataclass(frozen=True)
class Choice:
    """The choice for the fields that are "auto" in the configuration. ``execution``, ``channels_last`` (layout of 4-D
    weights of both models), ``fuse`` and ``precision`` are None if the configuration sets them or nothing was measured.
    ``why`` describes the measurement in a few words."""

    execution: Literal["eager", "compiled"] | None = None
    channels_last: bool | None = None
    fuse: bool | None = None
    precision: Literal["float32", "bfloat16"] | None = None
    why: str = ""

    @staticmethod
    def of(values: Any) -> Choice | None:
        """The choice that a checkpoint stores; None if there is none. Values that this version does not know (from a
        newer version) become None."""
        if not isinstance(values, Mapping):
            return None
        kept: dict[str, Any] = {name: values.get(name) for name, known in _VALUES.items() if values.get(name) in known}
        return Choice(**kept, why=str(values.get("why") or ""))

    def __str__(self) -> str:
        parts = [self.execution, "channels_last" if self.channels_last else None, "fused" if self.fuse else None]
        return ", ".join(part for part in parts if part) or "not fused"


_VALUES: dict[str, tuple[Any, ...]] = {
    "execution": ("eager", "compiled"),
    "channels_last": (False, True),
    "fuse": (False, True),
    "precision": ("float32", "bfloat16"),
}


def put(choice: Choice, step: TrainStep, student: nn.Module, teacher: nn.Module) -> None:
    """Apply a choice to both models; call it before the optimizer has any state."""
    if choice.fuse is not None:
        with warnings.catch_warnings():  # one of the two may have nothing to fuse
            warnings.filterwarnings("ignore", "fuse: nothing")
            for model in (teacher, student):
                fuse(model) if choice.fuse else unfuse(model)
    if choice.channels_last:
        _lay((teacher, student))
        step.wrap()


def open_in(choice: Choice, config: TrainConfig) -> Choice:
    """The part of a choice for the fields that are "auto" in the configuration."""
    if config.execution != "auto":
        choice = dataclasses.replace(choice, execution=None, channels_last=None)
    return choice if config.fuse == "auto" else dataclasses.replace(choice, fuse=None)


def choose(
    step: TrainStep, student: nn.Module, teacher: nn.Module, config: TrainConfig, choice: Choice | None = None
) -> Choice | None:
    """The fastest way to execute the steps of a new run, measured on the losses and gradients of the next step;
    afterwards everything is restored. Returns ``choice`` itself if no field is "auto", or the device is not a CPU.

    With several ranks, every rank must call this, the times of rank 0 decide, and nothing is compiled.
    """
    open_fuse, left = config.fuse == "auto", config.steps - int(step.counter[1])
    if step.counter.device.type != "cpu" or (config.execution != "auto" and not open_fuse):
        return choice
    plain = _plain(config, choice)
    if left < LEAST:
        return dataclasses.replace(plain, why=f"auto: {left} steps are too few to measure")
    if config.teacher_ahead:
        return dataclasses.replace(plain, why="auto: the teacher is asked ahead")
    if where := sharded(student):
        return dataclasses.replace(plain, why=f"auto: {where}")
    bench = Bench(step, student, teacher, config)
    with bench.kept():
        chosen = _measured(bench, plain, config, left)
        bench.put(chosen)
    if distributed.rank() == 0:
        logger.info("training step: %s (%s)", chosen, chosen.why)
    return chosen


def running(step: TrainStep, student: nn.Module, config: TrainConfig, choice: Choice | None) -> Callable[[], None]:
    """The function that the loop calls for each step, according to the configuration and the choice."""
    if config.execution != "auto" or choice is None or choice.execution is None:
        return runner(step, student, config.execution)
    advance = runner(step, student, choice.execution)
    step.execution, step.why = str(choice), choice.why
    return advance


def faster_precision(own: Bench, low: Bench, config: TrainConfig) -> Literal["float32", "bfloat16"]:
    """Whether an eager step is faster with the student in bfloat16, as in ``low``; each in its fastest way among those
    that the configuration leaves open. Rank 0's times decide."""
    plain = _plain(config)
    ways = _ways(own, plain, config)
    with own.kept(), low.kept():  # both have the same teacher, so one way at a time
        turns = [[[bench.seconds(way) for bench in (own, low)] for way in ways] for _ in range(1 + PRECISION_ROUNDS)]
        for bench in (own, low):
            bench.put(plain)
    best = torch.tensor(turns[1:], dtype=torch.float64, device="cpu").amin((0, 1))
    times = distributed.first(best.tolist)
    chosen: Literal["float32", "bfloat16"] = "float32" if times[0] <= times[1] else "bfloat16"
    if distributed.rank() == 0:
        told = f"float32 {1e3 * times[0]:.1f} ms per step, bfloat16 {1e3 * times[1]:.1f} ms per step"
        logger.info("precision: %s (measured: %s)", chosen, told)
    return chosen


def _plain(config: TrainConfig, choice: Choice | None = None) -> Choice:
    """The first way, on top of what was chosen before."""
    return dataclasses.replace(
        choice or Choice(),
        execution="eager" if config.execution == "auto" else None,
        fuse=False if config.fuse == "auto" else None,
    )


def _ways(bench: Bench, plain: Choice, config: TrainConfig) -> list[Choice]:
    """The eager ways that the configuration leaves open."""
    layouts = [None] if config.execution != "auto" or not bench.has_layouts() else [None, True]
    forms = [False, True] if plain.fuse is not None and bench.has_fused() else [plain.fuse]
    return [dataclasses.replace(plain, channels_last=c, fuse=f) for c, f in itertools.product(layouts, forms)]


def _measured(bench: Bench, plain: Choice, config: TrainConfig, left: int) -> Choice:
    first = bench.times([plain], rounds=1)[plain]
    if (total := first * left) < PATIENCE:
        return dataclasses.replace(plain, why=f"auto: the {left} steps that are left take some {total:.0f} s")
    times = bench.times(_ways(bench, plain, config))
    best = _fastest(times)
    told = [f"{way} {1e3 * seconds:.1f} ms per step" for way, seconds in times.items()]
    if config.execution == "auto":
        why_not = bench.refuse_compiled(left * times[best])
        if why_not is None:
            fused = None if best.fuse is None else False  # in compiled code the compiler's own fusions are faster
            compiled = dataclasses.replace(best, execution="compiled", fuse=fused)
            bench.put(best)
            began = time.perf_counter()
            if (why_not := bench.failure(compiled)) is None:
                spent = time.perf_counter() - began
                again = bench.times([best, compiled])
                told = [f"{way} {1e3 * seconds:.1f} ms per step" for way, seconds in (times | again).items()]
                told.append(f"compiling took {spent:.0f} s of {left} steps that are left")
                best = _fastest(again)
        if why_not is not None:
            told.append(f"not compiled, as {why_not}")
    return dataclasses.replace(best, why="auto: " + ", ".join(told))


def _fastest(times: dict[Choice, float]) -> Choice:
    """The first one, unless another is clearly faster."""
    first, best = next(iter(times)), min(times, key=times.__getitem__)
    return first if MARGIN * times[first] <= times[best] else best


class Bench:
    """Runs the losses and gradients of a step in the way of a choice, and restores everything afterwards."""

    def __init__(self, step: TrainStep, student: nn.Module, teacher: nn.Module, config: TrainConfig) -> None:
        self.step, self.student, self.teacher, self._config = step, student, teacher, config
        self._now: Choice | None = None
        self._flat = _strides((teacher, student))
        self._trained = [student, *step.objective.trained]

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """At the end, restore buffers, the objective's state, training modes, gradients and generators."""
        own, sums, common = (list(getattr(self.step.objective, k, {}).values()) for k in ("state", "sums", "common"))
        tensors = [*own, *sums, *(b for model in self._trained for b in model.buffers())]
        saved = [(tensor, tensor.clone()) for tensor in tensors]
        try:
            with Undisturbed(self.step, self.student, self.teacher, self._config.seed)(0):
                self.step.prepare(int(self.step.counter[1]))
                saved += [(tensor, tensor.clone()) for tensor in common]  # including what ``prepare`` has written
                yield
        finally:
            with torch.no_grad():
                for tensor, before in saved:
                    tensor.copy_(before)

    def put(self, choice: Choice) -> None:
        """Apply a choice to the step and the models."""
        was, self._now = self._now, choice
        if was is None or was.fuse != choice.fuse:
            put(dataclasses.replace(choice, channels_last=None), self.step, self.student, self.teacher)
        if bool(was and was.channels_last) != bool(choice.channels_last):
            if choice.channels_last:
                _lay((self.teacher, self.student))
            else:
                _restore(self._flat)
            self.step.wrap()
        self.step.compile() if choice.execution == "compiled" else self.step.uncompile()

    def seconds(self, choice: Choice) -> float:
        """Seconds of one step; with one thread its CPU time, which does not depend on other processes."""
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        self.put(choice)
        began = clock()
        with self.step.randomness():
            self.step.gradients()
        took = clock() - began
        self.step.optimizer.zero_grad(set_to_none=True)
        return took

    def times(self, ways: list[Choice], rounds: int = ROUNDS) -> dict[Choice, float]:
        """The shortest time of each way over ``rounds`` alternating rounds; all ranks get the times of rank 0."""
        for way in ways:  # allocates buffers, chooses kernels
            self.seconds(way)
        turns = [[self.seconds(way) for way in ways] for _ in range(rounds)]
        found = distributed.first(lambda: [min(each) for each in zip(*turns, strict=True)])
        return dict(zip(ways, found, strict=True))

    def has_layouts(self) -> bool:
        """Whether some weights are not in channels_last, and the models share no weights."""
        others = [p for p, _ in self._flat if not p.is_contiguous(memory_format=torch.channels_last)]
        return bool(others) and not shared(self.student, self.teacher)

    def has_fused(self) -> bool:
        """Whether there is anything to fuse."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            able = [any(swap.swapped for swap in fuse(model)) for model in (self.teacher, self.student)]
        for model in (self.teacher, self.student):
            unfuse(model)
        return any(able)

    def refuse_compiled(self, seconds: float) -> str | None:
        """Why compiling is not tried; None: it is. ``seconds``: of the remaining training in eager mode."""
        layers = sum(1 for model in (self.teacher, self.student) for m in model.modules() if not [*m.children()])
        expected = COMPILING * layers * self.step.shapes  # torch compiles each shape by itself
        if distributed.size() > 1:
            return "there are several ranks"
        if draws := drawing(self._trained):
            return f"the student draws random numbers itself ({draws[0]})"
        if SHARE * seconds < expected:
            return f"that takes some {expected:.0f} s, and the steps that are left {seconds:.0f} s"
        return refuse_compiled(self.step, self.student)

    def failure(self, compiled: Choice) -> str | None:
        """Compile; returns the reason if this fails."""
        try:
            self.seconds(compiled)
        except Exception as error:  # the compiler fails, or there is no C++ compiler
            self.step.uncompile()
            self.step.optimizer.zero_grad(set_to_none=True)
            return f"that failed: {quoted(error)}"
        return None


def _weights(models: tuple[nn.Module, ...]) -> Iterator[nn.Parameter]:
    """The weights that can be in channels_last (torch has no strides for quantized weights)."""
    parameters = (p for model in models for p in model.parameters() if not hasattr(p, "__tensor_flatten__"))
    return (p for p in parameters if p.dim() == 4 and p.is_floating_point() and not p.is_meta)


def _strides(models: tuple[nn.Module, ...]) -> list[tuple[nn.Parameter, tuple[int, ...]]]:
    return [(p, p.stride()) for p in _weights(models)]


def _lay(models: tuple[nn.Module, ...]) -> None:
    for parameter in _weights(models):
        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _restore(strides: list[tuple[nn.Parameter, tuple[int, ...]]]) -> None:
    for parameter, stride in strides:
        if parameter.stride() != stride:
            data = parameter.data
            parameter.data = torch.empty_strided(data.shape, stride, dtype=data.dtype).copy_(data)


def has_bfloat16(device: torch.device) -> bool:
    """Whether this processor has bfloat16 instructions (AVX-512 BF16, AMX)."""
    if device.type != "cpu":
        return False
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
