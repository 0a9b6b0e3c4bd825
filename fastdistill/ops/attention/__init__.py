# SPDX-License-Identifier: Apache-2.0
"""Self-attention by the fastest correct backend for the shape, as measured on this machine.

    out = softmax(scale Q K^T) V

This library has no kernel of its own for this op: torch's backends, xformers and FlashAttention 3 are within a few
percent of the hardware limit. Which of them is the fastest depends on the device, the versions and the shape.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastdistill.errors import DeviceError, InputError, KernelError, quoted
from fastdistill.ops import _check, _failures
from fastdistill.ops._dispatch import OPS, REFERENCE, Kernel, Op, constant, forced
from fastdistill.ops.attention import backends, reference, table
from fastdistill.ops.attention.backends import BACKENDS
from fastdistill.ops.attention.measure import measure

VARIABLE = "FASTDISTILL_ATTENTION"
DEFAULT = "default"
NAMES = (*BACKENDS, REFERENCE, DEFAULT)

# The kernels belong to other libraries: the index lists them with their reasons, and this module chooses among them.
OPS["attention"] = Op(
    "attention",
    "softmax(scale q k^T) v by the backend measured to be the fastest for the shape",
    reference.attention,
    [
        Kernel(b.name, device, b.run, functools.partial(b.available, device))
        for b in BACKENDS.values()
        for device in b.devices
    ],
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    heads: int | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention without a mask, differentiable.

    The first call of a kind (device, versions, shapes, dtype, layout, with or without backward) checks each backend
    against float64, measures it, and stores the result in ``table.path()``. This takes a fraction of a second and
    memory for the gradients. During the capture of a CUDA graph nothing is measured: a stored result is used, or else
    torch's own choice. The same holds during compilation with fixed shapes, with torch's backends only; so measure
    before, by an eager call or by ``tune_attention``. In torch's deterministic mode only backends with a deterministic
    backward are candidates.

    Args:
        q: [B, N, H, D], or [B, N, H * D] with ``heads`` (the output of a projection); float32, bfloat16 or float16.
        k, v: [B, L, H, D] or [B, L, H * D], of the same dtype.
        heads: H, if the tensors have three dimensions.
        scale: factor of the scores; None: 1 / sqrt(D).
        backend: ``"flash"``, ``"efficient"``, ``"cudnn"``, ``"math"`` (torch's), ``"xformers"``, ``"fa3"``,
            ``"reference"``, or ``"default"`` (torch chooses, nothing is measured). None: the backend that ``ops.use``
            names, else the one of the environment variable FASTDISTILL_ATTENTION, else the fastest.

    Returns:
        A tensor of q's shape and dtype. Second derivatives (``create_graph=True``) exist for ``"math"`` and
        ``"reference"``; the other backends refuse them.

    Raises:
        InputError: the shapes, dtypes or devices do not match, or the name of the backend is unknown.
        KernelError: the requested backend cannot run the call; the message gives the reason.
    """
    _check.tensors(q=q, k=k, v=v)
    flat = q.dim() == 3
    if flat:
        _check.whole(heads, "heads", "the number of heads, beside [B, N, H * D]")
        for tensor, argument in ((q, "q"), (k, "k"), (v, "v")):
            fits = tensor.dim() == 3 and tensor.shape[2] % (heads or 1) == 0
            _check.require(fits, argument, f"[B, tokens, a multiple of {heads} heads]", tuple(tensor.shape))
        q, k, v = (t.unflatten(2, (heads, -1)) for t in (q, k, v))
    _check.once(_checked, (q, k, v), None)
    if heads is not None:
        rule = f"the {q.shape[2]} heads of q, or None"
        _check.whole(heads, "heads", rule)
        _check.require(heads == q.shape[2], "heads", rule, heads)
    scale = _check.scale(scale, q.shape[3])
    name = _asked(backend)
    out = _choose(q, k, v, scale) if name is None else _run(name, q, k, v, scale)
    return out.flatten(2) if flat else out


def tune_attention(
    batch: int,
    tokens: int,
    heads: int,
    dim: int,
    *,
    keys: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    backward: bool = True,
) -> dict[str, Any]:
    """Measure the backends for one kind of call again and store the result, before a loop or a capture.

    Args:
        batch, tokens, heads, dim: B, N, H, D of ``attention``; ``keys``: L (None: N).
        backward: True measures forward and backward, False the forward only.

    Returns:
        ``{"backend": the fastest, "ms": {backend: milliseconds}, "refused": {backend: reason}}``

    Raises:
        InputError: this torch was not built for the device.
    """
    try:
        q = torch.empty(batch, tokens, heads, dim, dtype=dtype, device=device)
    except AssertionError as error:  # raised by a torch that was built without CUDA
        raise InputError.of("device", "one that torch can use here", f"{device} ({error})") from error
    k, v = (torch.empty(batch, keys or tokens, heads, dim, dtype=dtype, device=device) for _ in range(2))
    _checked((q, k, v))
    with table.measuring:
        result = measure(q, k, v, _check.scale(None, dim), backward, backends.candidates(q.device.type))
        table.remember(_key(*(*_kind(q, k, v)[:-1], backward)), result)
    return result


def _checked(tensors: tuple[Tensor, ...], _: Any = None) -> None:
    q, k, v = tensors
    _check.shape(q, "q", (None, None, None, None), "[B, N, H, D]")
    batch, heads, dim = q.shape[0], q.shape[2], q.shape[3]
    _check.dtype(q, "q", *_check.FLOATS)
    _check.shape(k, "k", (batch, None, heads, dim), f"[{batch}, L, {heads}, {dim}] beside q")
    _check.shape(v, "v", tuple(k.shape), f"the shape of k {tuple(k.shape)}")
    for tensor, name in ((k, "k"), (v, "v")):
        _check.dtype(tensor, name, q.dtype)
        _check.device(tensor, name, q.device, "q")


def _asked(backend: str | None) -> str | None:
    """The backend that the caller, ``ops.use`` or the environment names; names of other ops' kernels are ignored."""
    if backend is not None:
        _check.one_of(backend, "backend", NAMES)
        return backend
    if (name := forced()) in (*BACKENDS, REFERENCE):
        return name
    if name := os.environ.get(VARIABLE):
        _check.one_of(name, VARIABLE, NAMES)
        return name
    return None


def _run(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if not torch.compiler.is_compiling():
        OPS["attention"].calls[name] += 1
    if name == DEFAULT:
        return backends.default(q, k, v, scale)
    if name == REFERENCE:
        return reference.attention(q, k, v, scale)
    backend, device = BACKENDS.get(name), q.device.type
    if backend is None:
        raise KernelError(f"attention: there is no backend {name!r}")
    reason = backend.available(device) if device in backend.devices else f"it has none for {device}"
    if reason is None:
        try:
            return backend.run(q, k, v, scale)
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            reason = "torch has no kernel for it (its warnings say why)"
    raise KernelError(f"attention: backend {name!r} cannot run this call on {device}: {reason}")


def _choose(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if torch.compiler.is_compiling():
        fixed = torch.fx.experimental.symbolic_shapes.has_static_value
        if all(fixed(n) for t in (q, k, v) for n in (*t.shape, *t.stride())):
            return _run(_known(*_kind(q, k, v)), q, k, v, scale)
        return _run(DEFAULT, q, k, v, scale)
    tracing = torch._C._get_tracing_state() is not None  # torch.jit.trace, in which sizes are tensors
    if tracing or type(q.data) is not Tensor or q.device.type not in ("cpu", "cuda"):
        return _run(DEFAULT, q, k, v, scale)
    kind = _kind(q, k, v)
    key = _key(*kind)
    known = table.found(key)
    if known is None and _may_measure(q, k):
        with table.measuring:
            known = table.found(key)  # by now another thread may have measured it
            if known is None:
                known = measure(q, k, v, scale, kind[-1], backends.candidates(q.device.type))
                table.remember(key, known)
    if known is None:
        return _run(DEFAULT, q, k, v, scale)
    try:
        return _run(known["backend"], q, k, v, scale)
    except Exception as error:
        _pass_by(key, known, q, error)
    return _choose(q, k, v, scale)


def _pass_by(key: str, known: dict[str, Any], q: Tensor, error: Exception) -> None:
    """Send calls of this kind to the next backend if the fastest refuses a call that it accepted when it was measured
    (for example in another version); else raise."""
    name = known["backend"]
    if _failures.is_final(error):
        raise DeviceError(f"attention: backend {name!r} met an error of this or an earlier call: {error}") from error
    refused = isinstance(error, (KernelError, NotImplementedError, ImportError, AttributeError))
    capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()
    if name == DEFAULT or capturing or not (refused or _failures.reason(error)):
        raise error
    ms = {other: time for other, time in known["ms"].items() if other != name}
    fastest = min(ms, key=ms.__getitem__, default=DEFAULT)
    warnings.warn(
        f"attention: backend {name!r} cannot run a call that it was measured for; calls of this kind go to"
        f" {fastest!r}: {quoted(error)}",
        stacklevel=4,
    )
    table.remember(key, {"backend": fastest, "ms": ms, "refused": known.get("refused", {}) | {name: quoted(error)}})


@constant
def _known(*kind: Any) -> str:
    """The fastest of torch's backends (other kernels cannot be traced); called with constants during compilation."""
    known = table.found(_key(*kind)) or {"ms": {}}
    ms = {name: time for name, time in known["ms"].items() if name in backends.TORCH}
    return min(ms, key=ms.__getitem__, default=DEFAULT)


def _may_measure(q: Tensor, k: Tensor) -> bool:
    """False during graph capture, under a dispatch mode that records every operation, and for empty tensors."""
    capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()
    return q.numel() > 0 and k.numel() > 0 and not capturing and _get_current_dispatch_mode() is None


def _kind(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """What distinguishes the kinds of calls, as constants: the arguments of ``_key``."""
    packed = q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    strides = None if packed else (q.stride(), k.stride(), v.stride())
    backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return q.device, q.dtype, q.shape, k.shape[1], strides, backward


def _key(device: torch.device, *kind: Any) -> str:
    """The kind of a call: device, versions, candidates, shape, layout, dtype, with or without backward."""
    names = tuple(backends.candidates(device.type))
    return _named(device, torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), names, *kind)


@functools.lru_cache(4096)
def _named(
    device: torch.device,
    threads: int,
    deterministic: bool,
    names: tuple[str, ...],
    dtype: torch.dtype,
    shape: torch.Size,
    keys: int,
    strides: tuple[Any, ...] | None,
    backward: bool,
) -> str:
    where = f"{_processor()}, {threads} threads" if device.type != "cuda" else torch.cuda.get_device_name(device)
    layout = "contiguous" if strides is None else f"strides {list(strides)}"
    way = "forward and backward" if backward else "forward"
    mode = "deterministic" if deterministic else "any"
    versions = f"torch {torch.__version__}, cuda {torch.version.cuda}"
    sizes, kind = f"{tuple(shape)} to {keys} keys", str(dtype).removeprefix("torch.")
    return f"{where}; {versions}; {mode} of {', '.join(names)}; {sizes}; {layout}; {kind}; {way}"


@functools.cache
def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
