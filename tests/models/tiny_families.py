# SPDX-License-Identifier: Apache-2.0
"""A tiny model of every family, and banks for it."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.models.families import family_named, unwrapped

_STAGES = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 8,
    "sample_size": 8,
}
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "patch_size": 2}
_UNET: dict[str, Any] = {
    **_STAGES,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_SDXL: dict[str, Any] = {
    **_STAGES,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 10,
}
#: Family and configuration by name.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "sd": ("unet", _UNET),
    "lcm": ("unet", _UNET | {"time_cond_proj_dim": 6}),
    "sdxl": ("unet", _SDXL),
    "dit": ("dit", _HEADS | {"num_layers": 4, "num_embeds_ada_norm": 5, "out_channels": 8}),
    "pixart_alpha": ("pixart", _HEADS | {"num_layers": 4, "attention_head_dim": 12, "cross_attention_dim": 24,
                                         "caption_channels": 12, "use_additional_conditions": True}),
    "pixart_sigma": ("pixart", _HEADS | {"num_layers": 4, "cross_attention_dim": 16, "caption_channels": 12}),
    "sd3": ("sd3", _HEADS | {"num_layers": 4, "in_channels": 4, "out_channels": 4, "joint_attention_dim": 12,
                             "caption_projection_dim": 16, "pooled_projection_dim": 10, "pos_embed_max_size": 8}),
    "sd35": ("sd3", _HEADS | {"num_layers": 4, "in_channels": 4, "out_channels": 4, "joint_attention_dim": 12,
                              "caption_projection_dim": 16, "pooled_projection_dim": 10, "pos_embed_max_size": 8,
                              "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}),
    "flux": ("flux", {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8,
                      "num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 10,
                      "guidance_embeds": True, "axes_dims_rope": (2, 2, 4)}),
    "sana": ("sana", {"in_channels": 4, "out_channels": 4, "num_layers": 4, "num_attention_heads": 2,
                      "attention_head_dim": 8, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8,
                      "cross_attention_dim": 16, "caption_channels": 12, "sample_size": 8}),
}  # fmt: skip
#: The taps between a student and a teacher of the same structure.
TAPS = {"unet": "up_blocks.0", "flux": "transformer_blocks.1[1]", "sd3": "transformer_blocks.1[1]"}


def model(name: str, seed: int = 0) -> nn.Module:
    family, config = TINY[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: nn.Module = family_named(family).kind(**config)
        for parameter in made.parameters():  # DiT and Sana have zeros, behind which errors would not be visible
            parameter.data += 0.02 * torch.randn(parameter.shape)
    return made


def tap(name: str) -> str:
    return TAPS.get(TINY[name][0], "transformer_blocks.1")


def cache(name: str, rows: int = 6) -> LatentCache:
    channels = family_named(TINY[name][0]).channels(model(name).config)  # type: ignore[arg-type]
    return LatentCache(_random("latents", rows, channels, 8, 8), torch.arange(rows) % 3)


def banks(made: nn.Module, prompts: int = 3) -> dict[str, Tensor]:
    """All inputs of a model, including the optional ones."""
    config, found = unwrapped(made).config, {}
    family = next(f for f, _ in TINY.values() if isinstance(unwrapped(made), family_named(f).kind))
    for bank, condition in family_named(family).conditions(config).items():
        shape = [{"text_embeds": 10, "time_ids": 6}.get(bank, 5) if size is None else size for size in condition.shape]
        if condition.integer:
            high = condition.limit or (2 if bank.endswith("mask") else 64)
            found[bank] = torch.randint(high, (prompts + 1, *shape), generator=torch.Generator().manual_seed(1))
        else:
            found[bank] = _random(bank, prompts + 1, *shape)
        if bank.endswith("mask"):
            found[bank][:, 0] = 1
    return found


def bank(name: str, prompts: int = 3) -> PromptBank:
    return PromptBank(banks(model(name), prompts), [f"prompt {i}" for i in range(prompts)])


def _random(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
