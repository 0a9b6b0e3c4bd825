# SPDX-License-Identifier: Apache-2.0
"""The blocks of transformers: layer norm with its modulation and the residual before it in one op, GEGLU in one op."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, SD35AdaLayerNormZeroX
from torch import Tensor, nn

from fastdistill.models.fuse.hooks import listened
from fastdistill.ops import geglu, layer_norm_modulate, residual_layer_norm_modulate

Modulation = tuple[Tensor | None, Tensor | None]  # scale, shift
_NONE: Modulation = (None, None)


def _norm(norm: nn.LayerNorm, x: Tensor, modulation: Modulation = _NONE) -> Tensor:
    return layer_norm_modulate(x, *modulation, norm.weight, norm.bias, norm.eps)


def _add(x: Tensor, h: Tensor, gate: Tensor | None) -> Tensor:
    """x + gate h, gate [B, D]; dtypes differ under autocast."""
    if gate is None:
        return x + h
    gate = gate.view(len(gate), *[1] * (x.dim() - 2), gate.shape[-1])
    return torch.addcmul(x, gate, h) if x.dtype == h.dtype == gate.dtype else x + gate * h


def _add_norm(
    norm: nn.LayerNorm, x: Tensor, h: Tensor, gate: Tensor | None, modulation: Modulation = _NONE
) -> tuple[Tensor, Tensor]:
    """The norm of x + gate h, and that sum."""
    if h.dtype != x.dtype or h.shape != x.shape:
        total = _add(x, h, gate)
        return _norm(norm, total, modulation), total
    return residual_layer_norm_modulate(x, h, gate, *modulation, norm.weight, norm.bias, norm.eps)


class FusedGEGLU(GEGLU):
    @staticmethod
    def refuse(module: GEGLU) -> str | None:
        """Why this module cannot be fused: it always can."""
        return None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return geglu(self.proj(hidden_states))


class FusedBasicTransformerBlock(BasicTransformerBlock):
    """Of U-Nets (``layer_norm``), DiT (``ada_norm_zero``) and PixArt (``ada_norm_single``)."""

    @staticmethod
    def refuse(block: BasicTransformerBlock) -> str | None:
        """Why this block cannot be fused."""
        if block.norm_type not in ("layer_norm", "ada_norm_zero", "ada_norm_single"):
            return f"its norm_type is {block.norm_type!r}"
        if block.pos_embed is not None or hasattr(block, "fuser"):
            return "it has position embeddings or a gated attention of its own"
        for norm in _norms(block):
            if type(norm) is not nn.LayerNorm:
                return f"a norm of it is {type(norm).__name__}, not LayerNorm"
        return None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        given = cross_attention_kwargs or {}
        unusual = self._chunk_size is not None or hidden_states.dim() != 3 or given.keys() & {"gligen", "scale"}
        if unusual or listened(*_norms(self), self.norm1):
            result: Tensor = super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, added_cond_kwargs,
            )  # fmt: skip
            return result
        first, _, last = norms = _norms(self)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self._modulation(
            hidden_states, timestep, class_labels
        )
        x, y = hidden_states, _norm(first, hidden_states, (scale_msa, shift_msa))
        context = encoder_hidden_states if self.only_cross_attention else None
        h = self.attn1(y, encoder_hidden_states=context, attention_mask=attention_mask, **given)
        gate = gate_msa
        if self.attn2 is not None:
            if self.norm_type == "ada_norm_single":
                x = y = _add(x, h, gate)  # PixArt has no norm here
            else:
                y, x = _add_norm(norms[1], x, h, gate)
            h = self.attn2(
                y, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask, **given
            )
            gate = None
        y, x = _add_norm(last, x, h, gate, (scale_mlp, shift_mlp))
        return _add(x, self.ff(y), gate_mlp)

    def _modulation(self, x: Tensor, timestep: Tensor | None, labels: Tensor | None) -> tuple[Tensor | None, ...]:
        """Shift, scale and gate of the attention, then of the feed-forward: [B, D] each."""
        if self.norm_type == "ada_norm_single":
            assert timestep is not None
            return (self.scale_shift_table[None] + timestep.reshape(len(x), 6, -1)).unbind(1)
        if self.norm_type == "ada_norm_zero":
            embedding = self.norm1.emb(timestep, labels, hidden_dtype=x.dtype)
            chunks: tuple[Tensor, ...] = self.norm1.linear(self.norm1.silu(embedding)).chunk(6, dim=1)
            return chunks
        return (None,) * 6


def _norms(block: BasicTransformerBlock) -> tuple[nn.LayerNorm, nn.LayerNorm, nn.LayerNorm]:
    """Before the attention, before the cross-attention (where there is one), before the feed-forward."""
    first = block.norm1.norm if block.norm_type == "ada_norm_zero" else block.norm1
    last = block.norm2 if block.norm_type == "ada_norm_single" else block.norm3
    return first, last if block.norm2 is None else block.norm2, last


class FusedJointTransformerBlock(JointTransformerBlock):
    """Of SD3: image and prompt tokens side by side."""

    @staticmethod
    def refuse(block: JointTransformerBlock) -> str | None:
        """Why this block cannot be fused."""
        own = SD35AdaLayerNormZeroX if block.use_dual_attention else AdaLayerNormZero
        context = AdaLayerNormContinuous if block.context_pre_only else AdaLayerNormZero
        for norm, kind in ((block.norm1, own), (block.norm1_context, context)):
            if type(norm) is not kind:
                return f"a norm of it is {type(norm).__name__}, not {kind.__name__}"
        for norm in _layer_norms(block):
            if not isinstance(norm, nn.LayerNorm) and type(norm).__name__ != "LayerNorm":
                return f"a norm of it is {type(norm).__name__}, not LayerNorm"
        return None

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        if self._chunk_size is not None or listened(self.norm1, self.norm1_context, *_layer_norms(self)):
            result: tuple[Tensor | None, Tensor] = super().forward(
                hidden_states, encoder_hidden_states, temb, joint_attention_kwargs
            )
            return result
        given = joint_attention_kwargs or {}
        x, context = hidden_states, encoder_hidden_states
        own = self.norm1.linear(self.norm1.silu(temb)).chunk(9 if self.use_dual_attention else 6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = own[:6]
        y = _norm(self.norm1.norm, x, (scale_msa, shift_msa))
        if self.context_pre_only:
            embedding = self.norm1_context.silu(temb).to(context.dtype)
            scale, shift = self.norm1_context.linear(embedding).chunk(2, dim=1)
            theirs: tuple[Tensor, ...] = (shift, scale)
        else:
            theirs = self.norm1_context.linear(self.norm1_context.silu(temb)).chunk(6, dim=1)
        prompt = _norm(self.norm1_context.norm, context, (theirs[1], theirs[0]))
        h, of_context = self.attn(hidden_states=y, encoder_hidden_states=prompt, **given)
        if self.use_dual_attention:
            shift2, scale2, gate2 = own[6:]
            second = self.attn2(hidden_states=_norm(self.norm1.norm, x, (scale2, shift2)), **given)
            x, h, gate_msa = _add(x, h, gate_msa), second, gate2
        y, x = _add_norm(self.norm2, x, h, gate_msa, (scale_mlp, shift_mlp))
        x = _add(x, self.ff(y), gate_mlp)
        if self.context_pre_only:
            return None, x
        _, _, gate, shift, scale, last = theirs
        y, context = _add_norm(self.norm2_context, context, of_context, gate, (scale, shift))
        return _add(context, self.ff_context(y), last), x


def _layer_norms(block: JointTransformerBlock) -> tuple[Any, ...]:
    norms = (block.norm1.norm, block.norm1_context.norm, block.norm2, block.norm2_context)
    return tuple(norm for norm in norms if norm is not None)
