# SPDX-License-Identifier: Apache-2.0
"""Small U-Nets with the structures that students are made for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

SD1: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
#: A small SD-1.x: the same blocks and the same ratios of channels.
SMALL: dict[str, Any] = {
    "block_out_channels": (8, 16, 32, 32),
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}
#: The digits task: two stages with one layer each.
DIGITS: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}


@pytest.fixture(scope="session")
def sd1() -> UNet2DConditionModel:
    """SD-1.x on the meta device."""
    with torch.device("meta"):
        return UNet2DConditionModel(**SD1)


@pytest.fixture
def small() -> Callable[..., UNet2DConditionModel]:
    def make(**changes: Any) -> UNet2DConditionModel:
        torch.manual_seed(0)
        return UNet2DConditionModel(**{**SMALL, **changes})

    return make


@pytest.fixture
def digits() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**DIGITS)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Of this process alone, on a CPU."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def inputs(model: UNet2DConditionModel, size: int = 8, batch: int = 2, length: int = 3) -> dict[str, torch.Tensor]:
    """Arguments of a forward, on the model's device."""
    device = next(model.parameters()).device
    random = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, model.config["in_channels"], size, size, generator=random)
    prompt = torch.randn(batch, length, model.config["cross_attention_dim"], generator=random)
    return {
        "sample": sample.to(device),
        "timestep": torch.arange(batch, device=device) * 100,
        "encoder_hidden_states": prompt.to(device),
    }


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny pipeline, by its name in ``tiny_pipelines``."""

    def folder(name: str) -> Path:
        from tests.models import tiny_pipelines

        if name != "dit":
            pytest.importorskip("transformers")
        return tiny_pipelines.saver(tmp_path_factory)(name)

    return folder
