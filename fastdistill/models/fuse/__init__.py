# SPDX-License-Identifier: Apache-2.0
"""``fuse``: fused ops inside of a diffusers model, in place and reversible.

A block's class is swapped for a subclass of it with another ``forward``; its parameters, buffers, hooks and name stay.
So state_dict keys, pickles, taps that were resolved before, gradient checkpointing and ``isinstance`` are as they were.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from fastdistill.errors import InputError
from fastdistill.models.fuse.attention import FusedAttnProcessor, FusedJointAttnProcessor
from fastdistill.models.fuse.convolutional import FusedResnetBlock2D, FusedTransformer2DModel
from fastdistill.models.fuse.transformer import FusedBasicTransformerBlock, FusedGEGLU, FusedJointTransformerBlock
from fastdistill.models.sharding import sharded

_FUSED: dict[type, Any] = {
    ResnetBlock2D: FusedResnetBlock2D,
    Transformer2DModel: FusedTransformer2DModel,
    BasicTransformerBlock: FusedBasicTransformerBlock,
    JointTransformerBlock: FusedJointTransformerBlock,
    GEGLU: FusedGEGLU,
    AttnProcessor2_0: FusedAttnProcessor,
    JointAttnProcessor2_0: FusedJointAttnProcessor,
}
_ORIGINAL = {fused: original for original, fused in _FUSED.items()}


class Swap(NamedTuple):
    """One block: the module's name in the model, its class (or its attention processor's) before, and why it was left
    as it is; None where it was swapped."""

    name: str
    kind: str
    reason: str | None

    @property
    def swapped(self) -> bool:
        return self.reason is None


def fuse(model: nn.Module) -> list[Swap]:
    """Swap fused ops into a diffusers model, in place.

    ``ResnetBlock2D``, ``Transformer2DModel``, ``BasicTransformerBlock`` (U-Nets, DiT, PixArt), SD3's
    ``JointTransformerBlock``, ``GEGLU`` and their attention processors. Blocks of other classes, and subclasses of
    these, stay as they are. U-Nets stay in channels_last throughout if they are in it:
    ``model.to(memory_format=torch.channels_last)``. Fusing a fused model again only returns the list; ``unfuse``
    restores it.

    Returns:
        One ``Swap`` a candidate, in the model's order: what was swapped, and what was not and why.

    Raises:
        InputError: no module, or one that is sharded already (fuse first, then shard).
    """
    _check_module(model)
    if where := sharded(model):
        raise InputError.of("model", "a model that is not sharded yet: fuse first, then shard", where)
    swaps = []
    for name, module in model.named_modules():
        if module is not model and _root(type(module)) is not None:
            swaps.append(_swap(name, module))
        if isinstance(module, Attention):
            swaps.append(_swap(name, module.processor))
    return swaps


def unfuse(model: nn.Module) -> int:
    """Undo ``fuse``: every block gets its own class back.

    Returns:
        How many blocks and attention processors did; 0 for a model that is not fused.

    Raises:
        InputError: no module.
    """
    _check_module(model)
    count = 0
    for module in model.modules():
        for part in (module, getattr(module, "processor", None)):
            if type(part) in _ORIGINAL:
                part.__class__ = _ORIGINAL[type(part)]
                count += 1
    return count


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise InputError.of("model", "a module (of a pipeline, its unet or transformer)", type(model).__name__)


def _root(kind: type) -> type | None:
    """The class of the table that this is, or is a subclass of."""
    return next((base for base in kind.__mro__ if base in _FUSED), None)


def _swap(name: str, part: Any) -> Swap:
    kind = type(part)
    if kind in _ORIGINAL:
        return Swap(name, _ORIGINAL[kind].__name__, None)
    if kind not in _FUSED:
        root = _root(kind)
        reason = f"a subclass of {root.__name__} may do something else" if root else "no fused form of it"
        return Swap(name, kind.__name__, reason)
    reason = _FUSED[kind].refuse(part)
    if reason is None:
        part.__class__ = _FUSED[kind]
    return Swap(name, kind.__name__, reason)
