# SPDX-License-Identifier: Apache-2.0
"""``fuse``: fused ops inside a diffusers model, in place and reversible.

A block instance gets another ``forward``; its class, parameters, buffers, hooks and name do not change. Therefore
state_dict keys, pickles, existing taps, gradient checkpointing and lookups by class in diffusers work as before.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.sana_transformer import GLUMBConv, SanaTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from fastdistill.errors import InputError
from fastdistill.models.fuse import attention, convolutional, flux, transformer
from fastdistill.models.fuse.form import Form, is_fused
from fastdistill.models.sharding import sharded

_FORMS: dict[type, Form] = {
    ResnetBlock2D: convolutional.RESNET,
    Upsample2D: convolutional.UPSAMPLE,
    CrossAttnUpBlock2D: convolutional.UP_WITH_ATTENTION,
    UpBlock2D: convolutional.UP,
    nn.GroupNorm: convolutional.OUT_NORM,
    Transformer2DModel: convolutional.TRANSFORMER,
    BasicTransformerBlock: transformer.BASIC,
    JointTransformerBlock: transformer.JOINT,
    SanaTransformerBlock: transformer.SANA,
    FluxTransformerBlock: flux.DOUBLE,
    FluxSingleTransformerBlock: flux.SINGLE,
    GEGLU: transformer.GATED,
    GLUMBConv: Form(lambda _: "there is no op for its depthwise convolution and gate", {}),
    Attention: attention.FORM,
    FluxAttention: flux.ATTENTION,
}


class Swap(NamedTuple):
    """One block: the module's name in the model, its class (an attention's: that of its processor), and why it does not
    run fused; None if it does."""

    name: str
    kind: str
    reason: str | None

    @property
    def swapped(self) -> bool:
        return self.reason is None


def fuse(model: nn.Module) -> list[Swap]:
    """Swap fused ops into a diffusers model, in place.

    ``ResnetBlock2D``, ``Upsample2D``, ``Transformer2DModel``, ``BasicTransformerBlock`` (U-Nets, DiT, PixArt), SD3's
    ``JointTransformerBlock``, ``FluxTransformerBlock``, ``FluxSingleTransformerBlock``, ``SanaTransformerBlock``,
    ``GEGLU``, and attentions with a processor ``AttnProcessor2_0``, ``JointAttnProcessor2_0``, ``FluxAttnProcessor`` or
    ``SanaAttnProcessor2_0``. Blocks of other classes, subclasses of these, and blocks whose norms or ``forward`` were
    patched or have hooks stay as they are. A block that is changed later (other processors, hooks, offloading) runs
    the code of its class again. U-Nets stay in channels_last throughout if they are in it:
    ``model.to(memory_format=torch.channels_last)``. Fusing a fused model again returns the list of what runs fused
    now; ``unfuse`` restores it. If nothing was fused, a warning says so.

    Returns:
        One ``Swap`` per candidate, in the model's order: what was swapped, and what was not and why.

    Raises:
        InputError: no module, or one that is sharded already (fuse first, then shard).
    """
    _check_module(model)
    if where := sharded(model):
        raise InputError.of("model", "a model that is not sharded yet: fuse first, then shard", where)
    swaps = [_swap(name, module) for name, module in model.named_modules() if _is_candidate(name, module)]
    if not any(swap.swapped for swap in swaps):
        reasons = "; ".join(dict.fromkeys(f"{s.kind}: {s.reason}" for s in swaps))
        names = ", ".join(kind.__name__ for kind, form in _FORMS.items() if form.methods)
        warnings.warn(
            f"fuse: nothing in {type(model).__name__} was fused ({reasons or f'it has no {names} of diffusers'})",
            stacklevel=2,
        )
    return swaps


def unfuse(model: nn.Module) -> int:
    """Undo ``fuse``: every block runs its class's own code again.

    Returns:
        How many blocks and attentions do; 0 for a model that is not fused.

    Raises:
        InputError: no module.
    """
    _check_module(model)
    fused = [module for module in model.modules() if is_fused(module)]
    for module in fused:
        root = _root(module)
        assert root is not None
        _FORMS[root].take_off(module)
    return len(fused)


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise InputError.of("model", "a module (of a pipeline, its unet or transformer)", type(model).__name__)


def _root(module: nn.Module) -> type | None:
    """The class of the table that this is of, or of a subclass of."""
    return next((base for base in type(module).__mro__ if base in _FORMS), None)


def _is_candidate(name: str, module: nn.Module) -> bool:
    """Group norms are parts of the blocks, but for the last of a U-Net."""
    root = _root(module)
    return root is not None and (root is not nn.GroupNorm or name.rpartition(".")[2] == "conv_norm_out")


def _swap(name: str, module: nn.Module) -> Swap:
    root = _root(module)
    assert root is not None
    form, kind = _FORMS[root], type(module)
    attends = kind in (Attention, FluxAttention)
    called = type(module.processor).__name__ if attends else kind.__name__
    if kind is not root and not is_fused(module):
        return Swap(name, called, f"a subclass of {root.__name__} may do something else")
    reason = form.refuse(module)
    if not is_fused(module):
        if other := form.replaced(module):
            reason = f"its {other} has been replaced"
        if reason is None:
            form.put_on(module)
    return Swap(name, called, reason)
