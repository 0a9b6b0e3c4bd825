# SPDX-License-Identifier: Apache-2.0
"""Settings of the digits experiment, from which the command line options and YAML fields are made."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from fastdistill.documented import documented
from fastdistill.models import StudentSpec
from fastdistill.ops.feature_match import Distance
from fastdistill.tasks.digits.sampling import Sampling
from fastdistill.train.config import PreviewConfig, TrainConfig

#: The students to compare: name -> p(t) and its parameters. Everything else is the same for all.
STUDENTS: dict[str, tuple[str, dict[str, float]]] = {
    "random_conditioning": ("exp", {}),
    "paired": ("const", {"value": 0.0}),
}


@documented
@dataclass(frozen=True)
class DigitsConfig:
    """Compare random conditioning with paired prompts on handwritten digits, using the shipped teacher."""

    output: str = "runs/digits"
    """Directory of the experiment; an interrupted experiment in it is continued."""
    quick: bool = False
    """Short version, one minute instead of ten: fewer steps, latents and images (default output runs/digits-quick)."""
    seeds: Annotated[int, Field(ge=1, le=100)] = 1
    """Students to train of each kind; with several, results are mean and standard deviation."""
    student: Literal["narrow", "blocks"] = "narrow"
    """narrow: fewer channels, from scratch, 1x1 adapters at the taps. blocks: no mid block, the teacher's weights."""
    channels: tuple[int, int] = (24, 48)
    """Channels per stage of the narrow student (the teacher has 32, 64)."""
    cache_images: Annotated[int, Field(ge=48, le=1_000_000)] = 1536
    """Latents that the teacher generates, distributed over the 48 seen prompts."""
    images_per_prompt: Annotated[int, Field(ge=1, le=1000)] = 16
    """Images per prompt (there are 80) to evaluate each model."""
    feature_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Weight of the feature loss, relative to the output loss."""
    feature_distance: Distance = "mse"
    """normalized_mse: divided by the teacher's mean square; huber: linear above 1; cosine: per sample."""
    null_probability: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Fraction of prompts that are replaced by the null prompt."""
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
            preview=PreviewConfig(guidance_scale=2.5, clip_sample=1.2),
        )
    )
    sampling: Sampling = Sampling()
    workers: Annotated[int, Field(ge=1, le=64)] = field(default_factory=lambda: min(2, os.cpu_count() or 1))
    """Processes to run at the same time, each with one model."""
    threads: Annotated[int, Field(ge=1, le=os.cpu_count() or 1)] = 1
    """CPU threads per process; more than one was slower on small machines."""
    device: str = "auto"
    """Device to run on; auto: a GPU if there is one, else the CPU."""

    def resolved(self) -> DigitsConfig:
        """The configuration with ``quick`` applied and ``device`` resolved."""
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
