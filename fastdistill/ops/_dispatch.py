# SPDX-License-Identifier: Apache-2.0
"""One mechanism for every op: a schema, a reference, and kernels per device in order of preference.

An op writes into tensors that its caller gives it (``Tensor(a!)`` arguments, nothing returned), so that a step can
reuse its buffers; the public function beside each op allocates them when the caller brings none. Kernels are only ever
reached through the dispatcher (under a fake tensor a raw pointer is 0 and would kill the process), or past it where the
tensors are plain and nobody listens there.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from fastdistill.errors import InputError, KernelError
from fastdistill.ops._inductor import keep_order

Function = TypeVar("Function", bound=Callable[..., Any])
REFERENCE = "reference"
_forced: str | None = None  # of all threads: a backward on a GPU runs in one of autograd's


@contextlib.contextmanager
def use(kernel: str | None) -> Iterator[None]:
    """Force one kernel inside the block, in every thread: ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``; None
    restores the automatic choice.

    Raises:
        KernelError: when an op is called that has no such kernel for the device, or whose kernel refuses the call; with
            its reason.
    """
    names = sorted({name for op in OPS.values() for name in op.kernel_names()})
    if kernel is not None and kernel not in names:
        raise InputError.of("kernel", f"one of {', '.join(names)}", repr(kernel))
    global _forced
    before, _forced = _forced, kernel
    try:
        yield
    finally:
        _forced = before


def forced() -> str | None:
    """The kernel that ``use`` asks for here, if any."""
    return _forced


def _never(*args: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Kernel:
    """One implementation of an op on one device type.

    ``launch`` has the op's schema. ``available`` says why this installation cannot run it at all, ``refuse`` why not
    this call; both return None when all is well.
    """

    name: str
    device: str
    launch: Callable[..., Any]
    available: Callable[[], str | None]
    refuse: Callable[..., str | None] = _never


def later(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that is imported when it is first called: Triton's import takes seconds."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args)

    return call


def constant(function: Function) -> Function:
    """What ``torch.compiler.assume_constant_result`` does: a compiler that traces a call runs it and keeps the result.
    Torch's own imports the compiler, which takes a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def _several_gpus() -> bool:
    return torch.cuda.device_count() > 1


def _gpu_of(args: Sequence[Any]) -> int | None:
    """The number of the first GPU among those of the tensors, or of the first tensors of lists."""
    tensors = (a[0] if isinstance(a, (list, tuple)) and a else a for a in args)
    return next((t.get_device() for t in tensors if isinstance(t, Tensor) and t.is_cuda), None)


class Kind:
    """Calls on plain CPU tensors of the same shapes and dtypes: the kernel that takes the first takes all of them, as
    the functions beside the ops bring every layout to one that kernels walk."""

    __slots__ = ("found",)

    def __init__(self) -> None:
        self.found: dict[str, tuple[Sequence[Kernel], str | None, Kernel]] = {}  # among which, asked for which, which

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None]) -> Kind | None:
        """None where kernels are only to be reached through the dispatcher."""
        plain = all(t is None or (type(t) in (Tensor, Parameter) and t.device.type == "cpu") for t in tensors)
        return cls() if plain else None


@dataclass
class Op:
    name: str
    summary: str
    reference: Callable[..., Any]
    kernels: Sequence[Kernel]
    calls: Counter[str] = field(default_factory=Counter)
    overload: Callable[..., Any] = _never  # fastdistill::<name>

    def __call__(self, kind: Kind | None, *args: Any) -> None:
        """Straight on the kernel that took the first call of this kind; None: through torch's dispatcher."""
        if kind is None:
            self.overload(*args)
            return
        found = kind.found.get(self.name)
        if found is None or found[0] is not self.kernels or found[1] != _forced:
            found = kind.found[self.name] = self.kernels, _forced, self.kernel_for("cpu", args)
        kernel = found[2]
        self.calls[kernel.name] += 1
        kernel.launch(*args)

    def kernel_names(self) -> list[str]:
        return [*dict.fromkeys(k.name for k in self.kernels), REFERENCE]

    def run(self, device: str, *args: Any) -> None:
        """Run the call on the first kernel of this device that does not refuse it, else on the reference."""
        kernel = self.kernel_for(device, args)
        self.calls[kernel.name] += 1
        kernel.launch(*args)

    def kernel_for(self, device: str, args: Sequence[Any]) -> Kernel:
        """The kernel that ``run`` runs, the reference as one too."""
        forced = _forced
        if forced != REFERENCE:
            for kernel in self.kernels:
                if (
                    kernel.device == device
                    and (forced is None or forced == kernel.name)
                    and kernel.available() is None
                    and kernel.refuse(*args) is None
                ):
                    return kernel
            if forced is not None:
                reason = self._reason(forced, device, args)
                raise KernelError(f"{self.name}: kernel {forced!r} cannot run this call on {device}: {reason}")
        return Kernel(REFERENCE, device, self.reference, lambda: None)

    def run_on_gpu(self, *args: Any) -> None:
        """``run`` with the GPU of the call's tensors as the current one: launches and streams belong to that."""
        if _several_gpus() and (gpu := _gpu_of(args)) not in (None, torch.cuda.current_device()):
            with torch.cuda.device(gpu):
                self.run("cuda", *args)
        else:
            self.run("cuda", *args)

    def _reason(self, name: str, device: str, args: Sequence[Any]) -> str:
        """Why the kernel of this name cannot run the call."""
        kernels = [k for k in self.kernels if (k.name, k.device) == (name, device)]
        reasons = [k.available() or k.refuse(*args) for k in kernels]
        return " and ".join(r for r in reasons if r) or f"it has none for {device}"

    def table(self) -> list[dict[str, str | None]]:
        """One row a kernel: name, device and the reason why it cannot run in this installation (None: it can)."""
        rows = [{"kernel": k.name, "device": k.device, "reason": k.available()} for k in self.kernels]
        return [*rows, {"kernel": REFERENCE, "device": "any", "reason": None}]


OPS: dict[str, Op] = {}


def used() -> dict[str, list[str]]:
    """The kernels that each op has run with in this process, the most used first: ``{"feature_match": ["cpp"],
    ...}``."""
    return {name: [kernel for kernel, _ in op.calls.most_common()] for name, op in OPS.items() if op.calls}


def quiet() -> bool:
    """Whether nobody listens at torch's dispatcher, which takes as long as a small kernel: no mode (fake tensors, a
    guard, a profiler's ranges), profiler, compiler, tracer, functorch transform or forward-mode differentiation."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    )


class Prepared:
    """A call of an op on tensors that stay what they are: the kernel that takes it is found once."""

    def __init__(self, op: Op, *args: Any) -> None:
        self._op, self._args = op, args
        self._kind = Kind.of([leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)])

    def __call__(self) -> None:
        self._op(self._kind if quiet() else None, *self._args)


def _fake(*args: Any) -> None:
    """Outputs are the caller's: there is nothing to infer."""
    if "torch._dynamo" in sys.modules:  # of a process that compiles
        keep_order()


def register(
    name: str, schema: str, *, summary: str, reference: Callable[..., None], kernels: Sequence[Kernel] = ()
) -> Op:
    """Define ``fastdistill::<name>``.

    Args:
        schema: the argument list in torch's schema language; outputs are mutable arguments, nothing is returned.
        summary: the formula in one line, shown by ``fastdistill doctor``.
        reference: the eager specification, run wherever no kernel takes the call.
        kernels: best first; those of a device that refuse a call pass it to the next.
    """
    op = OPS[name] = Op(name, summary, reference, kernels)
    qualified = f"fastdistill::{name}"
    torch.library.define(qualified, f"{schema} -> ()")
    torch.library.register_fake(qualified, _fake)
    torch.library.impl(qualified, "default", reference)
    torch.library.impl(qualified, "cpu", functools.partial(op.run, "cpu"))
    torch.library.impl(qualified, "cuda", op.run_on_gpu)
    op.overload = getattr(torch.ops.fastdistill, name).default
    return op
