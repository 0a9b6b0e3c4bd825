# SPDX-License-Identifier: Apache-2.0
"""Weights of queries, keys and values of a frozen model, side by side in memory: one product reads them without a copy.

``products.projected`` puts the three weights together in every call, so that each stays a parameter with memory of
its own. A frozen model can have them together for good: its parameters are then parts of one tensor, with the same
values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, cat, nn

from fastdistill.models.fuse.form import is_fused

_GROUPS = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))


def pack(model: nn.Module) -> Callable[[], None]:
    """Put the projections of fused attentions side by side, in place; returns what gives each its own memory again.
    Names, parameters and values stay as they are."""
    uses = [id(p) for module in model.modules() for p in module._parameters.values() if p is not None]
    moved: list[nn.Parameter] = []
    for parameters in _groups(model):
        if any(uses.count(id(p)) > 1 for p in parameters) or len({_kind(p) for p in parameters}) > 1:
            continue
        together = cat([p.detach() for p in parameters])
        for p, part in zip(parameters, together.split([len(p) for p in parameters]), strict=True):
            p.data = part
        moved += parameters

    def unpack() -> None:
        for p in moved:
            p.data = p.data.clone()

    return unpack


def _groups(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Weights, and biases, that one product may read."""
    for attention in filter(is_fused, model.modules()):
        for names in _GROUPS:
            layers: list[Any] = [getattr(attention, name, None) for name in names]
            if not all(type(layer) is nn.Linear for layer in layers):
                continue
            for kind in ("weight", "bias"):
                parameters = [getattr(layer, kind) for layer in layers]
                if all(map(_frozen, parameters)):
                    yield parameters


def _frozen(p: Any) -> bool:
    return type(p) is nn.Parameter and not (p.requires_grad or p.is_inference()) and p.is_contiguous()


def _kind(p: Tensor) -> Any:
    return p.dtype, p.device, p.shape[1:]


def side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor of several along their first dimension: the memory that they are in where they lie side by side."""
    first = tensors[0]
    if torch.compiler.is_compiling() or not _side_by_side(tensors):
        return cat(tuple(tensors))
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())


def _side_by_side(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0]
    memory, end = first.untyped_storage()._cdata, first.storage_offset()
    for t in tensors:
        if t.untyped_storage()._cdata != memory or t.storage_offset() != end or not t.is_contiguous():
            return False
        if t.dtype != first.dtype or t.shape[1:] != first.shape[1:]:
            return False
        end += t.numel()
    return True
