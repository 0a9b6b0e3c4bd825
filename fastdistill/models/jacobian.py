# SPDX-License-Identifier: Apache-2.0
"""Products with the Jacobian of a model's feature, without forming the Jacobian.

Forward mode gives J v at twice the cost of J^T u. If a model does not support it, J v is the derivative of J^T u with
respect to u, at about three times its cost.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fastdistill.diffusion.predictions import clean_and_noise, determines
from fastdistill.diffusion.prompts import Rows, check_prompts, prediction_like
from fastdistill.diffusion.schedule import PredictionType
from fastdistill.errors import InputError, described, quoted
from fastdistill.models.calling import Predictor
from fastdistill.models.fuse.form import is_fused
from fastdistill.models.sharding import sharded
from fastdistill.models.taps import feature, resolve
from fastdistill.ops import _check
from fastdistill.ops._sdpa import math_attention

Function = Callable[[Tensor], Tensor]
OUTPUT, CLEAN = "output", "x0"
_MOST_ROWS = 64  # rows per chunk on a CPU, where larger chunks are not faster

_without_forward_mode: WeakSet[Any] = WeakSet()
_bytes_of: WeakKeyDictionary[Any, dict[Any, int]] = WeakKeyDictionary()


class _Left(BaseException):
    """Ends a forward at its tap. It is no ``Exception``, because a model might catch that."""


class TapFunction:
    """x [B, *S] -> the feature [B, m] of a model at a tap, flattened; row i depends only on row i.

    The forward ends at the tap, so nothing after it is computed. The tapped module has a hook only during the call.

    Args:
        model: in eval mode, float32 or float64, neither fused nor compiled; called as its family requires.
        name: a module as in ``Taps``; ``output``: the prediction; ``x0``: x_0 computed from the prediction.
        timestep: what the model gets, a number or [B].
        prompt: rows [B, ...], a tensor of embeddings or banks by name.
        level: (signal, noise) of x, which ``x0`` needs.
        prediction_type: what the model predicts, for ``x0``.

    Attributes:
        shape: of one sample's feature before flattening; known after the first call.

    Raises:
        InputError: a name that is not a module (near matches are shown), a model without such products (with advice),
            arguments that do not fit together; from a call, a tap that did not fire.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        timestep: Tensor | float,
        prompt: Rows,
        *,
        level: tuple[float, float] | None = None,
        prediction_type: PredictionType = "epsilon",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError.of("model", "a torch.nn.Module", described(model))
        _check_model(model)
        if not isinstance(name, str):
            raise InputError.of("name", "the name of a module, output or x0", described(name))
        self._module = None if name in (OUTPUT, CLEAN) else resolve(model, [name])[0]
        if name == CLEAN and (level is None or not determines(prediction_type, *level)):
            raise InputError.of("level", "the (signal, noise) of x, from which x0 follows", level)
        self.model, self.name, self.level, self.prediction_type = model, name, level, prediction_type
        self._predict = Predictor(model)
        self.dtype = self._predict.dtype
        rows = prompt.values() if isinstance(prompt, Mapping) else [prompt]
        first = next(iter(rows), None)
        if not isinstance(first, Tensor) or first.ndim < 1:
            raise InputError.of("prompt", "rows [B, ...]", described(first))
        time = timestep if isinstance(timestep, Tensor) else torch.tensor(timestep)
        _check.require(time.ndim < 2, "timestep", "a number or [B]", tuple(time.shape))
        self._timestep = time.to(first.device).expand(len(first))
        _check.shape(self._timestep, "timestep", (len(first),), f"a number or [{len(first)}], one per row of prompt")
        self._prompt = prompt
        self.shape: tuple[int, ...] | None = None
        check_prompts(self._timestep[:, None], prompt, None, 1)

    def of_rows(self, index: Tensor) -> Self:
        """The function for these rows [b] int64 of the prompt, for batches of b samples."""
        made = copy.copy(self)
        made._timestep = self._timestep[index]
        if isinstance(self._prompt, Mapping):
            made._prompt = {name: bank[index] for name, bank in self._prompt.items()}
        else:
            made._prompt = self._prompt[index]
        return made

    def __len__(self) -> int:
        return len(self._timestep)

    def __call__(self, x: Tensor) -> Tensor:
        return self.feature(x).flatten(1)

    def feature(self, x: Tensor) -> Tensor:
        """[B, *shape], not flattened."""
        value = self._features(x, [self])[0]
        self.shape = tuple(value.shape[1:])
        return value

    def _features(self, x: Tensor, taps: Sequence[TapFunction]) -> list[Tensor]:
        """The feature of each tap of this model, from one forward, which ends at the last of them."""
        if self.model.training:
            raise InputError.of("model", "eval mode (model.eval())", "training mode")
        if len(x) != len(self):
            raise InputError.of("x", f"a batch of {len(self)}, as the prompt's", tuple(x.shape))
        thread = threading.get_ident()
        found: dict[str, Tensor] = {}
        modules = {tap.name: tap._module for tap in taps}
        early = None not in modules.values()

        def keep(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
            if threading.get_ident() == thread and name not in found:
                found[name] = feature(name, output, args, kwargs)
                if early and len(found) == len(modules):
                    raise _Left

        handles = [
            module.register_forward_hook(
                lambda _, args, kwargs, output, name=name: keep(name, args, kwargs, output), with_kwargs=True
            )
            for name, module in modules.items()
            if module is not None
        ]
        try:
            out = self._predict(x, self._timestep, self._prompt)
            for name in modules.keys() & {OUTPUT, CLEAN}:
                found[name] = self._prediction(name, x, out)
        except _Left:
            pass
        finally:
            for handle in handles:
                handle.remove()
        for name in modules:
            if name not in found:
                raise InputError.of("name", "a module that runs in a forward of the model", name)
            if found[name].ndim < 1 or len(found[name]) != len(x):
                raise InputError.of("name", f"a feature [{len(x)}, ...] at {name}", tuple(found[name].shape))
        return [found[tap.name] for tap in taps]

    def _prediction(self, name: str, x: Tensor, out: object) -> Tensor:
        out = prediction_like(x, out)
        if name == OUTPUT:
            return out
        assert self.level is not None
        return clean_and_noise(x, out, *self.level, self.prediction_type)[0]


class TapFunctions(TapFunction):
    """x [B, *S] -> the features of several taps, concatenated to [B, m_1 + m_2 + ...], from one forward.

    taps: functions of the same model, time, prompt and level.
    """

    def __init__(self, taps: Sequence[TapFunction]) -> None:
        vars(self).update(vars(taps[0]))
        self.taps, self.name = tuple(taps), ", ".join(tap.name for tap in taps)

    def features(self, x: Tensor) -> list[Tensor]:
        """The feature of each tap, [B, *shape]."""
        return self._features(x, self.taps)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([value.flatten(1) for value in self.features(x)], 1)


def share(f: Function, x: Tensor) -> float:
    """FLOPs (of matrix products and convolutions) that ``f`` evaluates, as a share of its model's; 1 for a function."""
    if not isinstance(f, TapFunction):
        return 1.0
    one = torch.zeros(1, dtype=torch.int64, device=x.device)
    whole = copy.copy(f)
    whole.name, whole._module = OUTPUT, None
    counts = []
    for function in (f, whole):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            at(function, one)(x[:1])
        counts.append(counter.get_total_flops())
    return counts[0] / counts[1] if counts[1] else 1.0


def jvp(f: Function, x: Tensor, V: Tensor, *, chunk: int | None = None) -> Tensor:
    """J V [B, m, k] with J = df/dx at x, in forward mode; if ``f`` has none, by a double VJP, with a warning.

    Args:
        f: a ``TapFunction``, or any function [b, *S] -> [b, m] that treats all rows equally and independently.
        x: [B, *S] float32 or float64, the dtype of the model. V: [B, n, k] in that dtype; n: elements of a sample.
        chunk: samples per call, out of the B k into which the products are folded; None: as many as fit into the
            memory, measured once.

    Raises:
        InputError: shapes or dtypes that do not fit, a feature that does not depend on x, a model that supports neither
            way of differentiation.
    """
    _check_products(f, x, V, "V", x[0].numel() if x.ndim > 1 and len(x) else 0)
    return _chunked(_forward, f, x, V, chunk)


def vjp(f: Function, x: Tensor, U: Tensor, *, chunk: int | None = None) -> Tensor:
    """J^T U [B, n, k] for U [B, m, k], by one backward per vector; other arguments as in ``jvp``."""
    _check_products(f, x, U, "U", None)
    return _chunked(_backward, f, x, U, chunk)


def at(f: Function, index: Tensor) -> Function:
    """``f`` for these rows of its batch."""
    return f.of_rows(index) if isinstance(f, TapFunction) else f


def check_input(f: Function, x: Tensor) -> None:
    """InputError unless x is a batch for ``f``, in a precision suitable for Jacobians."""
    _check.valued(x=x)
    dtypes = (f.dtype,) if isinstance(f, TapFunction) else (torch.float32, torch.float64)
    if x.ndim < 2 or len(x) == 0 or x.dtype not in dtypes:
        rule = f"{' or '.join(str(dtype) for dtype in dtypes)} [B, ...]" + " as the model" * isinstance(f, TapFunction)
        raise InputError.of("x", rule, f"{x.dtype} {tuple(x.shape)}")
    if isinstance(f, TapFunction):
        _check_model(f.model)
        _check.require(len(f) == len(x), "x", f"a batch of {len(f)}, as the prompt's", tuple(x.shape))


def _check_products(f: Function, x: Tensor, vectors: Tensor, argument: str, size: int | None) -> None:
    check_input(f, x)
    _check.valued(**{argument: vectors})
    _check.dtype(vectors, argument, x.dtype)
    _check.shape(vectors, argument, (len(x), size, None), f"[{len(x)}, {size or 'm'}, k], vectors of every sample")


def _check_model(model: nn.Module) -> None:
    """InputError, with advice, for a model whose Jacobian cannot be computed, or not precisely."""
    for name, module in model.named_modules():
        where = name or "the model"
        if is_fused(module):
            rule = "a model without fused ops, which have no Jacobian products: fastdistill.unfuse(model)"
            raise InputError.of("model", rule, f"{where} fused")
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:
            raise InputError.of("model", "a model that is not compiled (model._orig_mod is)", f"{where} compiled")
        if getattr(module, "gradient_checkpointing", False) is True:
            rule = "a model without gradient checkpointing (model.disable_gradient_checkpointing())"
            raise InputError.of("model", rule, f"{where} with it")
    if found := sharded(model):
        raise InputError.of("model", "a model that is not sharded", found)
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            rule = "float32 or float64 (model.float()), as half precision spoils a Jacobian"
            raise InputError.of("model", rule, f"{parameter.dtype} in {name}")


@contextlib.contextmanager
def _products(x: Tensor) -> Iterator[None]:
    """Math attention, which supports both kinds of derivatives; autocast off; not in inference mode."""
    with torch.inference_mode(False), torch.autocast(x.device.type, enabled=False), math_attention():
        yield


def _chunked(product: Callable[..., Tensor], f: Function, x: Tensor, vectors: Tensor, chunk: int | None) -> Tensor:
    """The products, folded into the batch and computed chunk by chunk."""
    B, size, k = vectors.shape
    if chunk is not None:
        _check.whole(chunk, "chunk", "at least 1")
    folded = vectors.transpose(1, 2).reshape(B * k, size)
    found: list[Tensor] = []
    start = 0
    with _products(x):
        step = chunk or (min(_fitting(f, x), B * k) if k else 1)
        while start < B * k:
            stop = min(start + step, B * k)
            index = torch.arange(start, stop, device=x.device) // k
            try:
                made = product(at(f, index), x.detach()[index].clone(), folded[start:stop].detach())
            except torch.OutOfMemoryError:
                if chunk is not None or stop - start == 1:
                    raise
                step = (stop - start + 1) // 2
                continue
            found.append(made)
            start = stop
    if not found:
        return vectors.new_zeros(B, 0, 0)
    return torch.cat(found).reshape(B, k, -1).transpose(1, 2)


def _forward(f: Function, x: Tensor, v: Tensor) -> Tensor:
    """J v for each row, in forward mode if it is supported."""
    owner = _owner(f)
    if owner not in _without_forward_mode:
        try:
            with torch.no_grad(), forward_ad.dual_level():
                y = f(forward_ad.make_dual(x, v.reshape(x.shape)))  # type: ignore[no-untyped-call]
                return _derivative(f, forward_ad.unpack_dual(y).tangent)  # type: ignore[no-untyped-call]
        except NotImplementedError as error:
            if "forward" not in str(error):
                raise
            _without_forward_mode.add(owner)
            reason = quoted(error)
            warnings.warn(f"jvp: computed by two VJPs, as there is no forward mode ({reason})", stacklevel=4)
    return _twice_backward(f, x, v)


def _twice_backward(f: Function, x: Tensor, v: Tensor) -> Tensor:
    """J v as the derivative of <J^T u, v> with respect to u, at any u."""
    with torch.enable_grad():
        y = f(x.requires_grad_())
        u = torch.zeros_like(y, requires_grad=True)
        try:
            g = _derivative(f, _gradient(y, x, u, create_graph=True))
            return _derivative(f, _gradient(g, u, v.reshape(x.shape)))
        except (NotImplementedError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            rule = "a model with forward mode, or that can be differentiated twice (the attention of torch, say)"
            raise InputError.of("model", rule, quoted(error)) from error


def _backward(f: Function, x: Tensor, u: Tensor) -> Tensor:
    with torch.enable_grad():
        y = f(x.requires_grad_())
        if y.shape != u.shape:
            raise InputError.of("U", f"vectors of the feature, [B, {y.shape[1]}, k]", f"[B, {u.shape[1]}, k]")
        return _derivative(f, _gradient(y, x, u)).flatten(1)


def _gradient(y: Tensor, x: Tensor, u: Tensor, create_graph: bool = False) -> Tensor | None:
    if not y.requires_grad:
        return None
    return torch.autograd.grad(y, x, u, create_graph=create_graph, allow_unused=True)[0]


def _derivative(f: Function, value: Tensor | None) -> Tensor:
    if value is None:
        raise InputError.of("f", "a function that depends on x", getattr(f, "name", described(f)))
    return value


def _owner(f: Function) -> Any:
    return f.model if isinstance(f, TapFunction) else f


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the outputs of a forward's ops, without views: a lower limit of what its graph can hold."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.bytes += sum(t.nbytes for t in tree_leaves(out) if isinstance(t, Tensor))
        return out


def _fitting(f: Function, x: Tensor) -> int:
    """Samples per chunk so that half of the free memory is enough, with twice the bytes of a forward per sample."""
    from fastdistill.plan.cards import available  # imported here, because it loads the planner

    known = _bytes_of.setdefault(_owner(f), {})
    key = (getattr(f, "name", ""), tuple(x.shape[1:]), x.dtype)
    if key not in known:
        first = torch.zeros(1, dtype=torch.int64, device=x.device)
        with torch.no_grad(), _Counter() as counter:
            at(f, first)(x.detach()[first])
        known[key] = max(1, 2 * counter.bytes)
    most = 4096 if x.is_cuda else _MOST_ROWS
    return max(1, min(available(x.device) // 2 // known[key], most))
