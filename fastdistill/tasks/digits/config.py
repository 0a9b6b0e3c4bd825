# SPDX-License-Identifier: Apache-2.0
"""Settings of the digits experiment; the command line and YAML derive from them."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from fastdistill.models import StudentSpec
from fastdistill.ops.feature_match import Distance
from fastdistill.tasks.digits.sampling import Sampling
from fastdistill.train.config import TrainConfig

#: The students that are compared: name -> p(t) and its parameters. All else is equal.
STUDENTS: dict[str, tuple[str, dict[str, float]]] = {
    "random_conditioning": ("exp", {}),
    "paired": ("const", {"value": 0.0}),
}


@dataclass(frozen=True)
class DigitsConfig:
    """Random conditioning against paired prompts on handwritten digits, with the shipped teacher."""

    output: str = "runs/digits"
    """Directory of the experiment; an interrupted one is gone on with."""
    quick: bool = False
    """About a minute instead of ten: fewer steps, latents and judged images (in runs/digits-quick by default)."""
    seeds: Annotated[int, Field(ge=1, le=100)] = 1
    """Students trained of each kind; several give mean and spread."""
    student: Literal["narrow", "blocks"] = "narrow"
    """narrow: fewer channels, from scratch, taps through 1x1 adapters. blocks: no mid block, the teacher's weights."""
    channels: tuple[int, int] = (24, 48)
    """Channels of the narrow student's stages (the teacher has 32, 64)."""
    cache_images: Annotated[int, Field(ge=48, le=1_000_000)] = 1536
    """Latents that the teacher makes for the 48 seen prompts, in turn."""
    images_per_prompt: Annotated[int, Field(ge=1, le=1000)] = 16
    """Images of each of the 80 prompts by which a model is judged."""
    feature_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Weight of the feature loss; the output loss has 1."""
    feature_distance: Distance = "mse"
    """normalized_mse: over the teacher's mean square; huber: linear beyond 1; cosine: directions, by sample."""
    null_probability: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of prompts replaced by the null prompt."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=1500,
            batch=64,
            lr=4e-3,
            lr_schedule="cosine",
            warmup=50,
            ema_decay=0.995,
            log_every=25,
            checkpoint_every=100,
        )
    )
    sampling: Sampling = Sampling()
    workers: Annotated[int, Field(ge=1, le=64)] = field(default_factory=lambda: min(2, os.cpu_count() or 1))
    """Processes side by side, one model each."""
    threads: Annotated[int, Field(ge=1, le=os.cpu_count() or 1)] = 1
    """CPU threads of a process; more than one was slower on small machines."""
    device: str = "auto"
    """Where to compute; auto takes a GPU when there is one."""

    def resolved(self) -> DigitsConfig:
        """With ``quick`` put into effect and the device named."""
        import torch

        config = self
        if config.device == "auto":
            config = dataclasses.replace(config, device="cuda" if torch.cuda.is_available() else "cpu")
        if config.quick:
            output = "runs/digits-quick" if config.output == DigitsConfig.output else config.output
            train = dataclasses.replace(config.train, steps=min(config.train.steps, 160), warmup=20)
            config = dataclasses.replace(config, output=output, train=train, cache_images=384, images_per_prompt=3)
        return config

    def spec(self) -> StudentSpec:
        if self.student == "narrow":
            return StudentSpec(block_out_channels=self.channels)
        return StudentSpec(remove_mid=True)
