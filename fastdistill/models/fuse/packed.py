# SPDX-License-Identifier: Apache-2.0
"""Packs the weights of queries, keys and values of a frozen model, so that one product reads them without a copy.

``products.projected`` concatenates the three weights in every call, so each remains a parameter with its own memory. In
a frozen model they can stay concatenated: the parameters are then slices of one tensor, with the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, cat, nn

from fastdistill.models.fuse.form import is_fused

_GROUPS = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))


def pack(model: nn.Module) -> Callable[[], None]:
    """Pack the projections of fused attentions, in place; returns a function that gives each its own memory again.
    Names, parameters and values do not change."""
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
    """Groups of weights, and of biases, that one product can read."""
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
    """Several tensors concatenated along the first dimension, without a copy if they are adjacent in memory."""
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
