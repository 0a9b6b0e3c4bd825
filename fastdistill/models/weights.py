# SPDX-License-Identifier: Apache-2.0
"""The weights of a model, also quantized ones, as plain tensors."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.data.fingerprint import sha256_of_tensors


def plain_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The entries of a ``state_dict`` as plain tensors, to hash or to compare.

    Tensor subclasses of several tensors (torchao) are split into these; torch's own quantized tensors into integers,
    scales and zero points; tuples (such as the packed weights of ``torch.ao`` layers), lists and dicts into their
    elements. Numbers become tensors; other values (a dtype, None) are left out.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        found.update(_plain(name, value))
    return found


def weights_hash(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Hash of the tensors of a model's ``state_dict``, floating-point ones as ``dtype`` (None: as they are)."""
    tensors = plain_tensors(model.state_dict())
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    return sha256_of_tensors(tensors)


def quantized(model: nn.Module) -> bool:
    """Whether some weights of a model are not plain floating-point tensors, so that they cannot be copied, and the
    parameters do not show their number."""
    integers = any(not p.is_floating_point() and not p.is_complex() for p in model.parameters())
    return integers or any(isinstance(value, tuple) or _packed(value) for value in model.state_dict().values())


def storage(tensor: Tensor) -> Hashable:
    """Identifies the memory of a tensor, which others can share; its ``id`` if it has no memory of its own."""
    if tensor.is_meta or not tensor.numel() or tensor.layout != torch.strided or hasattr(tensor, "__tensor_flatten__"):
        return id(tensor)
    return tensor.device, tensor.untyped_storage().data_ptr()


def memory(tensor: Tensor) -> Hashable:
    """Identifies the position of a tensor in memory: equal for two tensors only if they are the same."""
    if isinstance(place := storage(tensor), int):
        return place
    return place, tensor.storage_offset(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def shared(model: nn.Module, other: nn.Module) -> dict[int, Tensor]:
    """The parameters of ``other`` that share the memory of ``model``'s, by the ``id`` of the latter."""
    places = {memory(p): p for p in other.parameters()}
    return {id(p): places[where] for p in model.parameters() if (where := memory(p)) in places}


def _packed(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_quantized or hasattr(value, "__tensor_flatten__"))


def _plain(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        for inner in value.__tensor_flatten__()[0]:
            yield from _plain(f"{name}.{inner}", getattr(value, inner))
    elif isinstance(value, Tensor) and value.is_quantized:
        yield f"{name}.integers", value.int_repr()
        per_channel = value.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams)
        yield from _plain(f"{name}.scales", value.q_per_channel_scales() if per_channel else value.q_scale())
        yield from _plain(f"{name}.zeros", value.q_per_channel_zero_points() if per_channel else value.q_zero_point())
    elif isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple | list | Mapping):
        for key, element in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _plain(f"{name}[{key!r}]", element)
    elif isinstance(value, bool | int | float):
        yield name, torch.tensor(value, device="cpu")
