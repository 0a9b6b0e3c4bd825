# SPDX-License-Identifier: Apache-2.0
"""Attention with torch's processors: attention to a prompt's few keys by ``cross_attention``, self-attention by the
fastest backend."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    SanaLinearAttnProcessor2_0,
)
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from torch import Tensor, cat

from fastdistill.models import float8
from fastdistill.models.fuse.form import Form, instead_of, own
from fastdistill.models.fuse.products import affine, projected
from fastdistill.models.fuse.repeated import distinct
from fastdistill.ops import attention, cross_attention
from fastdistill.ops._check import FLOATS

_PROCESSORS = {kind: own(kind, "__call__") for kind in (AttnProcessor2_0, JointAttnProcessor2_0, SanaAttnProcessor2_0)}


def _refuse(attn: Attention) -> str | None:
    kind = type(attn.processor)
    if kind is SanaLinearAttnProcessor2_0:
        return "there is no op for linear attention"
    if kind not in _PROCESSORS:
        return "no fused form of it"
    if kind.__call__ is not _PROCESSORS[kind]:
        return "its class's __call__ has been replaced"
    if attn.spatial_norm is not None or attn.group_norm is not None:
        return "it has a norm over positions"
    if kind is SanaAttnProcessor2_0 and (attn.norm_cross or attn.residual_connection):
        return "its processor ignores its norm or its residual"
    return None if attn.inner_dim == attn.inner_kv_dim else "its keys have another width than its queries"


@instead_of(Attention, "forward", _refuse)
def _attend(
    attn: Attention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **cross_attention_kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    x, context, mask = hidden_states, encoder_hidden_states, attention_mask
    joint = type(attn.processor) is JointAttnProcessor2_0
    plain = not cross_attention_kwargs and fits(x, x) and (context is None or fits(context, x))
    if plain and joint:
        return _attend_jointly(attn, x, context)
    if plain and context is not None and (mask is None or _of_keys(mask, x, context)):
        return _attend_to(attn, x, context, mask)
    if plain and context is None and mask is None:
        q, k, v = projected(x, attn.to_q, attn.to_k, attn.to_v)
        return _out(attn, attention(*_heads(attn, q, k, v)), x)
    out: Tensor = Attention.forward(attn, x, context, mask, **cross_attention_kwargs)
    return out


FORM = Form(_refuse, {"forward": _attend})


def fits(tokens: Tensor, beside: Tensor) -> bool:
    """[B, N, C] with N > 0 in a dtype of the ops."""
    return tokens.dim() == 3 and tokens.shape[0] == beside.shape[0] and tokens.shape[1] > 0 and tokens.dtype in FLOATS


def _of_keys(mask: Tensor, x: Tensor, context: Tensor) -> bool:
    """Whether the mask has one value per key and needs no gradient, which ``cross_attention`` does not compute."""
    learned = mask.requires_grad and torch.is_grad_enabled()
    return mask.shape == (x.shape[0], 1, context.shape[1]) and not learned


def _attend_to(attn: Attention, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
    if attn.norm_cross:
        context = attn.norm_encoder_hidden_states(context)
    context, rows = distinct(attn, context)
    k, v = float8.projected(context, (attn.to_k, attn.to_v)) or (attn.to_k(context), attn.to_v(context))
    q, k, v = _heads(attn, attn.to_q(x), k, v)
    return _out(attn, cross_attention(q, k, v, mask=None if mask is None else mask[:, 0], rows=rows), x)


def _out(attn: Attention, out: Tensor, x: Tensor) -> Tensor:
    out = attn.to_out[1](affine(attn.to_out[0], out.flatten(2)))
    if attn.residual_connection:
        out = out + x
    return out if attn.rescale_output_factor == 1.0 else out / attn.rescale_output_factor


def _attend_jointly(attn: Attention, x: Tensor, context: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """Of SD3: image and prompt tokens attend to both."""
    q, k, v = projected(x, attn.to_q, attn.to_k, attn.to_v)
    heads = _heads(attn, q, k, v)
    if context is None:
        alone: Tensor = attn.to_out[1](attn.to_out[0](attention(*heads).flatten(2)))
        return alone
    query, key, value = projected(context, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    theirs = _heads(attn, query, key, value, added=True)
    out = attention(*(cat((a, b), dim=1) for a, b in zip(heads, theirs, strict=True))).flatten(2)
    image, prompt = out.split([x.shape[1], context.shape[1]], dim=1)
    if not attn.context_pre_only:
        prompt = attn.to_add_out(prompt)
    return attn.to_out[1](attn.to_out[0](image)), prompt


def _heads(attn: Attention, q: Tensor, k: Tensor, v: Tensor, added: bool = False) -> tuple[Tensor, ...]:
    """[B, N, H, D] of each, queries and keys normalized where the module does so; in the dtype that autocast gives to
    torch's attention."""
    norm_q, norm_k = (attn.norm_added_q, attn.norm_added_k) if added else (attn.norm_q, attn.norm_k)
    if type(attn.processor) is SanaAttnProcessor2_0:  # over all heads at once
        q, k = q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k)
        norm_q = norm_k = None
    q, k, v = (t.unflatten(2, (attn.heads, -1)) for t in (q, k, v))
    if norm_q is not None:  # which sees [B, H, N, D]
        q = norm_q(q.transpose(1, 2)).transpose(1, 2)
    if norm_k is not None:
        k = norm_k(k.transpose(1, 2)).transpose(1, 2)
    return autocasted(q, k, v)


def autocasted(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if autocasts(q.device):
        dtype = torch.get_autocast_dtype(q.device.type)
        return q.to(dtype), k.to(dtype), v.to(dtype)
    return q, k, v


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on; the meta device has none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)
