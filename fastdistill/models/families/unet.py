# SPDX-License-Identifier: Apache-2.0
"""The U-Nets of Stable Diffusion 1.x, 2.x and XL, and their distilled relatives (SSD-1B, Vega, KOALA, LCM)."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from fastdistill.data.prompt_bank import EMBEDDINGS
from fastdistill.errors import InputError
from fastdistill.models.families.base import Condition, Family, mask, unwrapped

_ADDED = ("text_embeds", "time_ids")


class UNet(Family):
    """``encoder_hidden_states`` [L, D]; for SDXL also ``text_embeds`` [P] and ``time_ids`` [6] (height and width before
    cropping, crop position, target height and width); ``class_labels`` and ``timestep_cond`` (the embedding of a
    guidance scale) if the model has them."""

    name, kind, part, blocks = "unet", UNet2DConditionModel, "unet", {}
    pipelines = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline")
    encoded: ClassVar[Mapping[str, tuple[int, int]]] = {EMBEDDINGS: (0, 1), "text_embeds": (2, 3)}
    guidance = "time_cond_proj_dim", 256, "time_embedding.cond_proj"

    def conditions(self, config: Mapping[str, Any]) -> dict[str, Condition]:
        field = "cross_attention_dim" if config.get("encoder_hid_dim") is None else "encoder_hid_dim"
        width = config[field] if isinstance(config[field], int) else None
        found = {EMBEDDINGS: Condition((None, width), field), "encoder_attention_mask": mask()}
        if config.get("addition_embed_type") == "text_time":
            found["text_embeds"] = Condition((None,))
            found["time_ids"] = Condition((None,), integer=True)
        if (classes := config.get("num_class_embeds")) is not None:
            found["class_labels"] = Condition((), "num_class_embeds", True, classes)
        elif config.get("class_embed_type") in ("projection", "simple_projection"):
            projected = "projection_class_embeddings_input_dim"
            found["class_labels"] = Condition((config[projected],), projected)
        elif config.get("class_embed_type") == "timestep":
            found["class_labels"] = Condition((), integer=True)
        if (guidance := config.get("time_cond_proj_dim")) is not None:
            found["timestep_cond"] = Condition((guidance,), "time_cond_proj_dim", required=False)
        return found

    def ratio(self, student: Mapping[str, Any], teacher: Mapping[str, Any]) -> Fraction:
        """The ratio must be the same in every stage; otherwise the student's weights are no slices of the teacher's."""
        own, theirs = student["block_out_channels"], teacher["block_out_channels"]
        found = {Fraction(a, b) for a, b in zip(own, theirs, strict=False)}
        if len(found) > 1:
            rule = f"one and the same part of the teacher's {tuple(theirs)} to copy its weights (use init='random')"
            raise InputError.of("student.block_out_channels", rule, tuple(own))
        return found.pop()

    def check(self, name: str, model: nn.Module, latents: tuple[int, ...], banks: Mapping[str, Any]) -> None:
        super().check(name, model, latents, banks)
        config = unwrapped(model).config
        if not all(bank in banks for bank in _ADDED):
            return
        ids, field = banks["time_ids"].shape[-1], "projection_class_embeddings_input_dim"
        width = config[field] - ids * config["addition_time_embed_dim"]
        if banks["text_embeds"].shape[-1] != width:
            rule = f"rows of width {width} ({field} of the {name}, less {ids} time_ids)"
            raise InputError.of("prompts['text_embeds']", rule, banks["text_embeds"].shape[-1])

    def row(self, config: Mapping[str, Any], kind: str, longest: int) -> dict[str, Tensor]:
        found = super().row(config, kind, longest)
        if all(name in found for name in _ADDED):
            width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            found["text_embeds"] = torch.empty(width, device="meta")
            found["time_ids"] = torch.empty(6, dtype=torch.int64, device="meta")
        return found

    def scheduler(self, kind: str, scheduler: Any) -> Any:
        if kind == "StableDiffusionPipeline":  # it corrects configurations from before these settings
            mended = {"steps_offset": 1, "clip_sample": False}
            scheduler.register_to_config(**{name: v for name, v in mended.items() if name in scheduler.config})
        return scheduler

    def added(
        self, pipeline: Any, config: Mapping[str, Any], size: tuple[int, int] | None, guidance_scale: float
    ) -> dict[str, Tensor]:
        found = self.of_size(config, size or self.size(config, pipeline.vae_scale_factor))
        if config.get("time_cond_proj_dim") is not None:
            found["timestep_cond"] = self.guidance_rows(config, torch.tensor([guidance_scale - 1]))[0]
        return found

    def guidance_rows(self, config: Mapping[str, Any], w: Tensor) -> Tensor:
        """[B, time_cond_proj_dim]: sines and cosines of 1000 w f_i, f_i = 10000^(-i / (n - 1)) (Meng et al. 2210.03142;
        ``get_guidance_scale_embedding`` in the pipelines of diffusers)."""
        dim = config["time_cond_proj_dim"]
        rate = torch.full((), 10000.0, device=w.device).log() / (dim // 2 - 1)
        phase = (w * 1000.0)[:, None] * (torch.arange(dim // 2, dtype=torch.float32, device=w.device) * -rate).exp()
        return nn.functional.pad(torch.cat([phase.sin(), phase.cos()], 1), (0, dim % 2))

    def of_size(self, config: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Tensor]:
        return (
            {"time_ids": torch.tensor([*size, 0, 0, *size])} if config.get("addition_embed_type") == "text_time" else {}
        )

    def call(self, model: nn.Module, x_t: Tensor, timestep: Tensor, rows: Mapping[str, Tensor]) -> Any:
        given = {name: row for name, row in rows.items() if name not in _ADDED}
        if added := {name: rows[name] for name in _ADDED if name in rows}:
            given["added_cond_kwargs"] = added  # type: ignore[assignment]
        return model(x_t, timestep, **given)
