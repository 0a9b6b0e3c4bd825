# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn

from fastdistill.data.prompt_bank import EMBEDDINGS
from fastdistill.models.families.base import Condition, Family


class SD3(Family):
    """``encoder_hidden_states`` [L, D] (CLIP and T5 side by side), ``pooled_projections`` [P]."""

    name, kind, prediction_type = "sd3", SD3Transformer2DModel, "flow_prediction"

    def conditions(self, config: Mapping[str, Any]) -> dict[str, Condition]:
        return {
            EMBEDDINGS: Condition((None, config["joint_attention_dim"]), "joint_attention_dim"),
            "pooled_projections": Condition((config["pooled_projection_dim"],), "pooled_projection_dim"),
        }

    def thinned(self, config: dict[str, Any], kept: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        dual = config.get("dual_attention_layers") or ()
        own = tuple(i for i, source in enumerate(kept["transformer_blocks"]) if source in dual)
        return config | {"dual_attention_layers": own}

    def call(self, model: nn.Module, x_t: Tensor, timestep: Tensor, rows: Mapping[str, Tensor]) -> Any:
        return model(x_t, timestep=timestep, **rows)
