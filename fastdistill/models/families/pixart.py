# SPDX-License-Identifier: Apache-2.0
"""PixArt-alpha and PixArt-sigma (Chen et al., arXiv 2310.00426 and 2403.04692)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import Tensor, nn

from fastdistill.data.prompt_bank import EMBEDDINGS
from fastdistill.errors import InputError
from fastdistill.models.families.base import Condition, Family, mask

_SIZES = ("resolution", "aspect_ratio")


class PixArt(Family):
    """``encoder_hidden_states`` [L, D] (T5), ``encoder_attention_mask`` [L]; for PixArt-alpha at 1024 pixels also
    ``resolution`` [2] (height, width) and ``aspect_ratio`` [1] (height / width)."""

    name, kind = "pixart", PixArtTransformer2DModel
    products = ("attn1", "attn2", "ff")
    pipelines, aliases = ("PixArtAlphaPipeline", "PixArtSigmaPipeline"), ("Transformer2DModel",)
    bins = ("diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma", 8)
    encoded: ClassVar[Mapping[str, tuple[int, int]]] = {EMBEDDINGS: (0, 2), "encoder_attention_mask": (1, 3)}

    def conditions(self, config: Mapping[str, Any]) -> dict[str, Condition]:
        field = "cross_attention_dim" if config.get("caption_channels") is None else "caption_channels"
        found = {EMBEDDINGS: Condition((None, config[field]), field), "encoder_attention_mask": mask()}
        sizes = config.get("use_additional_conditions")
        if config["sample_size"] == 128 if sizes is None else sizes:
            found["resolution"], found["aspect_ratio"] = Condition((2,), integer=True), Condition((1,))
        return found

    def narrowed(self, config: dict[str, Any], factor: float) -> dict[str, Any]:
        config = super().narrowed(config, factor)
        width = self.width(config)
        if "resolution" in self.conditions(config) and width % 3:
            raise InputError.of("spec.width", "a width that three embeddings of sizes share", width)
        return config if config.get("caption_channels") is None else config | {"cross_attention_dim": width}

    def added(
        self, pipeline: Any, config: Mapping[str, Any], size: tuple[int, int] | None, guidance_scale: float
    ) -> dict[str, Tensor]:
        return self.of_size(config, size or self.size(config, pipeline.vae_scale_factor))

    def of_size(self, config: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Tensor]:
        if "resolution" not in self.conditions(config):
            return {}
        return {"resolution": torch.tensor(size), "aspect_ratio": torch.tensor([size[0] / size[1]])}

    def call(self, model: nn.Module, x_t: Tensor, timestep: Tensor, rows: Mapping[str, Tensor]) -> Any:
        return model(
            x_t,
            encoder_hidden_states=rows[EMBEDDINGS],
            timestep=timestep,
            added_cond_kwargs={name: rows.get(name) for name in _SIZES},
            encoder_attention_mask=rows.get("encoder_attention_mask"),
        )
