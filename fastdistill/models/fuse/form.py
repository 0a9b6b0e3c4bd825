# SPDX-License-Identifier: Apache-2.0
"""A fused form: functions that replace methods of a block's class, on the instance.

The class does not change, so lookups by class or name still find the block. A fused function skips the calls of some
submodules. In every call it checks whether one of them has changed: another class, a patched or wrapped ``forward``
(hooks of diffusers or accelerate, offloading), hooks of torch. If so, it calls the class's own method instead.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from diffusers.models.attention import FeedForward
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    SD35AdaLayerNormZeroX,
)
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

Part = tuple[str, Any, type]  # its name in the block, the module, and the class whose forward a fused form computes
_MARK = "_fastdistill_fused"


class Form(NamedTuple):
    """``refuse`` says why a block, as it is now, cannot run fused; None: it can."""

    refuse: Callable[[Any], str | None]
    methods: dict[str, Callable[..., Any]]

    def put_on(self, block: nn.Module) -> None:
        block.__dict__[_MARK] = True
        block.__dict__["_replicate_for_data_parallel"] = functools.partial(_replicate, block)
        for name, method in self.methods.items():
            block.__dict__[name] = functools.partial(method, block)

    def take_off(self, block: nn.Module) -> None:
        """Removes the fused functions. One that a hook has wrapped since then passes its calls to the class's
        method."""
        del block.__dict__[_MARK], block.__dict__["_replicate_for_data_parallel"]
        for name, method in self.methods.items():
            if _function(block.__dict__.get(name)) is method:
                del block.__dict__[name]

    def replaced(self, block: nn.Module) -> str | None:
        """The name of a method that something else has set on the instance; None: there is none."""
        return next((name for name in self.methods if name in block.__dict__), None)


def _replicate(block: nn.Module) -> nn.Module:
    """For ``DataParallel``: a copy whose functions refer to the copy."""
    replica: nn.Module = type(block)._replicate_for_data_parallel(block)
    for name, value in block.__dict__.items():
        if isinstance(value, functools.partial) and value.args == (block,):
            replica.__dict__[name] = functools.partial(value.func, replica)
    return replica


def _function(value: Any) -> Any:
    return value.func if isinstance(value, functools.partial) else None


def is_fused(block: nn.Module) -> bool:
    return _MARK in block.__dict__


def instead_of(
    kind: type, name: str, refuse: Callable[[Any], str | None]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a fused function that replaces this method of the class whenever the block can run it."""
    original = own(kind, name)

    def decorate(fused: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fused)
        def call(block: Any, *args: Any, **kwargs: Any) -> Any:
            now = getattr(type(block), name)
            if now is not original or _MARK not in block.__dict__ or refuse(block) is not None:
                return now(block, *args, **kwargs)
            return fused(block, *args, **kwargs)

        return call

    return decorate


def own(kind: type, name: str) -> Any:
    """A method as the class was written; None if it has been replaced from another file."""
    method = getattr(kind, name)
    here = getattr(inspect.unwrap(kind.__init__), "__code__", None)  # type: ignore[misc]
    code = getattr(method, "__code__", None)
    return None if code and here and code.co_filename != here.co_filename else method


_FORWARD: dict[type, Any] = {
    kind: own(kind, "forward")
    for kind in (
        nn.GroupNorm, nn.LayerNorm, nn.SiLU, nn.Conv2d, nn.Linear, FeedForward, AdaLayerNormContinuous,
        AdaLayerNormZero, AdaLayerNormZeroSingle, SD35AdaLayerNormZeroX,
    )
}  # fmt: skip


def altered(parts: Iterable[Part]) -> str | None:
    """Why the call of one of these submodules must not be skipped; None: all can be."""
    if _has_any_global_hook():
        return "there are hooks on all modules"
    for name, module, kind in parts:
        if type(module) is not kind:
            return f"its {name} is {type(module).__name__}, not {kind.__name__}"
        if "forward" in module.__dict__ or kind.forward is not _FORWARD[kind]:
            return f"the forward of its {name} has been replaced"
        m: Any = module
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return f"its {name} has hooks"
    return None
