# SPDX-License-Identifier: Apache-2.0
"""Settings of the guidance experiment; they define the command line options and the YAML fields."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from fastdistill.documented import documented
from fastdistill.tasks.guidance.config import WORLDS, World
from fastdistill.tasks.guidance.diagnose import DigitsDiagnosis, ShadesDiagnosis
from fastdistill.train.config import TrainConfig

Weight = Annotated[float, Field(allow_inf_nan=False)]
#: What ``quick`` changes.
_QUICK: dict[str, Any] = {
    "output": "runs/guidance-quick",
    "constants": (0.0, 1.0),
    "windows": ("4@8,-1@2,0",),
    "student": "4@8,-1@2,0",
    "grid": "karras:15@30..0.09",
    "scales": (0.0, 2.0),
    "images_per_prompt": 3,
    "cache_images": 160,
}
_QUICK_STEPS = 60
#: What ``full`` changes: one more constant, because the curve of the constants is interpolated linearly between them.
_FULL: dict[str, Any] = {"constants": (0.0, 0.5, 1.0, 1.5, 2.0, 4.0)}


@documented
@dataclass(frozen=True)
class DemoConfig:
    """Measure what schedules of guidance do to models, and train students that make guided images with one pass."""

    output: str = "runs/guidance"
    """Directory of the experiment; an interrupted experiment in it is continued."""
    quick: bool = False
    """Short version, a minute (default output runs/guidance-quick)."""
    full: bool = False
    """Longer version: one more constant, a student trained on noised images, students with random conditioning."""
    seeds: Annotated[int, Field(ge=1, le=100)] = 1
    """Number of seeds for the images, and of students to train of each kind."""
    constants: Annotated[tuple[Weight, ...], Field(min_length=2)] = (0.0, 0.5, 1.0, 2.0, 4.0)
    """Constant guidance weights that windows are compared with; 0 must be one of them."""
    windows: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "4@8,-1@2,0",
        "8@10,-1@2,0",
        "11.2@12,-1@1.5,0",
        "8@8,-1@2,0",
    )
    """Schedules for the teacher of the shades, in addition to the constants."""
    student: str = "8@8,-1@2,0"
    """The schedule that a student learns."""
    scales: Annotated[tuple[Weight, ...], Field(min_length=2)] = (0.0, 1.0, 2.0, 4.0)
    """Weights at which the student with a weight input is measured; it learns all weights between the extremes."""
    grid: str = "karras:30@30..0.09"
    """Noise levels of the sampler for the shades."""
    images_per_prompt: Annotated[int, Field(ge=1, le=1000)] = 8
    """Images per prompt (there are 80), model and seed."""
    cache_images: Annotated[int, Field(ge=80, le=1_000_000)] = 1536
    """Number of the teacher's images that a student learns from."""
    worlds: Annotated[tuple[World, ...], Field(min_length=1)] = WORLDS
    """Distributions with exact scores to measure."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=500,
            batch=64,
            lr=1e-3,
            lr_schedule="cosine",
            warmup=20,
            ema_decay=0.99,
            log_every=25,
            checkpoint_every=100,
        )
    )
    workers: Annotated[int, Field(ge=1, le=64)] = field(default_factory=lambda: min(2, os.cpu_count() or 1))
    """Processes to run at the same time."""
    threads: Annotated[int, Field(ge=1, le=os.cpu_count() or 1)] = 1
    """CPU threads per process; more than one was slower on small machines."""
    device: str = "auto"
    """Device to run on; auto: a GPU if there is one, else the CPU."""

    def shades(self) -> ShadesDiagnosis:
        """How the shades' teacher is measured."""
        texts = dict.fromkeys((*(f"{w:g}" for w in self.constants), *self.windows, self.student))
        config = ShadesDiagnosis(schedules=tuple(texts), grid=self.grid, images_per_prompt=self.images_per_prompt)
        return dataclasses.replace(config, **self._shared())

    def digits(self) -> ShadesDiagnosis:
        """How the digits' teacher is measured: with at most five images per prompt, which is enough for constants."""
        config = DigitsDiagnosis(images_per_prompt=5, quick=self.quick).resolved()
        number = min(config.images_per_prompt, self.images_per_prompt)
        return dataclasses.replace(config, images_per_prompt=number, **self._shared())

    def _shared(self) -> dict[str, Any]:
        return {"seeds": self.seeds, "threads": self.threads, "device": self.device}

    def resolved(self) -> DemoConfig:
        """The configuration with ``quick`` applied and ``device`` resolved."""
        import torch

        config, default = self, DemoConfig()
        changes = (_FULL if config.full else {}) | (_QUICK if config.quick else {})
        given = {name: value for name, value in changes.items() if getattr(config, name) == getattr(default, name)}
        config = dataclasses.replace(config, **given)
        if config.device == "auto":
            config = dataclasses.replace(config, device="cuda" if torch.cuda.is_available() else "cpu")
        if config.quick:
            train = dataclasses.replace(config.train, steps=min(config.train.steps, _QUICK_STEPS), warmup=5)
            config = dataclasses.replace(config, train=train)
        return config
