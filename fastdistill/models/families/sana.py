# SPDX-License-Identifier: Apache-2.0
"""Sana: linear attention over strongly compressed latents (Xie et al., arXiv 2410.10629)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
from torch import Tensor, nn

from fastdistill.data.prompt_bank import EMBEDDINGS
from fastdistill.models.families.base import Condition, Family, mask, unwrapped


class Sana(Family):
    """``encoder_hidden_states`` [L, D] (Gemma), ``encoder_attention_mask`` [L]; for Sana-Sprint also ``guidance`` (a
    number, which is multiplied by the model's ``guidance_embeds_scale``)."""

    name, kind, prediction_type = "sana", SanaTransformer2DModel, "flow_prediction"
    pipelines = ("SanaPipeline",)
    bins = ("diffusers.pipelines.sana.pipeline_sana", 32)
    encoded: ClassVar[Mapping[str, tuple[int, int]]] = {EMBEDDINGS: (0, 2), "encoder_attention_mask": (1, 3)}

    def conditions(self, config: Mapping[str, Any]) -> dict[str, Condition]:
        width = Condition((None, config["caption_channels"]), "caption_channels")
        found = {EMBEDDINGS: width, "encoder_attention_mask": mask()}
        if config.get("guidance_embeds"):
            found["guidance"] = Condition(())
        return found

    def narrowed(self, config: dict[str, Any], factor: float) -> dict[str, Any]:
        config = super().narrowed(config, factor)
        heads = max(1, round(factor * int(config["num_cross_attention_heads"])))
        return config | {"num_cross_attention_heads": heads, "cross_attention_dim": self.width(config)}

    def call(self, model: nn.Module, x_t: Tensor, timestep: Tensor, rows: Mapping[str, Tensor]) -> Any:
        config, given = unwrapped(model).config, dict(rows)
        if "guidance" in given:
            given["guidance"] = given["guidance"] * config["guidance_embeds_scale"]
        if (scale := config.get("timestep_scale", 1.0)) != 1.0:
            timestep = timestep * scale
        return model(x_t, timestep=timestep, **given)
