# SPDX-License-Identifier: Apache-2.0
"""The blocks of transformers: layer norm with its modulation and the residual before it in one op, GEGLU in one op."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward, JointTransformerBlock
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, SD35AdaLayerNormZeroX
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

from fastdistill.models import float8
from fastdistill.models.fuse.attention import autocasts
from fastdistill.models.fuse.form import Form, Part, altered, instead_of, own
from fastdistill.models.fuse.products import affine, plain, saves
from fastdistill.ops import geglu, layer_norm_modulate, residual_layer_norm_modulate
from fastdistill.ops._check import FLOATS
from fastdistill.ops.layer_norm_modulate import layer_norm_beside

Modulation = tuple[Tensor | None, Tensor | None]  # scale, shift
_NONE: Modulation = (None, None)


def modulated(norm: nn.LayerNorm, x: Tensor, modulation: Modulation = _NONE) -> Tensor:
    scale, shift = modulation
    if scale is None or shift is None or scale.dtype == x.dtype or autocasts(x.device):
        return layer_norm_modulate(x, scale, shift, norm.weight, norm.bias, norm.eps)
    y = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return y * (1 + scale[:, None]) + shift[:, None]  # in the wider dtype


def modulated_beside(norm: nn.LayerNorm, x: Tensor, modulation: Modulation = _NONE) -> tuple[Tensor, Tensor]:
    """``modulated``, and x for the residual; the norm's backward adds the gradient of this x."""
    scale, shift = modulation
    if scale is None or shift is None or scale.dtype == x.dtype:
        return layer_norm_beside(x, scale, shift, norm.weight, norm.bias, norm.eps)
    return modulated(norm, x, modulation), x


def add(x: Tensor, h: Tensor, gate: Tensor | None) -> Tensor:
    """x + gate h, gate [B, D]; dtypes differ under autocast."""
    if gate is None:
        return x + h
    gate = gate[:, None]
    return torch.addcmul(x, gate, h) if x.dtype == h.dtype == gate.dtype else x + gate * h


def add_norm(
    norm: nn.LayerNorm, x: Tensor, h: Tensor, gate: Tensor | None, modulation: Modulation = _NONE
) -> tuple[Tensor, Tensor]:
    """The norm of x + gate h, and that sum."""
    if h.shape != x.shape or any(t is not None and t.dtype != x.dtype for t in (h, gate, *modulation)):
        total = add(x, h, gate)
        return modulated(norm, total, modulation), total
    return residual_layer_norm_modulate(x, h, gate, *modulation, norm.weight, norm.bias, norm.eps)


_GELU = own(GEGLU, "gelu")


def _refuse_geglu(module: GEGLU) -> str | None:
    return "its gelu has been replaced" if "gelu" in module.__dict__ or GEGLU.gelu is not _GELU else None


@instead_of(GEGLU, "forward", _refuse_geglu)
def _geglu(module: GEGLU, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or hidden_states.dtype not in FLOATS:
        result: Tensor = GEGLU.forward(module, hidden_states, *args, **kwargs)
        return result
    proj, x = module.proj, hidden_states
    if saves(x) and plain(proj, kind=nn.Linear) and proj.bias is not None and torch.is_grad_enabled():
        return geglu(F.linear(x, proj.weight, proj.bias.detach()), bias=proj.bias)  # which makes its gradient
    return geglu(proj(x))


GATED = Form(_refuse_geglu, {"forward": _geglu})


def _refuse_basic(block: BasicTransformerBlock) -> str | None:
    if block.norm_type not in ("layer_norm", "ada_norm_zero", "ada_norm_single"):
        return f"its norm_type is {block.norm_type!r}"
    if block.pos_embed is not None or "fuser" in block._modules:
        return "it has position embeddings or a gated attention of its own"
    if block._chunk_size is not None:
        return "its feed-forward is computed in chunks"
    return altered(_parts_of_basic(block))


def _parts_of_basic(block: BasicTransformerBlock) -> list[Part]:
    parts: list[Part] = [("norm1", block.norm1, nn.LayerNorm)]
    if block.norm_type == "ada_norm_zero":
        parts = [("norm1", block.norm1, AdaLayerNormZero)]
        parts += [("norm1.norm", getattr(block.norm1, "norm", None), nn.LayerNorm)]
    if block.norm_type == "ada_norm_single":
        return [*parts, ("norm2", block.norm2, nn.LayerNorm)]
    if block.attn2 is not None:
        parts.append(("norm2", block.norm2, nn.LayerNorm))
    return [*parts, ("norm3", block.norm3, nn.LayerNorm)]


@instead_of(BasicTransformerBlock, "forward", _refuse_basic)
def _basic(
    block: BasicTransformerBlock,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    """Of U-Nets (``layer_norm``), DiT (``ada_norm_zero``) and PixArt (``ada_norm_single``)."""
    given, x = cross_attention_kwargs or {}, hidden_states
    fits = x.dim() == 3 and x.dtype in FLOATS and not given.keys() & {"gligen", "scale"}
    if block.norm_type == "ada_norm_zero":
        fits = fits and per_sample(timestep, 1, x.shape[0]) and per_sample(class_labels, 1, x.shape[0])
    if not fits:
        result: Tensor = BasicTransformerBlock.forward(
            block, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
            cross_attention_kwargs, class_labels, added_cond_kwargs,
        )  # fmt: skip
        return result
    first = block.norm1.norm if block.norm_type == "ada_norm_zero" else block.norm1
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = _modulation(block, x, timestep, class_labels)
    y, x = modulated_beside(first, x, (scale_msa, shift_msa))
    context = encoder_hidden_states if block.only_cross_attention else None
    h = block.attn1(y, encoder_hidden_states=context, attention_mask=attention_mask, **given)
    gate = gate_msa
    if block.attn2 is not None:
        if block.norm_type == "ada_norm_single":
            x = y = add(x, h, gate)  # PixArt has no norm here
        else:
            y, x = add_norm(block.norm2, x, h, gate)
        h = block.attn2(y, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask, **given)
        gate = None
    last = block.norm2 if block.norm_type == "ada_norm_single" else block.norm3
    y, x = add_norm(last, x, h, gate, (scale_mlp, shift_mlp))
    return add(x, feed_forward(block.ff, y), gate_mlp)


def feed_forward(ff: nn.Module, x: Tensor) -> Tensor:
    """Layer by layer, as the class does it."""
    own = altered((("ff", ff, FeedForward),)) is None
    if own and (found := float8.feed_forward(list(ff.net), x)) is not None:  # type: ignore[arg-type]
        return found
    if not saves(x) or not own:
        result: Tensor = ff(x)
        return result
    assert isinstance(ff, FeedForward)
    for layer in ff.net:
        x = affine(layer, x)
    return x


BASIC = Form(_refuse_basic, {"forward": _basic})


def per_sample(values: Tensor | None, dims: int, batch: int) -> bool:
    return values is not None and values.dim() == dims and values.shape[0] in (1, batch)


def _modulation(
    block: BasicTransformerBlock, x: Tensor, timestep: Tensor | None, labels: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Shift, scale and gate of the attention, then of the feed-forward: [B, D] each."""
    if block.norm_type == "ada_norm_single":
        assert timestep is not None
        return (block.scale_shift_table[None] + timestep.reshape(x.shape[0], 6, -1)).unbind(1)
    if block.norm_type == "ada_norm_zero":
        embedding = block.norm1.emb(timestep, labels, hidden_dtype=x.dtype)
        return chunks(block.norm1, embedding, 6, x)
    return (None,) * 6


def chunks(norm: Any, embedding: Tensor, count: int, x: Tensor) -> tuple[Tensor, ...]:
    """[B, D] each, of an embedding [B or 1, D]."""
    return tuple(t.expand(x.shape[0], -1) for t in norm.linear(norm.silu(embedding)).chunk(count, dim=1))


def _refuse_joint(block: JointTransformerBlock) -> str | None:
    if block._chunk_size is not None:
        return "its feed-forward is computed in chunks"
    own_norm = SD35AdaLayerNormZeroX if block.use_dual_attention else AdaLayerNormZero
    context_norm = AdaLayerNormContinuous if block.context_pre_only else AdaLayerNormZero
    parts: list[Part] = [
        ("norm1", block.norm1, own_norm),
        ("norm1.norm", getattr(block.norm1, "norm", None), nn.LayerNorm),
        ("norm1_context", block.norm1_context, context_norm),
        ("norm1_context.norm", getattr(block.norm1_context, "norm", None), nn.LayerNorm),
        ("norm2", block.norm2, nn.LayerNorm),
    ]
    if not block.context_pre_only:
        parts.append(("norm2_context", block.norm2_context, nn.LayerNorm))
    return altered(parts)


@instead_of(JointTransformerBlock, "forward", _refuse_joint)
def _joint(
    block: JointTransformerBlock,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Of SD3: image and prompt tokens side by side."""
    x, context, given = hidden_states, encoder_hidden_states, joint_attention_kwargs or {}
    tokens = all(t.dim() == 3 and t.shape[0] == x.shape[0] and t.dtype in FLOATS for t in (x, context))
    if not tokens or not per_sample(temb, 2, x.shape[0]):
        result: tuple[Tensor | None, Tensor] = JointTransformerBlock.forward(
            block, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs
        )
        return result
    ours = chunks(block.norm1, temb, 9 if block.use_dual_attention else 6, x)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = ours[:6]
    y, x = modulated_beside(block.norm1.norm, x, (scale_msa, shift_msa))
    if block.context_pre_only:
        embedding = block.norm1_context.silu(temb).to(context.dtype)
        scale, shift = (t.expand(x.shape[0], -1) for t in block.norm1_context.linear(embedding).chunk(2, dim=1))
        theirs: tuple[Tensor, ...] = (shift, scale)
    else:
        theirs = chunks(block.norm1_context, temb, 6, context)
    prompt, context = modulated_beside(block.norm1_context.norm, context, (theirs[1], theirs[0]))
    h, of_context = block.attn(hidden_states=y, encoder_hidden_states=prompt, **given)
    if block.use_dual_attention:
        shift2, scale2, gate2 = ours[6:]
        second = block.attn2(hidden_states=modulated(block.norm1.norm, x, (scale2, shift2)), **given)
        x, h, gate_msa = add(x, h, gate_msa), second, gate2
    y, x = add_norm(block.norm2, x, h, gate_msa, (scale_mlp, shift_mlp))
    x = add(x, feed_forward(block.ff, y), gate_mlp)
    if block.context_pre_only:
        return None, x
    _, _, gate, shift, scale, last = theirs
    y, context = add_norm(block.norm2_context, context, of_context, gate, (scale, shift))
    return add(context, feed_forward(block.ff_context, y), last), x


JOINT = Form(_refuse_joint, {"forward": _joint})


def _refuse_sana(block: SanaTransformerBlock) -> str | None:
    if block.attn2 is None:
        return "it has no prompt"
    return altered((("norm1", block.norm1, nn.LayerNorm), ("norm2", block.norm2, nn.LayerNorm)))


@instead_of(SanaTransformerBlock, "forward", _refuse_sana)
def _sana(
    block: SanaTransformerBlock,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Tensor:
    """Its linear attention and its convolutional feed-forward are called without changes."""
    x = hidden_states
    if x.dim() != 3 or x.dtype not in FLOATS or timestep is None:
        result: Tensor = SanaTransformerBlock.forward(
            block, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep, height, width
        )
        return result
    table = block.scale_shift_table[None] + timestep.reshape(x.shape[0], 6, -1)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = table.unbind(1)
    y = modulated(block.norm1, x, (scale_msa, shift_msa)).to(x.dtype)
    x = add(x, block.attn1(y), gate_msa)
    h = block.attn2(x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
    y, x = add_norm(block.norm2, x, h, None, (scale_mlp, shift_mlp))
    image = block.ff(y.unflatten(1, (height, width)).permute(0, 3, 1, 2))
    return add(x, image.flatten(2, 3).permute(0, 2, 1), gate_mlp)


SANA = Form(_refuse_sana, {"forward": _sana})
