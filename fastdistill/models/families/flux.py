# SPDX-License-Identifier: Apache-2.0
"""Flux: a transformer over packed latents with rotary positions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn

from fastdistill.data.prompt_bank import EMBEDDINGS
from fastdistill.models.families.base import Condition, Family


def packed(x: Tensor) -> Tensor:
    """[B, C, H, W] -> tokens [B, H/2 * W/2, 4 C], each a 2 x 2 square of the latent."""
    B, C, H, W = x.shape
    return x.view(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, H * W // 4, C * 4)


def unpacked(tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of ``packed``, for latents of ``shape`` [B, C, H, W]."""
    B, C, H, W = shape
    return tokens.view(B, H // 2, W // 2, C, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)


def positions(height: int, width: int, device: torch.device) -> Tensor:
    """[height * width, 3] float32: (0, row, column) of each token of an image."""
    ids = torch.zeros(height, width, 3, device=device, dtype=torch.float32)
    ids[..., 1] += torch.arange(height, device=device)[:, None]
    ids[..., 2] += torch.arange(width, device=device)
    return ids.view(height * width, 3)


class Flux(Family):
    """Latents [C, H, W] with even H and W, which are packed here; ``encoder_hidden_states`` [L, D] (T5),
    ``pooled_projections`` [P] (CLIP); for guidance-distilled models also ``guidance`` (a number, such as 3.5)."""

    name, kind, prediction_type = "flux", FluxTransformer2DModel, "flow_prediction"
    products = ("attn", "ff", "ff_context", "proj_mlp", "proj_out")
    blocks: ClassVar[Mapping[str, str]] = {
        "transformer_blocks": "num_layers",
        "single_transformer_blocks": "num_single_layers",
    }
    of_channels = "in_channels / 4"
    pipelines = ("FluxPipeline",)
    encoded: ClassVar[Mapping[str, tuple[int, int]]] = {EMBEDDINGS: (0, 0), "pooled_projections": (1, 1)}
    guidance = "guidance_embeds", True, "time_text_embed.guidance_embedder"

    def conditions(self, config: Mapping[str, Any]) -> dict[str, Condition]:
        found = {
            EMBEDDINGS: Condition((None, config["joint_attention_dim"]), "joint_attention_dim"),
            "pooled_projections": Condition((config["pooled_projection_dim"],), "pooled_projection_dim"),
        }
        if config.get("guidance_embeds"):
            found["guidance"] = Condition(())
        return found

    def channels(self, config: Mapping[str, Any]) -> int:
        return int(config["in_channels"]) // 4

    def patch(self, config: Mapping[str, Any]) -> int:
        return 2

    def size(self, config: Mapping[str, Any], factor: int) -> tuple[int, int]:
        return 128 * factor, 128 * factor

    def guided(self, config: Mapping[str, Any], guidance_scale: float) -> float:
        """No guidance: its pipeline passes the scale to models with this input, and ignores it for others."""
        return 1.0

    def guidance_rows(self, config: Mapping[str, Any], w: Tensor) -> Tensor:
        """[B]: the scale g = 1 + w itself, which the model embeds."""
        return 1 + w

    def sigmas(self, steps: int) -> list[float]:
        return [1 - i / steps for i in range(steps)]

    def heads(self, key: str) -> tuple[str, int] | None:
        """Single blocks project an attention's heads and the feed-forward's channels, in this order, in one layer."""
        found = re.fullmatch(r"(single_transformer_blocks\.\d+)\.proj_out\.weight", key)
        return super().heads(key) if found is None else (f"{found[1]}.attn", 1)

    def call(self, model: nn.Module, x_t: Tensor, timestep: Tensor, rows: Mapping[str, Tensor]) -> Any:
        height, width = x_t.shape[-2] // 2, x_t.shape[-1] // 2
        output = model(
            packed(x_t),
            timestep=timestep / 1000,  # the model multiplies by 1000
            img_ids=positions(height, width, x_t.device),
            txt_ids=torch.zeros(rows[EMBEDDINGS].shape[1], 3, device=x_t.device, dtype=torch.float32),
            return_dict=False,
            **rows,
        )[0]
        return unpacked(output, tuple(x_t.shape))
