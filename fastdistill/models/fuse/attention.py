# SPDX-License-Identifier: Apache-2.0
"""Attention processors: a prompt's few keys by ``cross_attention``, an image's own by the backend that is fastest."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor2_0, JointAttnProcessor2_0
from torch import Tensor, cat

from fastdistill.ops import attention, cross_attention


class FusedAttnProcessor(AttnProcessor2_0):
    """In place of ``AttnProcessor2_0``, which takes over where a mask tells queries apart."""

    @staticmethod
    def refuse(processor: AttnProcessor2_0) -> str | None:
        """Why this processor cannot be replaced: it always can."""
        return None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        crossed = encoder_hidden_states is not None
        masked = attention_mask is not None
        by_key = crossed and masked and attention_mask.dim() == 3 and attention_mask.shape[1] == 1  # type: ignore[union-attr]
        special = attn.spatial_norm is not None or attn.group_norm is not None or hidden_states.dim() != 3
        if special or (masked and not by_key):
            result: Tensor = super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
            )
            return result
        context = hidden_states
        if encoder_hidden_states is not None:
            context = encoder_hidden_states
            if attn.norm_cross:
                context = attn.norm_encoder_hidden_states(context)
        q, k, v = heads(attn, attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        if crossed:
            mask = None if attention_mask is None else attention_mask[:, 0]
            out = cross_attention(q, k, v, mask=mask)
        else:
            out = attention(q, k, v)
        out = attn.to_out[1](attn.to_out[0](out.flatten(2)))
        if attn.residual_connection:
            out = out + hidden_states
        return out if attn.rescale_output_factor == 1.0 else out / attn.rescale_output_factor


class FusedJointAttnProcessor(JointAttnProcessor2_0):
    """In place of ``JointAttnProcessor2_0`` (SD3): image and prompt tokens attend to both."""

    @staticmethod
    def refuse(processor: JointAttnProcessor2_0) -> str | None:
        """Why this processor cannot be replaced: it always can."""
        return None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        own = heads(attn, *(project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v)))
        if encoder_hidden_states is None:
            return attn.to_out[1](attn.to_out[0](attention(*own).flatten(2)))
        query, key, value = (p(encoder_hidden_states) for p in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
        theirs = heads(attn, query, key, value, added=True)
        out = attention(*(cat((a, b), dim=1) for a, b in zip(own, theirs, strict=True))).flatten(2)
        image, prompt = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        if not attn.context_pre_only:
            prompt = attn.to_add_out(prompt)
        return attn.to_out[1](attn.to_out[0](image)), prompt


def heads(attn: Attention, q: Tensor, k: Tensor, v: Tensor, added: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, H, D] of each, queries and keys normalized where the module does so."""
    q, k, v = (t.unflatten(2, (attn.heads, -1)) for t in (q, k, v))
    norm_q, norm_k = (attn.norm_added_q, attn.norm_added_k) if added else (attn.norm_q, attn.norm_k)
    return (q if norm_q is None else norm_q(q)), (k if norm_k is None else norm_k(k)), v
