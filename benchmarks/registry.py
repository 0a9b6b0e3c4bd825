# SPDX-License-Identifier: Apache-2.0
"""What is measured: for each op the shapes of real models, the minimum bytes and FLOPs, the rivals, and the check
before the timing. ``pytest --benchmark`` and ``python -m benchmarks.run`` both use it.

The cases of an op are in ``benchmarks/ops/<op>.py``: its function ``cases()`` yields them, the smallest first. A rival
is the fastest code that a user would write. It may reuse output buffers if ours does.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import benchmarks.ops
from fastdistill.ops import use

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COMPILED = "torch.compile"

Run = Callable[[], object]


class Holder(Protocol):
    """A run with its own memory. ``held``: the tensors that stay between two runs. ``rest`` releases everything that
    can be created again."""

    def __call__(self) -> object: ...

    def held(self) -> Iterable[Tensor]: ...

    def rest(self) -> None: ...


class Contestant:
    """A holder that is created at its first run and released by ``close``."""

    def __init__(self, make: Callable[[], Holder]) -> None:
        self._make = make
        self._made: Holder | None = None

    def __call__(self) -> None:
        self._holder()()

    def held(self) -> int:
        """The bytes of the held tensors."""
        storages = {s._cdata: s.nbytes() for t in self._holder().held() for s in (t.untyped_storage(),)}
        return sum(storages.values())

    def rest(self) -> None:
        if self._made is not None:
            self._made.rest()

    def close(self) -> None:
        self._made = None

    def _holder(self) -> Holder:
        if self._made is None:
            self._made = self._make()
        return self._made


class Group(NamedTuple):
    """Rivals that are timed together with ours, and for how many seconds."""

    rivals: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Workload:
    """A case with its tensors. ``ours`` and ``rivals`` run it once; ``check`` raises if ours is wrong.

    If a rival is not available, the reason is in its place. ``bytes`` and ``flops``: the minimum that a run must move
    and compute, or 0 if not counted. ``samples``: how many samples a run makes or trains on; rows then have images per
    second.
    ``memory``: rows then have the most memory that a run allocates at once. Runs of training steps are Contestants;
    their rows also have the peak memory and where the time went. Without ``groups``, the rivals alternate after each
    run. With ``groups``, only the rivals of one group alternate, each for several runs at a time; afterwards they are
    closed.
    """

    ours: Run
    rivals: dict[str, Run | str]
    check: Callable[[], None]
    bytes: int = 0
    flops: int = 0
    samples: int = 0
    memory: bool = False
    groups: tuple[Group, ...] = ()
    graphs: bool = True  # on a GPU, also time each contestant in a CUDA graph


@dataclass(frozen=True)
class Case:
    """One op at one shape; ``build(device)`` creates its tensors. ``rivals``: the names of the rivals.

    ``device``: "cpu" or "cuda", wherever this size is worth measuring. ``headline``: measured first on a GPU.
    """

    op: str
    shape: str
    dtype: str
    device: str
    build: Callable[[torch.device], Workload]
    rivals: tuple[str, ...]
    headline: bool = False

    def __str__(self) -> str:
        return f"{self.op}, {self.shape}, {self.dtype}"


def ops() -> list[str]:
    """The names of all ops that can be measured."""
    return sorted(module.name for module in pkgutil.iter_modules(benchmarks.ops.__path__))


def cases(device: str, op: Sequence[str] | None = None, dtype: Sequence[str] | None = None) -> Iterator[Case]:
    """The cases for a device ("cpu" or "cuda"), grouped by op, the smallest first."""
    for name in ops() if op is None else op:
        for case in importlib.import_module(f"benchmarks.ops.{name}").cases():
            if case.device == device and (dtype is None or case.dtype in dtype):
                yield case


def compiles(case: Case) -> bool:
    """Whether torch.compile is timed by default; on a CPU, where compiling is slow, only at an op's smallest shape."""
    return case.device == "cuda" or str(case) == str(next(cases(case.device, [case.op], [case.dtype])))


def generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def forward_backward(function: Callable[..., Tensor], *inputs: Any, cotangent: Tensor | None = None) -> Run:
    """One forward and backward of a function of (lists of) tensors: returns ``(output, *gradients)``."""
    leaves = [t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.requires_grad]

    def run() -> tuple[Tensor, ...]:
        output = function(*inputs)
        return (output, *torch.autograd.grad(output, leaves, cotangent))

    return run


def agrees(run: Callable[[], Sequence[Tensor]], factor: float = 2.0) -> Callable[[], None]:
    """A check that ``run`` returns the values of the reference, within ``factor`` eps of the largest value."""

    def check() -> None:
        got = [t.detach().clone() for t in run()]
        with use("reference"):
            expected = [t.detach() for t in run()]
        for a, b in zip(got, expected, strict=True):
            bound = factor * torch.finfo(b.dtype).eps if b.is_floating_point() else 0.0
            largest = b.abs().max().item() if b.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=bound, atol=bound * largest)

    return check


@functools.cache
def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """``function`` compiled for its shapes, on a GPU with autotuning. Without the compiler's own CUDA graphs, because
    every rival is captured in one."""
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else None
    return torch.compile(function, mode=mode, dynamic=False)


def forget_compiled() -> None:
    """Call it between cases, so that no case inherits dynamic shapes from an earlier one."""
    compiled.cache_clear()
    torch._dynamo.reset()


def optional(module: str, make: Callable[[Any], Run]) -> Run | str:
    """``make(module)`` if a rival's package is installed and works, else the reason."""
    package = module.split(".")[0]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        return make(importlib.import_module(module))
    except Exception as error:
        return f"{package}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
