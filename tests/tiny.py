# SPDX-License-Identifier: Apache-2.0
"""A model with three layers and inputs for time and prompt, and banks for it: cheap to train and to compile."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.diffusion.flow import FlowSchedule
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.distill import RandomConditioning, Weights
from fastdistill.models import families
from fastdistill.train import DistillTrainer, TrainConfig

SCHEDULE = NoiseSchedule.linear(50)
LAYERS = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}  # by the number of dimensions


class Net(nn.Module):
    """Latents [B, 4, ...] of 0 to 3 dimensions; ``mid`` has ``width`` channels."""

    def __init__(self, width: int = 6, dimensions: int = 2, seed: int = 0) -> None:
        super().__init__()
        layer, size = LAYERS[dimensions], () if dimensions == 0 else (1,)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.mid, self.last = layer(4, width, *size), layer(width, width, *size), layer(width, 4, *size)
            self.time, self.prompt = nn.Linear(1, width), nn.Linear(6, width)

    def forward(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Any:
        return self.last(self.features(x, timestep, encoder_hidden_states))

    def features(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        bias = self.time(timestep[:, None].to(x.dtype) / 50) + self.prompt(prompt.mean(1))
        bias = bias.reshape(*bias.shape, *[1] * (x.ndim - 2))
        features: Tensor = self.mid(torch.tanh(self.first(x) + bias))
        return features


def packed(model: nn.Module) -> nn.Module:
    """Its linear layers with torch's int8 weights, which are not parameters."""
    quantization = pytest.importorskip("torch.ao.quantization")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch moves this to torchao
        made: nn.Module = quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    return made


def cache(dimensions: int = 2, dtype: torch.dtype = torch.float32) -> LatentCache:
    latents = torch.randn(8, 4, *[5, 3, 2][:dimensions], generator=torch.Generator().manual_seed(1))
    return LatentCache(latents.to(dtype), torch.arange(8) % 2)


def bank(dtype: torch.dtype = torch.float32) -> PromptBank:
    rows = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(2))
    return PromptBank(rows.to(dtype), ["a", "b"])


def features(*pairs: tuple[str, str], **options: Any) -> RandomConditioning:
    """All losses, with these taps (none given: the middle layers)."""
    return RandomConditioning(weights=Weights(1.0, 0.5, 0.25), taps=pairs or (("mid", "mid"),), **options)


def trainer(teacher: Any = None, student: Any = None, objective: Any = None, **given: Any) -> DistillTrainer:
    """Data, ``device``, ``call``, ``decode``, ``preview_prompts``, ``schedule`` are passed to the trainer; the rest are
    fields of its configuration. The default schedule is that of the teacher's family."""
    family = None if teacher is None else families.find(teacher)
    flow = family is not None and family.prediction_type == "flow_prediction"
    arguments = {
        "latents": given.pop("latents", None) or cache(),
        "prompts": given.pop("prompts", None) or bank(),
        "device": given.pop("device", None),
        "call": given.pop("call", None),
        "decode": given.pop("decode", None),
        "preview_prompts": given.pop("preview_prompts", None),
        "schedule": given.pop("schedule", FlowSchedule(len(SCHEDULE)) if flow else SCHEDULE),
    }
    config = TrainConfig(**({"steps": 2, "batch": 4, "lr": 1e-3, "log_every": 1} | given))
    models = Net() if teacher is None else teacher, Net(seed=1) if student is None else student
    return DistillTrainer(*models, objective=objective or features(), config=config, **arguments)
