# SPDX-License-Identifier: Apache-2.0
"""The blocks of U-Nets: group norm with what stands around it in one op, and no copies between memory layouts."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from fastdistill.models.fuse.hooks import listened
from fastdistill.ops import group_norm_silu

FEW = 64  # float32 positions side by side, at which torch's own ops were faster on a CPU


def _norm(norm: nn.GroupNorm, x: Tensor, **options: Any) -> Tensor:
    few = x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[2:].numel() <= FEW
    if few and x.is_contiguous():
        return _by_torch(norm, x, **options)
    return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, **options)


def _by_torch(
    norm: nn.GroupNorm,
    x: Tensor,
    *,
    time_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    if time_bias is not None:
        x = x + time_bias[..., None, None]
    z = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    if scale is not None and shift is not None:
        z = torch.addcmul(shift[..., None, None], z, 1 + scale[..., None, None])
    return F.silu(z) if silu else z


class FusedResnetBlock2D(ResnetBlock2D):
    """Norm, time embedding and SiLU in one op each; the shortcut reads its input as it lies in memory."""

    @staticmethod
    def refuse(block: ResnetBlock2D) -> str | None:
        """Why this block cannot be fused."""
        if type(block.nonlinearity) is not nn.SiLU:
            return f"its activation is {type(block.nonlinearity).__name__}, not SiLU"
        for name in ("norm1", "norm2"):
            if type(getattr(block, name)) is not nn.GroupNorm:
                return f"its {name} is {type(getattr(block, name)).__name__}, not GroupNorm"
        if block.time_embedding_norm not in ("default", "scale_shift"):
            return f"its time_embedding_norm is {block.time_embedding_norm!r}"
        return None

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        unusual = temb is not None and self.time_emb_proj is None
        if unusual or listened(self.norm1, self.norm2, self.nonlinearity):
            result: Tensor = super().forward(input_tensor, temb, *args, **kwargs)
            return result
        x, hidden = input_tensor, _norm(self.norm1, input_tensor)
        for resample in (self.upsample, self.downsample):
            if resample is not None:
                if resample is self.upsample and len(hidden) >= 64:  # torch's nearest upsampling fails in channels_last
                    x, hidden = x.contiguous(), hidden.contiguous()
                x, hidden = resample(x), resample(hidden)
        hidden = self.conv1(hidden)
        time: dict[str, Tensor] = {}
        if temb is not None:
            projected = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
            if self.time_embedding_norm == "default":
                time["time_bias"] = projected
            else:
                time["scale"], time["shift"] = projected.chunk(2, dim=1)
        hidden = self.conv2(self.dropout(_norm(self.norm2, hidden, **time)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        total = x + hidden
        return total if self.output_scale_factor == 1.0 else total / self.output_scale_factor


class FusedTransformer2DModel(Transformer2DModel):
    """Group norm in one op, and tokens that go back to the layout of the image they came from without a copy."""

    @staticmethod
    def refuse(model: Transformer2DModel) -> str | None:
        """Why this model cannot be fused."""
        if not model.is_input_continuous:
            return "its input is not a feature map"
        return None if type(model.norm) is nn.GroupNorm else f"its norm is {type(model.norm).__name__}, not GroupNorm"

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        if listened(self.norm):
            tokens, width = super()._operate_on_continuous_inputs(hidden_states)
            return tokens, width
        batch, _, height, width = hidden_states.shape
        hidden = _norm(self.norm, hidden_states, silu=False)
        if not self.use_linear_projection:
            hidden = self.proj_in(hidden)
        inner = hidden.shape[1]
        hidden = hidden.permute(0, 2, 3, 1).reshape(batch, height * width, inner)
        # Tokens in one block of memory here, or each of a block's norms and sums would copy them.
        return (self.proj_in(hidden) if self.use_linear_projection else hidden.contiguous()), inner

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        channels_last = residual.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format

        def as_map(tokens: Tensor) -> Tensor:
            image = tokens.reshape(batch_size, height, width, -1).permute(0, 3, 1, 2)
            return image.contiguous(memory_format=layout)

        if self.use_linear_projection:
            return as_map(self.proj_out(hidden_states)) + residual
        result: Tensor = self.proj_out(as_map(hidden_states)) + residual
        return result
