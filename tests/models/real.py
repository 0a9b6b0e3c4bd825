# SPDX-License-Identifier: Apache-2.0
"""Published models on the meta device: their configurations are in ``configs``, with their sources."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.models.families import EMBEDDINGS, Family, family_named

#: Family and side length of the latents, by the name of a file in ``configs``.
MODELS: dict[str, tuple[str, int]] = {
    "sd15": ("unet", 64),
    "sd21_v": ("unet", 96),
    "sdxl": ("unet", 128),
    "dit_xl_2": ("dit", 32),
    "pixart_alpha": ("pixart", 128),
    "pixart_sigma": ("pixart", 128),
    "sd3_medium": ("sd3", 128),
    "sd35_medium": ("sd3", 128),
    "sd35_large": ("sd3", 128),
    "flux_dev": ("flux", 128),
    "sana": ("sana", 32),
    "sana15": ("sana", 32),
}
_SIZES = {"text_embeds": 1280, "time_ids": 6}


def published(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(__file__).parent / "configs" / f"{name}.json").read_text())
    return found


def family(name: str) -> Family:
    return family_named(MODELS[name][0])


@functools.cache
def teacher(name: str) -> nn.Module:
    kind: Any = family(name).kind
    with torch.device("meta"):
        made: nn.Module = kind.from_config(published(name)["config"])
    return made


def inputs(name: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The arguments of a call with two samples: latents, timesteps, rows of a prompt."""
    side, config = MODELS[name][1], teacher(name).config
    with torch.device("meta"):
        x = torch.empty(2, family(name).channels(config), side, side)  # type: ignore[arg-type]
        rows = {}
        for bank, condition in family(name).conditions(config).items():  # type: ignore[arg-type]
            length = 77 if bank in (EMBEDDINGS, "encoder_attention_mask") else _SIZES.get(bank, 0)
            shape = [length if size is None else size for size in condition.shape]
            rows[bank] = torch.empty(2, *shape, dtype=torch.int64 if condition.limit else torch.float32)
        return x, torch.empty(2), rows


def forward(name: str, model: nn.Module) -> Any:
    return family(name).call(model, *inputs(name))


def count(model: nn.Module) -> int:
    """The number of values in a checkpoint of the model."""
    return sum(tensor.numel() for tensor in model.state_dict().values())
