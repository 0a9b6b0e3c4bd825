# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn

from fastdistill.data.prompt_bank import EMBEDDINGS
from fastdistill.models.families.base import Condition, Family

_OF_PROMPT = re.compile(r"transformer_blocks\.\d+\.norm1_context\.linear\.(weight|bias)")


class SD3(Family):
    """``encoder_hidden_states`` [L, D] (CLIP and T5 side by side), ``pooled_projections`` [P]."""

    name, kind, prediction_type = "sd3", SD3Transformer2DModel, "flow_prediction"
    products = ("attn", "attn2", "ff", "ff_context")
    pipelines = ("StableDiffusion3Pipeline",)
    encoded: ClassVar[Mapping[str, tuple[int, int]]] = {EMBEDDINGS: (0, 1), "pooled_projections": (2, 3)}

    def conditions(self, config: Mapping[str, Any]) -> dict[str, Condition]:
        return {
            EMBEDDINGS: Condition((None, config["joint_attention_dim"]), "joint_attention_dim"),
            "pooled_projections": Condition((config["pooled_projection_dim"],), "pooled_projection_dim"),
        }

    def length(self, kind: str, longest: int) -> int:
        return longest + super().length(kind, longest)

    def thinned(self, config: dict[str, Any], kept: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        dual = config.get("dual_attention_layers") or ()
        own = tuple(i for i, source in enumerate(kept["transformer_blocks"]) if source in dual)
        return config | {"dual_attention_layers": own}

    def narrowed(self, config: dict[str, Any], factor: float) -> dict[str, Any]:
        config = super().narrowed(config, factor)
        return config | {"caption_projection_dim": self.width(config)}

    def rows(self, source: str, own: tuple[int, ...], theirs: tuple[int, ...], ratio: Fraction) -> Tensor | None:
        """The last block modulates the prompt only by (scale, shift), the others by six: (shift, scale, ...)."""
        if _OF_PROMPT.fullmatch(source) is None or Fraction(own[0], theirs[0]) != ratio / 3:
            return None
        channels = theirs[0] // 6
        return torch.arange(2 * channels, device="cpu").roll(channels)

    def call(self, model: nn.Module, x_t: Tensor, timestep: Tensor, rows: Mapping[str, Tensor]) -> Any:
        return model(x_t, timestep=timestep, **rows)
