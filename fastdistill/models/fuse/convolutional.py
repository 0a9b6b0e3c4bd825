# SPDX-License-Identifier: Apache-2.0
"""The blocks of U-Nets: group norm and the operations next to it in one op, and no copies between memory layouts."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

from fastdistill.models.fuse.attention import autocasts
from fastdistill.models.fuse.form import Form, altered, instead_of
from fastdistill.models.fuse.products import (
    bias_left,
    biased_sum,
    branched,
    convolution,
    convolved,
    doubled,
    doubles,
    is_product,
    joined,
    joins,
    pointwise,
)
from fastdistill.ops import group_norm_silu
from fastdistill.ops._check import FLOATS

FEW = 64  # float32 positions side by side, at which torch's own ops were faster on a CPU


def _norm(norm: nn.GroupNorm, x: Tensor, *, silu: bool = True, **given: Any) -> Tensor:
    """``given``: tensors of ``group_norm_silu``: time_bias, scale and shift, or none."""
    few = x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[2:].numel() <= FEW
    if (few and x.is_contiguous()) or any(t.dtype != x.dtype for t in given.values()):
        return _by_torch(norm, x, silu, **given)
    given = {name: t.expand(x.shape[0], -1) for name, t in given.items()}
    return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu=silu, **given)


def _by_torch(
    norm: nn.GroupNorm,
    x: Tensor,
    silu: bool,
    *,
    time_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    if time_bias is not None:
        x = x + time_bias[..., None, None]
    z = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    if scale is not None and shift is not None:
        z = z * (1 + scale[..., None, None]) + shift[..., None, None]
    return F.silu(z) if silu else z


def _refuse_resnet(block: ResnetBlock2D) -> str | None:
    if block.time_embedding_norm not in ("default", "scale_shift"):
        return f"its time_embedding_norm is {block.time_embedding_norm!r}"
    return altered(
        (
            ("norm1", block.norm1, nn.GroupNorm),
            ("norm2", block.norm2, nn.GroupNorm),
            ("nonlinearity", block.nonlinearity, nn.SiLU),
        )
    )


@instead_of(ResnetBlock2D, "forward", _refuse_resnet)
def _resnet(block: ResnetBlock2D, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
    """Time embedding, norm and SiLU as one op each time; the shortcut reads its input without a copy."""
    unusual = args or kwargs or input_tensor.dtype not in FLOATS or not _fits(block, temb, input_tensor.shape[0])
    if unusual:
        result: Tensor = ResnetBlock2D.forward(block, input_tensor, temb, *args, **kwargs)
        return result
    x, before, shortcut = input_tensor, input_tensor, block.conv_shortcut
    product = shortcut is not None and block.upsample is block.downsample is None and is_product(shortcut, x)
    if product:  # which adds the biases of both convolutions
        before, x = branched(shortcut, x, bias_left(block.conv2, x))
    hidden = _norm(block.norm1, before)
    for resample in (block.upsample, block.downsample):
        if resample is not None:
            if resample is block.upsample and hidden.shape[0] >= 64:  # torch fails in channels_last
                x, hidden = x.contiguous(), hidden.contiguous()
            x, hidden = resample(x), resample(hidden)
    hidden, bias = convolved(block.conv1, hidden)
    time: dict[str, Any] = {}
    if bias is not None:  # the norm adds it, and makes its gradient
        time["time_bias"] = bias.to(hidden.dtype)[None]
    if temb is not None:
        projected = block.time_emb_proj(temb if block.skip_time_act else block.nonlinearity(temb))
        if block.time_embedding_norm == "default":
            time["time_bias"] = projected if bias is None else projected + bias.to(projected.dtype)
        else:
            time["scale"], time["shift"] = projected.chunk(2, dim=1)
    hidden, bias = convolved(block.conv2, block.dropout(_norm(block.norm2, hidden, **time)))
    if product:
        bias = None
    elif shortcut is not None and is_product(shortcut, x):
        x, bias = pointwise(shortcut, x, bias), None
    elif shortcut is not None:
        x = shortcut(x)
    total = x + hidden if bias is None else biased_sum(x, hidden, bias)
    return total if block.output_scale_factor == 1.0 else total / block.output_scale_factor


def _fits(block: ResnetBlock2D, temb: Tensor | None, batch: int) -> bool:
    """A time embedding [B or 1, C] if there is a projection of it, none if not."""
    if temb is None or block.time_emb_proj is None:
        return temb is None and block.time_emb_proj is None and block.time_embedding_norm == "default"
    return temb.dim() == 2 and temb.shape[0] in (1, batch)


RESNET = Form(_refuse_resnet, {"forward": _resnet})


def _refuse_upsample(block: Upsample2D) -> str | None:
    if block.norm is not None or block.use_conv_transpose or not block.interpolate:
        return "it does more than repeat positions"
    return None


@instead_of(Upsample2D, "forward", _refuse_upsample)
def _upsample(
    block: Upsample2D, hidden_states: Tensor, output_size: int | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """Positions are repeated in units of 16 bytes."""
    if args or kwargs or output_size is not None or not doubles(hidden_states):
        result: Tensor = Upsample2D.forward(block, hidden_states, output_size, *args, **kwargs)
        return result
    x = doubled(hidden_states)
    if block.use_conv:
        x = convolution(block.conv if block.name == "conv" else block.Conv2d_0, x)
    return x


UPSAMPLE = Form(_refuse_upsample, {"forward": _upsample})


def _refuse_none(module: nn.Module) -> str | None:
    return None


def _joins(block: CrossAttnUpBlock2D | UpBlock2D, x: Tensor, skips: tuple[Tensor, ...]) -> bool:
    """Whether the map and the first skip can be concatenated by ``joined``; FreeU would have to change them before."""
    if not skips or not joins(x, skips[-1]):
        return False
    return not all(getattr(block, name, None) for name in ("s1", "s2", "b1", "b2"))


def _resnet_of_up(block: Any, resnet: nn.Module, x: Tensor, temb: Tensor | None) -> Tensor:
    kept = torch.is_grad_enabled() and block.gradient_checkpointing
    result: Tensor = block._gradient_checkpointing_func(resnet, x, temb) if kept else resnet(x, temb)
    return result


@instead_of(CrossAttnUpBlock2D, "forward", _refuse_none)
def _up_with_attention(
    block: CrossAttnUpBlock2D,
    hidden_states: Tensor,
    res_hidden_states_tuple: tuple[Tensor, ...],
    temb: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    upsample_size: int | None = None,
    attention_mask: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
) -> Tensor:
    """Skip connections are concatenated with the map in units of 16 bytes."""
    x, skips, given = hidden_states, res_hidden_states_tuple, cross_attention_kwargs
    if not _joins(block, x, skips) or (given or {}).get("scale") is not None:
        result: Tensor = CrossAttnUpBlock2D.forward(
            block, x, skips, temb, encoder_hidden_states, given, upsample_size, attention_mask, encoder_attention_mask
        )
        return result
    for resnet, attn in zip(block.resnets, block.attentions, strict=False):
        x, skips = _with_skip(x, skips[-1]), skips[:-1]
        x = _resnet_of_up(block, resnet, x, temb)
        x = attn(
            x,
            encoder_hidden_states=encoder_hidden_states,
            cross_attention_kwargs=given,
            attention_mask=attention_mask,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=False,
        )[0]
    return _upsampled(block, x, upsample_size)


@instead_of(UpBlock2D, "forward", _refuse_none)
def _up(
    block: UpBlock2D,
    hidden_states: Tensor,
    res_hidden_states_tuple: tuple[Tensor, ...],
    temb: Tensor | None = None,
    upsample_size: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """As ``_up_with_attention``."""
    x, skips = hidden_states, res_hidden_states_tuple
    if not _joins(block, x, skips) or args or kwargs:
        result: Tensor = UpBlock2D.forward(block, x, skips, temb, upsample_size, *args, **kwargs)
        return result
    for resnet in block.resnets:
        x, skips = _with_skip(x, skips[-1]), skips[:-1]
        x = _resnet_of_up(block, resnet, x, temb)
    return _upsampled(block, x, upsample_size)


def _with_skip(x: Tensor, skip: Tensor) -> Tensor:
    return joined(x, skip) if joins(x, skip) else torch.cat([x, skip], dim=1)


def _upsampled(block: Any, x: Tensor, size: int | None) -> Tensor:
    for upsampler in block.upsamplers or ():
        x = upsampler(x, size)
    return x


UP_WITH_ATTENTION = Form(_refuse_none, {"forward": _up_with_attention})
UP = Form(_refuse_none, {"forward": _up})


@instead_of(nn.GroupNorm, "forward", _refuse_none)
def _out_norm(norm: nn.GroupNorm, input: Tensor) -> Tensor:
    """The last norm of a U-Net as one op; on a GPU, torch would change the memory layout for it."""
    if input.dim() != 4 or input.dtype not in FLOATS or autocasts(input.device):
        result: Tensor = nn.GroupNorm.forward(norm, input)
        return result
    return _norm(norm, input, silu=False)


OUT_NORM = Form(_refuse_none, {"forward": _out_norm})


def _refuse_transformer(model: Transformer2DModel) -> str | None:
    if not model.is_input_continuous:
        return "its input is not a feature map"
    return altered((("norm", model.norm, nn.GroupNorm),))


@instead_of(Transformer2DModel, "_operate_on_continuous_inputs", _refuse_transformer)
def _tokens(model: Transformer2DModel, hidden_states: Tensor) -> tuple[Tensor, int]:
    """Group norm in one op."""
    if hidden_states.dtype not in FLOATS:
        given: tuple[Tensor, int] = Transformer2DModel._operate_on_continuous_inputs(model, hidden_states)
        return given
    batch, _, height, width = hidden_states.shape
    hidden = _norm(model.norm, hidden_states, silu=False)
    if not model.use_linear_projection:
        hidden = pointwise(model.proj_in, hidden)
    inner = hidden.shape[1]
    hidden = hidden.permute(0, 2, 3, 1).reshape(batch, height * width, inner)
    # Tokens in one block of memory here, or each of a block's norms and sums would copy them.
    return (model.proj_in(hidden) if model.use_linear_projection else hidden.contiguous()), inner


@instead_of(Transformer2DModel, "_get_output_for_continuous_inputs", _refuse_transformer)
def _image(
    model: Transformer2DModel,
    hidden_states: Tensor,
    residual: Tensor,
    batch_size: int,
    height: int,
    width: int,
    inner_dim: int,
) -> Tensor:
    """Tokens go back to the layout of the image they came from without a copy."""
    channels_last = residual.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def as_map(tokens: Tensor) -> Tensor:
        image = tokens.reshape(batch_size, height, width, -1).permute(0, 3, 1, 2)
        return image.contiguous(memory_format=layout)

    if model.use_linear_projection:
        return as_map(model.proj_out(hidden_states)) + residual
    result: Tensor = pointwise(model.proj_out, as_map(hidden_states)) + residual
    return result


TRANSFORMER = Form(
    _refuse_transformer, {"_operate_on_continuous_inputs": _tokens, "_get_output_for_continuous_inputs": _image}
)
