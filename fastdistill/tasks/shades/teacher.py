# SPDX-License-Identifier: Apache-2.0
"""The teacher of the task: the shipped weights of the digits, trained further. They are shipped too."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from pydantic import Field

from fastdistill.diffusion.distortion import recursion
from fastdistill.diffusion.grid import Grid
from fastdistill.documented import documented
from fastdistill.tasks.digits import teacher as digits
from fastdistill.tasks.digits.data import DIGITS, PROMPTS, SHAPE
from fastdistill.tasks.digits.judge import Judge
from fastdistill.tasks.digits.sampling import SCHEDULE
from fastdistill.tasks.digits.text_encoder import prompt_bank
from fastdistill.tasks.shades import data
from fastdistill.tasks.shades.judge import read, right
from fastdistill.tasks.shades.sampling import GRID, sample
from fastdistill.train.callbacks import Progress
from fastdistill.train.config import TrainConfig

WEIGHTS = Path(__file__).parent / "weights" / "teacher.safetensors"


@documented
@dataclass(frozen=True)
class TeacherConfig(digits.Recipe):
    """How the shipped weights were trained, from those of the digits."""

    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=800, batch=64, lr=3e-3, lr_schedule="cosine", warmup=50, ema_decay=0.995, seed=0, log_every=50
        )
    )
    null_probability: Annotated[float, Field(ge=0, le=1)] = 0.15
    """Fraction of prompts that are replaced by the null prompt."""
    images_per_prompt: Annotated[int, Field(ge=1)] = 8
    """Images per prompt (there are 80) for the evaluation after training."""
    output: str = "runs/shades-teacher"
    """Directory for checkpoints, metrics.jsonl and teacher.safetensors."""

    @property
    def shipped(self) -> Path:
        return WEIGHTS


def train_teacher(config: TeacherConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Like ``digits.teacher.train_teacher``."""
    made_from = {"data": data.fingerprint(), "start": digits.provenance()["sha256"]}
    lesson = digits.Lesson(lambda _: digits.load_teacher(), made_from, data.training, lambda m: judged(m, config))
    return digits.trained(config, lesson, progress)


def load_teacher(path: str | Path = WEIGHTS) -> UNet2DConditionModel:
    """The teacher from a file written by ``train_teacher``; like ``digits.teacher.load_teacher``."""
    return digits.load_teacher(path)


def provenance(path: str | Path = WEIGHTS) -> dict[str, Any]:
    """How the weights in a file were made."""
    return digits.provenance(path)


@torch.no_grad()
def judged(model: UNet2DConditionModel, config: TeacherConfig) -> dict[str, float]:
    """For images without guidance: the fractions with the right color and digit, and the mean of the tint along its
    color and its variance, both relative to the data; and the values of ``exact`` for color, mean and variance."""
    judge, bank = Judge(), prompt_bank().to(config.device)
    prompt = torch.arange(len(PROMPTS)).repeat_interleave(config.images_per_prompt)
    images = sample(model, bank, prompt, torch.arange(len(prompt)), config.train.seed)
    found = right(judge, images, prompt)
    mean, variance = moments(images, prompt)
    known = dict(zip(("exact_color", "exact_mean", "exact_variance"), exact(), strict=True))
    return {
        "color": float(found.color.double().mean()),
        "digit": float(found.digit.double().mean()),
        "mean": mean,
        "variance": variance,
        **known,
        "images": len(prompt),
    }


def moments(images: torch.Tensor, rows: torch.Tensor) -> tuple[float, float]:
    """Mean of the tint along its color, and variance of a channel within a color, over those of the held-out scans."""

    def of(images: torch.Tensor, rows: torch.Tensor) -> tuple[float, float]:
        along = read(images).tint * data.corners(rows)
        colors = rows // len(DIGITS)
        within = [along[colors == color].var(0).mean() for color in torch.unique(colors)]
        return float(along.mean()), float(torch.stack(within).mean())

    mean, variance = of(images, rows)
    real_mean, real_variance = of(*data.held_out())
    return mean / real_mean, variance / real_variance


def exact(grid: Grid | str = GRID) -> tuple[float, float, float]:
    """The results of exact scores of the tints on this grid without guidance: the fraction with the right color, and
    mean and variance of a channel relative to the data.

    Without guidance only the Gaussian of the prompt's color matters, with a mean of length ``data.norm``. Sampling
    starts from noise without any signal, which shortens the mean.
    """
    levels = Grid.parse(grid, SCHEDULE) if isinstance(grid, str) else grid
    length = data.norm()
    spread = (data.SPREAD * length) ** 2
    mean, variance = recursion(levels, 0.0, length, spread, length**2 + spread, start="noise")
    sign = 0.5 * math.erfc(-float(mean) / math.sqrt(2 * float(variance)))
    return sign ** SHAPE[0], float(mean) / length, float(variance) / spread
