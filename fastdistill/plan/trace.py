# SPDX-License-Identifier: Apache-2.0
"""What a step allocates and computes, recorded by a dispatch mode: on meta tensors for a plan, on real ones for tests.

Memory means live tensor storages. Memory that an operator allocates and frees internally (workspaces of libraries) is
not recorded.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

OTHER = "activations"
_EMPTY = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}  # run no kernels
_aten = torch.ops.aten


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within ``with``, records the size of every storage that an operator returns, from then until it is freed.

    Storages have a label: the one given to ``hold`` (for existing storages, or to label them later), else
    ``"activations"``. Operators have the phase that was last set with ``enter``.

    Args:
        unit: samples per forward: a prime that divides no other size, so that sizes that grow with the samples can be
            recognized. 0: they are not distinguished.
        parts: number of forwards per step.

    Attributes:
        sizes, labels, origins: of each storage its bytes, its label and the phase in which it was allocated.
        events: the number of a storage, twice: where it is allocated, and as ``~number`` where it is freed.
        work: for each operator that computes something (phase, floating-point operations, bytes read and written
            independently of the samples, and for the samples). A multiplication and an addition are two operations;
            they are counted for attention and for the operators in torch's flop counter.
    """

    def __init__(self, unit: int = 0, parts: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.unit, self.parts = unit, parts
        self.sizes: list[int] = []
        self.labels: list[str] = []
        self.origins: list[str] = []
        self.events: list[int] = []
        self.work: list[tuple[str, int, int, int]] = []
        self._phase = ""
        self._live: dict[int, tuple[int, weakref.ref[Any]]] = {}  # number and a reference, by the storage's address

    def enter(self, phase: str) -> None:
        """The following operators belong to this phase."""
        self._phase = phase

    def hold(self, label: str, tensors: Iterable[Tensor]) -> None:
        """Label the storages of these tensors, new or known."""
        for tensor in tensors:
            number = self._number(tensor)
            if number is not None:
                self.labels[number] = label

    def end(self) -> None:
        """Stop recording, also of freed storages."""
        self._live.clear()

    def live(self, sizes: np.ndarray | None = None) -> np.ndarray:
        """[events] int64: bytes of live storages after each event; ``sizes`` replaces the storages' own sizes."""
        numbers = np.asarray(self.events)
        freed = numbers < 0
        own = np.asarray(self.sizes if sizes is None else sizes, dtype=np.int64)[np.where(freed, ~numbers, numbers)]
        return np.cumsum(np.where(freed, -own, own))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        norm = _NORMS.get(func) if args and isinstance(args[0], Tensor) and args[0].is_meta else None
        result = func(*args, **kwargs) if norm is None else norm(*args, **kwargs)
        before = len(self.sizes)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in results:
            self._number(tensor)
        made = len(self.sizes) > before
        if func.__name__.partition(".")[0] in _EMPTY:
            return result
        if made or any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments):
            self._note(func, args, kwargs, result, results if made else [])
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any, made: list[Tensor]) -> None:
        """Record what an operator (not a view) computes and moves."""
        updates = func.namespace == "fastdistill" and func.__name__.split(".")[0] in ("adamw_ema", "grad_square_sum")
        tensors = [(tensor, 1) for tensor in made]
        for argument, value in zip(func._schema.arguments, (*args, *kwargs.values()), strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            times = 1 + (written and (updates or func.namespace != "fastdistill"))  # or only written
            tensors += [(leaf, times) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        grown = sum(t.nbytes * times for t, times in tensors if self.unit and t.numel() % self.unit == 0)
        moved = sum(t.nbytes * times for t, times in tensors)
        self.work.append(
            ("optimizer" if updates else self._phase, _flops(func, args, kwargs, result), moved - grown, grown)
        )

    def _number(self, tensor: Tensor) -> int | None:
        """The number of a tensor's storage; a new storage gets one."""
        if tensor.layout != torch.strided or hasattr(tensor, "__tensor_flatten__"):
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        if (known := self._live.get(key)) is not None:
            return known[0]
        number = len(self.sizes)
        self.sizes.append(storage.nbytes())
        self.labels.append(OTHER)
        self.origins.append(self._phase)
        self.events.append(number)
        self._live[key] = number, weakref.ref(storage, self._freed(key, number))
        return number

    def _freed(self, key: int, number: int) -> Callable[[Any], None]:
        def freed(_: Any) -> None:
            self.events.append(~number)
            del self._live[key]

        return freed


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    if func.namespace == "fastdistill":
        name = func.__name__.split(".")[0]
        if name.startswith("cross_attention"):
            q, k = args[0], args[1]
            products = 5 if name.endswith("backward") else 2
            return int(2 * products * q.shape[0] * q.shape[1] * k.shape[1] * q.shape[2] * q.shape[3])
        return 0
    if func is _aten._scaled_dot_product_flash_attention_for_cpu.default:
        func = _aten._scaled_dot_product_flash_attention.default
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


def _group_norm(x: Tensor, weight: Any, bias: Any, N: int, C: int, HxW: int, group: int, eps: float) -> Any:
    return torch.empty_like(x), x.new_empty(N, group), x.new_empty(N, group)


def _layer_norm(x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    rows = (*x.shape[: x.dim() - len(shape)], *[1] * len(shape))
    return torch.empty_like(x), x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


def _norm_backward(grad: Tensor, x: Tensor, *rest: Any) -> Any:
    """For both norms: the gradients of input, weight and bias that the mask selects."""
    channels = rest[4] if isinstance(rest[3], int) else rest[0]
    made = (torch.empty_like(x), x.new_empty(channels), x.new_empty(channels))
    return tuple(gradient if wanted else None for gradient, wanted in zip(made, rest[-1], strict=True))


#: Operators that torch decomposes on meta tensors but on no device.
_NORMS: dict[Any, Callable[..., Any]] = {
    _aten.native_group_norm.default: _group_norm,
    _aten.native_layer_norm.default: _layer_norm,
    _aten.native_group_norm_backward.default: _norm_backward,
    _aten.native_layer_norm_backward.default: _norm_backward,
}


@contextlib.contextmanager
def attention_as(device: str) -> Iterator[None]:
    """Inside, torch's attention on meta tensors is that of a type of device that does not store the matrix of
    scores."""
    original = F.scaled_dot_product_attention

    def attend(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _attention(device, query, *args, **kwargs) if query.is_meta else original(query, *args, **kwargs)

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def _attention(
    device: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    q, k, v, mask = query, key, value, attn_mask
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype)
    if device == "cpu":
        attend = _aten._scaled_dot_product_flash_attention_for_cpu
        results = attend(q, k, v, dropout_p, is_causal, attn_mask=mask, scale=scale)
    elif mask is None and q.dtype != torch.float32:
        results = _aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)
    else:
        mask = None if mask is None else mask.expand(*q.shape[:-1], k.shape[-2])
        grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
        attend = _aten._scaled_dot_product_efficient_attention
        results = attend(q, k, v, mask, grad, dropout_p, is_causal, scale=scale)
    out: Tensor = results[0]
    return out


def phases(trace: Trace, teacher: nn.Module, student: nn.Module) -> list[Any]:
    """Hooks that tell a trace the phases: the forwards of both models; what follows the student's is the backward."""
    return [
        teacher.register_forward_pre_hook(lambda *_: trace.enter("teacher")),
        teacher.register_forward_hook(lambda *_: trace.enter("step")),
        student.register_forward_pre_hook(lambda *_: trace.enter("student")),
        student.register_forward_hook(lambda *_: trace.enter("backward")),
    ]
