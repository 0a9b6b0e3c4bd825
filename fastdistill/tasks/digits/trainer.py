# SPDX-License-Identifier: Apache-2.0
"""The training step of the task on random data, for profiles and benchmarks."""

from __future__ import annotations

import torch

from fastdistill.data.latent_cache import LatentCache
from fastdistill.distill import RandomConditioning
from fastdistill.models import make_student
from fastdistill.models.specs import StudentSpec
from fastdistill.tasks.digits import data
from fastdistill.tasks.digits.sampling import SCHEDULE
from fastdistill.tasks.digits.teacher import load_teacher
from fastdistill.tasks.digits.text_encoder import prompt_bank
from fastdistill.train import DistillTrainer, TrainConfig

STUDENT = StudentSpec(remove_mid=True)


def noise_cache() -> LatentCache:
    """512 images of random noise, assigned to the seen prompts."""
    images = torch.randn(512, *data.SHAPE, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    return LatentCache(images, torch.tensor(data.SEEN).repeat(512 // len(data.SEEN) + 1)[:512])


def noise_trainer(batch: int = 64, device: str | torch.device = "cpu") -> DistillTrainer:
    """A trainer on ``noise_cache`` whose student is the shipped teacher without its mid block."""
    teacher = load_teacher().to(device)
    student = make_student(teacher, STUDENT)
    objective = RandomConditioning(taps=tuple(zip(student.teacher_taps, student.student_taps, strict=True)))
    config = TrainConfig(steps=10_000, batch=batch, lr=1e-5)
    bank = prompt_bank()
    return DistillTrainer(teacher, student.model, SCHEDULE, noise_cache(), bank, objective, config, device=device)
