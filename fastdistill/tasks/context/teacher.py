# SPDX-License-Identifier: Apache-2.0
"""The two teachers of the task: the shipped weights of the digits, trained further. Both are shipped.

"broad" was trained on digits before backgrounds of any hue, like a foundation model that has seen more than the data of
one classifier. "same" was trained only on the classifier's own data, where the hue tells the class. With 1,200 steps
instead of 400, the feature of "broad" depends less on the hue: at t = 500 the selectivity of five directions of
``up_blocks.0`` fell from .69 to .58 (40 images).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from pydantic import Field
from torch import Tensor

from fastdistill.data.prompt_bank import PromptBank
from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.inversion import round_trip
from fastdistill.documented import documented
from fastdistill.errors import InputError
from fastdistill.tasks.context import data
from fastdistill.tasks.context.measures import Judge, chroma, ink, within
from fastdistill.tasks.digits import teacher as digits
from fastdistill.tasks.digits.sampling import SCHEDULE as SCHEDULE
from fastdistill.tasks.digits.text_encoder import encoded
from fastdistill.tasks.shades.sampling import sample
from fastdistill.train.callbacks import Progress
from fastdistill.train.config import TrainConfig

Kind = Literal["broad", "same"]
_T_E, _STEPS = 650, 20  # for the round trip


def weights(kind: str = "broad") -> Path:
    """The file of a shipped teacher."""
    if kind not in get_args(Kind):
        raise InputError.of("kind", f"one of {', '.join(get_args(Kind))}", repr(kind))
    return Path(__file__).parent / "weights" / f"{kind}.safetensors"


@documented
@dataclass(frozen=True)
class TeacherConfig(digits.Recipe):
    """How the shipped weights were trained, from those of the digits."""

    kind: Kind = "broad"
    """broad: trained on backgrounds of any hue; same: on the classifier's data, where the hue depends on the digit."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=400, batch=64, lr=3e-3, lr_schedule="cosine", warmup=50, ema_decay=0.995, seed=0, log_every=50
        )
    )
    images_per_prompt: Annotated[int, Field(ge=2)] = 64
    """Images per prompt (there are 10) for the evaluation after training."""
    output: str = "runs/context-teacher"
    """Directory for checkpoints, metrics.jsonl and teacher.safetensors."""

    @property
    def shipped(self) -> Path:
        return weights(self.kind)


def train_teacher(config: TeacherConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Like ``digits.teacher.train_teacher``."""
    made_from = {"data": data.fingerprint(), "start": digits.provenance()["sha256"]}
    lesson = digits.Lesson(
        lambda _: digits.load_teacher(), made_from, lambda: _images(config.kind), lambda m: judged(m, config), prompts
    )
    return digits.trained(config, lesson, progress)


def load_teacher(kind: str = "broad") -> UNet2DConditionModel:
    """A shipped teacher; like ``digits.teacher.load_teacher``."""
    return digits.load_teacher(weights(kind))


def provenance(kind: str = "broad") -> dict[str, Any]:
    """How the weights of a shipped teacher were made."""
    return digits.provenance(weights(kind))


@cache
def _prompts() -> PromptBank:
    return PromptBank.build(data.PROMPTS, encoded, encoder={"text_encoder": "fastdistill.tasks.digits"})


def prompts(device: torch.device | str = "cpu") -> PromptBank:
    """The ten prompts, row = digit, then the null prompt."""
    return _prompts().to(device)


@torch.no_grad()
def judged(model: UNet2DConditionModel, config: TeacherConfig) -> dict[str, float]:
    """For images without guidance: the fraction with the right digit, and the variances of hue and ink within a class
    relative to the data. For held-out scans: the root mean square error of inversion and decoding."""
    bank = prompts(config.device)
    digit = torch.arange(len(data.PROMPTS)).repeat_interleave(config.images_per_prompt)
    images = sample(model, bank, digit, torch.arange(len(digit)), config.train.seed)
    real, real_digit = _images(config.kind)
    held_out = data.held_out("independent" if config.kind == "broad" else "same")
    x, rows = (t.to(config.device) for t in (held_out.images[:64], held_out.digit[:64]))
    grid = Grid.trailing(SCHEDULE, _STEPS, first=_T_E)
    return {
        "right": float(Judge().right(images, digit).double().mean()),
        "hue_variance": within(chroma(images), digit) / within(chroma(real), real_digit),
        "ink_variance": within(ink(images), digit) / within(ink(real), real_digit),
        "round_trip": float(round_trip(model, x, bank.embeddings[rows], grid).square().mean().sqrt()),
        "images": len(digit),
    }


def _images(kind: Kind) -> tuple[Tensor, Tensor]:
    scenes = data.broad() if kind == "broad" else data.students()
    return scenes.images, scenes.digit
