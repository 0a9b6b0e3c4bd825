# SPDX-License-Identifier: Apache-2.0
"""Profiles a few training steps, and saves one call per op so that it can be repeated alone (docs/profiling.md).

Each op runs in a range with its name: an NVTX range for Nsight, else a range of torch.profiler. The ranges exist only
during a profile; without one they cost nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.utils._pytree import tree_map_only

from fastdistill.errors import InputError, StorageError
from fastdistill.files import located, make_directory
from fastdistill.ops import OPS, use
from fastdistill.train import kept


@dataclasses.dataclass(frozen=True)
class Profile:
    """``trace``: a Chrome trace (chrome://tracing, ui.perfetto.dev); None under Nsight. ``calls``: one file per op with
    the arguments of its last call. ``milliseconds``: time of all steps together. ``ops``: the fraction per op."""

    trace: Path | None
    calls: dict[str, Path]
    milliseconds: float
    ops: dict[str, float]


def profile_steps(
    step: Callable[[], object],
    directory: str | Path,
    *,
    steps: int = 3,
    warm_up: int = 3,
    models: Mapping[str, nn.Module] | None = None,
    nsight: bool = False,
) -> Profile:
    """Profile ``steps`` calls of ``step``, after ``warm_up`` calls and one call in which the calls of ops are saved.

    Args:
        step: one eager training step, such as ``DistillTrainer.step``. (A captured graph executes no Python, so it has
            no ranges.)
        directory: folder for ``trace.json`` and the saved calls ``<op>.safetensors``.
        models: modules by the name of the range that their forward gets.
        nsight: mark the steps for Nsight Systems or Nsight Compute (NVTX ranges between cudaProfilerStart and Stop)
            instead of writing a trace; torch's own profiler cannot run at the same time.

    Raises:
        InputError: ``steps`` is below 1, or ``nsight`` without a GPU. StorageError: the directory cannot be written.
    """
    if steps < 1:
        raise InputError.of("steps", "at least one", steps)
    gpu = torch.cuda.is_available()
    if nsight and not gpu:
        raise InputError.of("nsight", "a CUDA device", "none (without --nsight torch.profiler writes a trace)")
    directory = located(directory, "directory")
    make_directory(directory)
    for _ in range(warm_up):
        step()
    calls: dict[str, tuple[str, tuple[Any, ...]]] = {}
    with _profiling, contextlib.ExitStack() as stack:
        with _ranges(_keeping(calls), {}, nsight):
            step()
        profiler = stack.enter_context(_nsight() if nsight else _torch_profiler(gpu))
        stack.enter_context(_ranges(None, models or {}, nsight))
        start = time.perf_counter()
        for i in range(steps):
            with _range(f"step {i}", nsight):
                step()
        if gpu:
            torch.cuda.synchronize()
        milliseconds = 1e3 * (time.perf_counter() - start)
    saved = {op: directory / f"{op}{kept.SUFFIX}" for op in calls}
    for op, call in calls.items():
        kept.save(saved[op], op, *call)
    if profiler is None:
        return Profile(None, saved, milliseconds, {})
    trace = directory / "trace.json"
    try:
        profiler.export_chrome_trace(str(trace))
    except (OSError, RuntimeError) as error:
        raise StorageError(f"{trace}: could not be written: {error}") from error
    spent = {e.key: (e.device_time_total if gpu else e.cpu_time_total) / 1e3 for e in profiler.key_averages()}
    return Profile(trace, saved, milliseconds, {op: spent[op] / milliseconds for op in OPS if op in spent})


def replay(
    call: str | Path, *, kernel: str | None = None, device: str | None = None, repeats: int = 20, nsight: bool = False
) -> list[float]:
    """Run one saved call ``repeats`` times and return the milliseconds of each run; with ``nsight`` between
    cudaProfilerStart and Stop.

    Args:
        call: a file written by ``profile_steps``, on any machine; files of strangers are safe.
        kernel: use this kernel. device: where to run (None: a GPU if there is one).

    Raises:
        InputError: not such a file, arguments that do not fit the op, no such kernel or device. StorageError: the file
            cannot be read. KernelError: the kernel cannot run this call.
    """
    from fastdistill.train.devices import usable  # imported here: measurements of ops need no diffusers

    gpu = torch.cuda.is_available()
    device = str(usable(device or ("cuda" if gpu else "cpu")))
    if nsight and not gpu:
        raise InputError.of("nsight", "a CUDA device", "none")
    if repeats < 1:
        raise InputError.of("repeats", "at least one", repeats)
    op, arguments = kept.load(located(call, "call"), device)
    launch = getattr(torch.ops.fastdistill, op).default

    def timed() -> float:
        start = time.perf_counter()
        with _range(op, nsight):
            launch(*arguments)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    with use(kernel):
        for _ in range(3):
            timed()
        with _nsight() if nsight else contextlib.nullcontext():
            return [timed() for _ in range(repeats)]


@contextlib.contextmanager
def _nsight() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    try:
        yield
    finally:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def _torch_profiler(gpu: bool) -> torch.profiler.profile:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    return torch.profiler.profile(activities=activities)


@contextlib.contextmanager
def _range(name: str, nvtx: bool) -> Iterator[None]:
    with torch.cuda.nvtx.range(name) if nvtx else torch.profiler.record_function(name):
        yield


Keep = Callable[[str, str, tuple[Any, ...]], None]


def _keeping(calls: dict[str, tuple[str, tuple[Any, ...]]]) -> Keep:
    def keep(op: str, kernel: str, arguments: tuple[Any, ...]) -> None:
        calls[op] = kernel, tree_map_only(Tensor, lambda t: t.detach().clone(), arguments)

    return keep


_profiling = threading.Lock()  # the ranges replace the kernels in the whole process: only one profile at a time


@contextlib.contextmanager
def _ranges(keep: Keep | None, models: Mapping[str, nn.Module], nvtx: bool) -> Iterator[None]:
    """Inside, the kernels of every op and the forwards of the models run in ranges; ``keep`` gets each call first."""

    def around(op: str, kernel: str, launch: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            if keep is not None:
                keep(op, kernel, arguments)
            with _range(op, nvtx):
                launch(*arguments)

        return run

    before = {name: (op.kernels, op.reference) for name, op in OPS.items()}
    handles = [handle for name, model in models.items() for handle in _around_forward(name, model, nvtx)]
    try:
        for name, op in OPS.items():
            op.kernels = [dataclasses.replace(k, launch=around(name, k.name, k.launch)) for k in op.kernels]
            op.reference = around(name, "reference", op.reference)
        yield
    finally:
        for name, (kernels, reference) in before.items():
            OPS[name].kernels, OPS[name].reference = kernels, reference
        for handle in handles:
            handle.remove()


def _around_forward(name: str, model: nn.Module, nvtx: bool) -> list[Any]:
    opened: list[contextlib.AbstractContextManager[None]] = []

    def enter(*_: object) -> None:
        opened.append(_range(name, nvtx))
        opened[-1].__enter__()

    def leave(*_: object) -> None:
        opened.pop().__exit__(None, None, None)

    return [model.register_forward_pre_hook(enter, prepend=True), model.register_forward_hook(leave, always_call=True)]
