# SPDX-License-Identifier: Apache-2.0
"""One mechanism for every op: a schema, a reference, and kernels per device in order of preference.

An op writes into tensors of its caller (``Tensor(a!)`` arguments, nothing returned), so that a step can reuse its
buffers; the public function of each op allocates them if the caller passes none. Kernels are called through torch's
dispatcher, because with fake tensors a raw pointer is 0 and would crash the process. They bypass it only if the tensors
are plain and no dispatch mode, profiler or tracer is active.
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
_forced.set(None)  # in this thread; autograd's own threads start without a value


@contextlib.contextmanager
def use(kernel: str | None) -> Iterator[None]:
    """Force one kernel inside the block: ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``; None restores the
    automatic choice.

    The choice applies to the thread (or asyncio task) of the block; other threads are not affected. A backward uses the
    choice of its forward, in any thread and also after the block. A compiled function reads the choice each time it
    runs, and its backward reads it in the thread that calls ``backward``. Only ``attention`` and the fallback of
    ``cross_attention`` to torch's attention keep the choice from the time of tracing.

    Raises:
        InputError: no op has a kernel of this name.
        KernelError: raised by a call inside the block, if the op has no such kernel for the device, or the kernel
            refuses the call or cannot be compiled; the message gives the reason.
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
    """Make the choice of this thread visible in autograd's threads, which run the backwards of a GPU. From 2.12 on,
    torch itself passes on the context at each backward; before, asyncio tasks with overlapping blocks share a choice.
    """
    if not _BY_TORCH:
        context = contextvars.copy_context()
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(context))  # torch takes over a reference that it did not count
        torch._C._stash_obj_in_tls("context", context)


def constant(function: Function) -> Function:
    """Like ``torch.compiler.assume_constant_result``: a tracing compiler executes the call and keeps the result as a
    constant. Torch's own function imports the compiler, which takes a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def forced() -> str | None:
    """The kernel that ``use`` selects in this thread; in autograd's threads, in the thread that called ``backward``."""
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

    ``launch`` has the op's schema. ``available`` returns the reason if this installation cannot run it, ``refuse`` the
    reason if it does not support this call; otherwise both return None.
    """

    name: str
    device: str
    launch: Callable[..., Any]
    available: Callable[[], str | None]
    refuse: Callable[..., str | None] = _never


def later(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that is imported at the first call, because importing Triton takes seconds."""

    loaded: ModuleType | None = None

    def call(*args: Any) -> Any:
        nonlocal loaded
        if loaded is None:
            try:
                loaded = importlib.import_module(module)
                getattr(loaded, name)
            except Exception as error:  # for example a Triton without a function that the module uses
                raise ImportError(f"{module} does not load: {error}") from error
        return getattr(loaded, name)(*args)

    return call


@functools.cache
def _several_gpus() -> bool:
    return torch.cuda.device_count() > 1


def _gpu_of(args: Sequence[Any]) -> int | None:
    """The index of the GPU of the first argument that is a tensor on a GPU, or a list that starts with one."""
    tensors = (a[0] if isinstance(a, (list, tuple)) and a else a for a in args)
    return next((t.get_device() for t in tensors if isinstance(t, Tensor) and t.is_cuda), None)


class Kind:
    """Calls with plain tensors of the same shapes and dtypes, all on CPUs or all on GPUs. On a CPU the kernel of the
    first call serves all of them, because the public functions convert every layout to a supported one; on a GPU the
    kernels are asked (``refuse``) for each call."""

    __slots__ = ("found", "on_cpu")

    def __init__(self, on_cpu: bool = True) -> None:
        self.on_cpu = on_cpu
        # For each op (and forced kernel, if any): the kernels to choose from, and the chosen one.
        self.found: dict[str | tuple[str, str], tuple[Sequence[Kernel], Kernel]] = {}

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None]) -> Kind | None:
        """None if kernels may only be called through the dispatcher."""
        given = [t for t in tensors if t is not None]
        devices = {t.device.type for t in given}
        plain = devices <= {"cpu"} or devices == {"cuda"}
        return cls(devices != {"cuda"}) if plain and all(type(t) in (Tensor, Parameter) for t in given) else None


@dataclass
class Op:
    """``failures``: for each kernel and kind of call that could not be compiled, loaded or launched, the reason."""

    name: str
    summary: str
    reference: Callable[..., Any]
    kernels: Sequence[Kernel]
    calls: Counter[str] = field(default_factory=Counter)
    failures: dict[tuple[str, Any], str] = field(default_factory=dict)
    overload: Callable[..., Any] = _never  # fastdistill::<name>

    def __call__(self, kind: Kind | None, *args: Any) -> None:
        """Call a kernel directly, on a CPU that of the first call of this kind; ``kind`` None: through torch's
        dispatcher."""
        if kind is None:
            self.overload(*args)
            return
        if not kind.on_cpu:
            self.run_on_gpu(*args)
            return
        if (asked := _forced.get("")) is not None:  # None, the common case, saves the call
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

        A kernel that cannot be compiled, loaded or launched is skipped, with one warning, in this call and in all
        others of its kind.

        Raises:
            KernelError: a forced kernel cannot run the call.
            DeviceError: the device has failed.
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
        """The kernel that ``run`` tries next; the reference counts as a kernel."""
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
        """Why the kernel cannot run the call, as far as this is known before the launch."""
        try:
            reason = kernel.available() or kernel.refuse(*args)
        except ImportError as error:
            return str(error)
        if reason is None and self.failures:
            reason = self.failures.get((kernel.name, _failures.kind(args)))
        return reason

    def _pass_by(self, kernel: Kernel, args: Sequence[Any], error: Exception) -> None:
        """Send this call and others of its kind to the next kernel if this one could not be compiled, loaded or
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
            raise error  # the kernels of a graph must be known before its capture
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
        """``run`` with the GPU of the call's tensors as the current device, which launches and streams use."""
        if _several_gpus() and (gpu := _gpu_of(args)) not in (None, torch.cuda.current_device()):
            with torch.cuda.device(gpu):
                self.run("cuda", *args)
        else:
            self.run("cuda", *args)

    def table(self) -> list[dict[str, str | None]]:
        """One row per kernel: name, device and the reason why it cannot run in this installation (None: it can)."""
        rows = [{"kernel": k.name, "device": k.device, "reason": k.available()} for k in self.kernels]
        return [*rows, {"kernel": REFERENCE, "device": "any", "reason": None}]


OPS: dict[str, Op] = {}


def used() -> dict[str, list[str]]:
    """For each op the kernels that were used in this process, the most used first: ``{"feature_match": ["cpp"],
    ...}``."""
    return {name: [kernel for kernel, _ in op.calls.most_common()] for name, op in OPS.items() if op.calls}


def transformed() -> bool:
    """Whether a compiler, a tracer, a functorch transform or forward-mode differentiation is active."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def quiet() -> bool:
    """Whether torch's dispatcher, which takes as long as a small kernel, can be bypassed: no transform, dispatch mode
    (such as fake tensors) or profiler is active. The numbers must not depend on it: modes and profilers only watch."""
    return not (
        transformed()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._autograd._profiler_enabled()
    )


class Prepared:
    """A call of an op that is repeated with the same tensors; its kernel is chosen once."""

    def __init__(self, op: Op, *args: Any) -> None:
        self._op, self._args = op, args
        self._kind = Kind.of([leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)])

    def __call__(self) -> None:
        self._op(self._kind if quiet() else None, *self._args)


def _fake(*args: Any) -> None:
    """The caller allocates the outputs, so there is nothing to infer."""
    if "torch._dynamo" in sys.modules:  # this process compiles
        keep_order()


def register(
    name: str, schema: str, *, summary: str, reference: Callable[..., None], kernels: Sequence[Kernel] = ()
) -> Op:
    """Define ``fastdistill::<name>``.

    Args:
        schema: the argument list in torch's schema language; outputs are mutable arguments, nothing is returned.
        summary: the formula in one line, shown by ``fastdistill doctor``.
        reference: the eager specification, used if no kernel supports the call.
        kernels: best first; if a kernel refuses a call, the next one of the same device is tried.
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
    """AOTInductor packages pass None instead of an empty list."""
    lists = {i for i, a in enumerate(overload._schema.arguments) if isinstance(a.type, torch.ListType)}
    if not lists:
        return run

    def call(*args: Any) -> None:
        run(*([] if a is None and i in lists else a for i, a in enumerate(args)))

    return call
