# SPDX-License-Identifier: Apache-2.0
"""One mechanism for every op: a schema, a reference, and kernels per device in order of preference.

An op writes into tensors that its caller gives it (``Tensor(a!)`` arguments, nothing returned), so that a step can
reuse its buffers; the public function beside each op allocates them when the caller brings none. Kernels are only ever
reached through the dispatcher (under a fake tensor a raw pointer is 0 and would kill the process), or past it where the
tensors are plain and nobody listens there.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import importlib
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from fastdistill.errors import DeviceError, InputError, KernelError, described
from fastdistill.ops import _failures
from fastdistill.ops._inductor import keep_order

Function = TypeVar("Function", bound=Callable[..., Any])
REFERENCE = "reference"
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("fastdistill_kernel")
_forced.set(None)  # in this thread; autograd's own threads start without


@contextlib.contextmanager
def use(kernel: str | None) -> Iterator[None]:
    """Force one kernel inside the block: ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``; None restores the
    automatic choice.

    The choice belongs to the thread (or asyncio task) of the block: other threads are not affected. A backward uses the
    choice of its forward, in whatever thread it runs and also after the block. In a compiled function the choice is
    read when it runs, by its backward in the thread that calls ``backward``; only ``attention`` and the fallback of
    ``cross_attention`` to torch's attention keep what was chosen when they were traced.

    Raises:
        InputError: no op has a kernel of this name.
        KernelError: when an op is called that has no such kernel for the device, or whose kernel refuses the call or
            cannot be compiled; with the reason.
    """
    names = sorted({name for op in OPS.values() for name in op.kernel_names()})
    if kernel is not None and not (isinstance(kernel, str) and kernel in names):
        raise InputError.of("kernel", f"one of {', '.join(names)}", described(kernel))
    token = _forced.set(kernel)
    _show()
    try:
        yield
    finally:
        _forced.reset(token)
        _show()


_BY_TORCH = torch.__version__ >= (2, 12)  # type: ignore[operator]  # is compared with tuples too


def _show() -> None:
    """To autograd's threads, in which the backwards of a GPU run, what is asked for in this one. From 2.12 on torch
    stashes the context itself, around each backward; before, tasks of one thread whose blocks overlap share it."""
    if not _BY_TORCH:
        context = contextvars.copy_context()
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(context))  # torch takes a reference over and did not count it
        torch._C._stash_obj_in_tls("context", context)


def constant(function: Function) -> Function:
    """What ``torch.compiler.assume_constant_result`` does: a compiler that traces a call runs it and keeps the result.
    Torch's own imports the compiler, which takes a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def forced() -> str | None:
    """The kernel that ``use`` asks for here, if any; in a thread of autograd's, where ``backward`` was called."""
    kernel = _forced.get("")
    if kernel != "":
        return kernel
    # Not set in this thread. Autograd's threads have torch's copy of the context in which backward was called.
    context = torch._C._get_obj_in_tls("context") if torch._C._is_key_in_tls("context") else None
    return None if context is None else context.get(_forced)


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

    loaded: ModuleType | None = None

    def call(*args: Any) -> Any:
        nonlocal loaded
        if loaded is None:
            try:
                loaded = importlib.import_module(module)
                getattr(loaded, name)
            except Exception as error:  # of a Triton that lacks what the module uses, say
                raise ImportError(f"{module} does not load: {error}") from error
        return getattr(loaded, name)(*args)

    return call


@functools.cache
def _several_gpus() -> bool:
    return torch.cuda.device_count() > 1


def _gpu_of(args: Sequence[Any]) -> int | None:
    """The number of the first GPU among those of the tensors, or of the first tensors of lists."""
    tensors = (a[0] if isinstance(a, (list, tuple)) and a else a for a in args)
    return next((t.get_device() for t in tensors if isinstance(t, Tensor) and t.is_cuda), None)


class Kind:
    """Calls on plain tensors of the same shapes and dtypes, all on CPUs or all on GPUs. On a CPU the kernel that takes
    the first takes all of them, as the functions beside the ops bring every layout to one that kernels walk; on a GPU
    each call asks them."""

    __slots__ = ("found", "on_cpu")

    def __init__(self, on_cpu: bool = True) -> None:
        self.on_cpu = on_cpu
        # By op, and by the kernel that is forced where one is: the kernels to choose from, and the one chosen.
        self.found: dict[str | tuple[str, str], tuple[Sequence[Kernel], Kernel]] = {}

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None]) -> Kind | None:
        """None where kernels are only to be reached through the dispatcher."""
        given = [t for t in tensors if t is not None]
        devices = {t.device.type for t in given}
        plain = devices <= {"cpu"} or devices == {"cuda"}
        return cls(devices != {"cuda"}) if plain and all(type(t) in (Tensor, Parameter) for t in given) else None


@dataclass
class Op:
    """``failures``: the reason for each kernel and kind of call where it could not be compiled, loaded or launched."""

    name: str
    summary: str
    reference: Callable[..., Any]
    kernels: Sequence[Kernel]
    calls: Counter[str] = field(default_factory=Counter)
    failures: dict[tuple[str, Any], str] = field(default_factory=dict)
    overload: Callable[..., Any] = _never  # fastdistill::<name>

    def __call__(self, kind: Kind | None, *args: Any) -> None:
        """Straight on a kernel, on a CPU the one that took the first call of this kind; None: through torch's
        dispatcher."""
        if kind is None:
            self.overload(*args)
            return
        if not kind.on_cpu:
            self.run_on_gpu(*args)
            return
        if (asked := _forced.get("")) is not None:  # None spares the call
            asked = forced()
        key = self.name if asked is None else (self.name, asked)
        found = kind.found.get(key)
        if found is None or found[0] is not self.kernels:
            found = kind.found[key] = self.kernels, self.kernel_for("cpu", args)
        kernel = found[1]
        try:
            kernel.launch(*args)
        except Exception as error:
            self._pass_by(kernel, args, error)
            kind.found.pop(key, None)
        else:
            self.calls[kernel.name] += 1
            return
        self.run("cpu", *args)

    def kernel_names(self) -> list[str]:
        return [*dict.fromkeys(k.name for k in self.kernels), REFERENCE]

    def run(self, device: str, *args: Any) -> None:
        """Run the call on the first kernel of this device that can, else on the reference.

        A kernel that cannot be compiled, loaded or launched is passed by, with one warning, in this call and in all
        others of its kind.

        Raises:
            KernelError: a forced kernel cannot run the call. DeviceError: the device has failed.
        """
        kernel = self.kernel_for(device, args)
        try:
            kernel.launch(*args)
        except Exception as error:
            self._pass_by(kernel, args, error)
        else:
            self.calls[kernel.name] += 1
            return
        self.run(device, *args)

    def kernel_for(self, device: str, args: Sequence[Any]) -> Kernel:
        """The kernel that ``run`` tries next, the reference as one too."""
        asked = forced()
        if asked != REFERENCE:
            for kernel in self.kernels:
                if (
                    kernel.device == device
                    and (asked is None or asked == kernel.name)
                    and self._refusal(kernel, args) is None
                ):
                    return kernel
            if asked is not None:
                kernels = [k for k in self.kernels if (k.name, k.device) == (asked, device)]
                reasons = [reason for k in kernels if (reason := self._refusal(k, args))]
                raise self._error(asked, device, " and ".join(reasons) or f"it has none for {device}")
        return Kernel(REFERENCE, device, self.reference, lambda: None)

    def _refusal(self, kernel: Kernel, args: Sequence[Any]) -> str | None:
        """Why the kernel cannot run the call, as far as is known before it is tried."""
        try:
            reason = kernel.available() or kernel.refuse(*args)
        except ImportError as error:
            return str(error)
        if reason is None and self.failures:
            reason = self.failures.get((kernel.name, _failures.kind(args)))
        return reason

    def _pass_by(self, kernel: Kernel, args: Sequence[Any], error: Exception) -> None:
        """Have this call and others of its kind go to the next kernel, where this one could not be compiled, loaded or
        launched; else raise."""
        if _failures.is_final(error):
            raise DeviceError(
                f"{self.name}: kernel {kernel.name!r} met an error of this call or an earlier one, after which the"
                f" device runs nothing more in this process (CUDA_LAUNCH_BLOCKING=1 finds the call): {error}"
            ) from error
        reason = _failures.reason(error)
        if reason is None or kernel.name == REFERENCE:
            raise error
        if kernel.device == "cuda" and torch.cuda.is_current_stream_capturing():
            raise error  # what a graph holds is decided before its capture
        if forced() is not None:
            raise self._error(kernel.name, kernel.device, reason) from error
        known = any(name == kernel.name for name, _ in list(self.failures))  # other threads may add to it
        self.failures[kernel.name, _failures.kind(args)] = reason
        if not known:
            warnings.warn(
                f"{self.name}: kernel {kernel.name!r} cannot run on {kernel.device}; calls of this kind go to"
                f" {self.kernel_for(kernel.device, args).name!r}: {reason}",
                stacklevel=3,
            )

    def _error(self, kernel: str, device: str, reason: str) -> KernelError:
        return KernelError(f"{self.name}: kernel {kernel!r} cannot run this call on {device}: {reason}")

    def run_on_gpu(self, *args: Any) -> None:
        """``run`` with the GPU of the call's tensors as the current one: launches and streams belong to that."""
        if _several_gpus() and (gpu := _gpu_of(args)) not in (None, torch.cuda.current_device()):
            with torch.cuda.device(gpu):
                self.run("cuda", *args)
        else:
            self.run("cuda", *args)

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
    op.overload = getattr(torch.ops.fastdistill, name).default
    for device, run in (("default", reference), ("cpu", functools.partial(op.run, "cpu")), ("cuda", op.run_on_gpu)):
        torch.library.impl(qualified, device, _with_lists(run, op.overload))
    return op


def _with_lists(run: Callable[..., None], overload: Any) -> Callable[..., None]:
    """Packages of AOTInductor pass None in place of an empty list."""
    lists = {i for i, a in enumerate(overload._schema.arguments) if isinstance(a.type, torch.ListType)}
    if not lists:
        return run

    def call(*args: Any) -> None:
        run(*([] if a is None and i in lists else a for i, a in enumerate(args)))

    return call
