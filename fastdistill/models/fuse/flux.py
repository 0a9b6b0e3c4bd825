# SPDX-License-Identifier: Apache-2.0
"""The blocks of Flux: each modulated norm is one op, and attention uses the fastest backend."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, cat, nn

from fastdistill.models.fuse.attention import autocasted, fits
from fastdistill.models.fuse.form import Form, altered, instead_of, own
from fastdistill.models.fuse.products import projected
from fastdistill.models.fuse.transformer import add, add_norm, chunks, feed_forward, modulated, per_sample
from fastdistill.ops import attention

Rotary = tuple[Tensor, Tensor]
_CALL = own(FluxAttnProcessor, "__call__")
_MOST = torch.finfo(torch.float16).max


def _refuse_double(block: FluxTransformerBlock) -> str | None:
    return altered(
        (
            ("norm1", block.norm1, AdaLayerNormZero),
            ("norm1.norm", getattr(block.norm1, "norm", None), nn.LayerNorm),
            ("norm1_context", block.norm1_context, AdaLayerNormZero),
            ("norm1_context.norm", getattr(block.norm1_context, "norm", None), nn.LayerNorm),
            ("norm2", block.norm2, nn.LayerNorm),
            ("norm2_context", block.norm2_context, nn.LayerNorm),
        )
    )


@instead_of(FluxTransformerBlock, "forward", _refuse_double)
def _double(
    block: FluxTransformerBlock,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Rotary | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Image and prompt tokens side by side."""
    x, context, given = hidden_states, encoder_hidden_states, joint_attention_kwargs or {}
    if not (fits(x, x) and fits(context, x) and per_sample(temb, 2, x.shape[0])):
        result: tuple[Tensor, Tensor] = FluxTransformerBlock.forward(
            block, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
        )
        return result
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = chunks(block.norm1, temb, 6, x)
    shift, scale, *theirs = chunks(block.norm1_context, temb, 6, context)
    y = modulated(block.norm1.norm, x, (scale_msa, shift_msa))
    prompt = modulated(block.norm1_context.norm, context, (scale, shift))
    h, of_context, *of_images = block.attn(
        hidden_states=y, encoder_hidden_states=prompt, image_rotary_emb=image_rotary_emb, **given
    )
    y, x = add_norm(block.norm2, x, h, gate_msa, (scale_mlp, shift_mlp))
    x = add(x, feed_forward(block.ff, y), gate_mlp)
    for of_image in of_images:  # prompts that are images
        x = x + of_image
    gate, shift, scale, last = theirs
    y, context = add_norm(block.norm2_context, context, of_context, gate, (scale, shift))
    return _clipped(add(context, feed_forward(block.ff_context, y), last)), x


DOUBLE = Form(_refuse_double, {"forward": _double})


def _refuse_single(block: FluxSingleTransformerBlock) -> str | None:
    inner = getattr(block.norm, "norm", None)
    return altered((("norm", block.norm, AdaLayerNormZeroSingle), ("norm.norm", inner, nn.LayerNorm)))


@instead_of(FluxSingleTransformerBlock, "forward", _refuse_single)
def _single(
    block: FluxSingleTransformerBlock,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Rotary | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Prompt and image tokens in one sequence, attention and feed-forward at once."""
    batch, given = hidden_states.shape[0], joint_attention_kwargs or {}
    tokens = all(fits(t, hidden_states) for t in (hidden_states, encoder_hidden_states))
    if not tokens or not per_sample(temb, 2, batch):
        result: tuple[Tensor, Tensor] = FluxSingleTransformerBlock.forward(
            block, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
        )
        return result
    x = cat((encoder_hidden_states, hidden_states), dim=1)
    shift, scale, gate = chunks(block.norm, temb, 3, x)
    y = modulated(block.norm.norm, x, (scale, shift))
    mlp = block.act_mlp(block.proj_mlp(y))
    h = block.attn(hidden_states=y, image_rotary_emb=image_rotary_emb, **given)
    x = _clipped(add(x, block.proj_out(cat((h, mlp), dim=2)), gate))
    return x[:, : encoder_hidden_states.shape[1]], x[:, encoder_hidden_states.shape[1] :]


SINGLE = Form(_refuse_single, {"forward": _single})


def _clipped(x: Tensor) -> Tensor:
    return x.clip(-_MOST, _MOST) if x.dtype == torch.float16 else x


def _refuse_attention(attn: FluxAttention) -> str | None:
    processor = attn.processor
    if type(processor) is not FluxAttnProcessor:
        return "no fused form of it"
    if FluxAttnProcessor.__call__ is not _CALL:
        return "its class's __call__ has been replaced"
    if attn.fused_projections:
        return "its projections have been put together"
    if getattr(processor, "_parallel_config", None) is not None:
        return "its tokens lie on several ranks"
    chosen = processor._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
    native = chosen == AttentionBackendName.NATIVE
    return None if native else f"its attention backend is {AttentionBackendName(chosen).value}"


@instead_of(FluxAttention, "forward", _refuse_attention)
def _attend(
    attn: FluxAttention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Rotary | None = None,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    x, context = hidden_states, encoder_hidden_states
    plain = not kwargs and attention_mask is None and fits(x, x)
    plain = plain and (context is None) == (attn.added_kv_proj_dim is None)
    if not plain or (context is not None and not fits(context, x)):
        result: Tensor | tuple[Tensor, Tensor] = FluxAttention.forward(
            attn, x, context, attention_mask, image_rotary_emb, **kwargs
        )
        return result
    q, k, v = (t.unflatten(-1, (-1, attn.head_dim)) for t in projected(x, attn.to_q, attn.to_k, attn.to_v))
    q, k = attn.norm_q(q), attn.norm_k(k)
    if context is not None:
        theirs = projected(context, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        query, key, value = (t.unflatten(-1, (-1, attn.head_dim)) for t in theirs)
        pairs = ((attn.norm_added_q(query), q), (attn.norm_added_k(key), k), (value, v))
        q, k, v = (cat(pair, dim=1) for pair in pairs)
    if image_rotary_emb is not None:
        q, k = (apply_rotary_emb(t, image_rotary_emb, sequence_dim=1) for t in (q, k))
    out = attention(*autocasted(q, k, v)).flatten(2).to(q.dtype)
    if context is None:
        return out
    prompt, image = out.split([context.shape[1], x.shape[1]], dim=1)
    return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(prompt)


ATTENTION = Form(_refuse_attention, {"forward": _attend})
