# SPDX-License-Identifier: Apache-2.0
"""Sampling of all models of the task: the same steps, guidance and noise for the teacher and the students."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from pydantic import Field
from torch import Tensor, nn

from fastdistill.data.prompt_bank import PromptBank
from fastdistill.diffusion.sampler import ddim, initial_noise
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.documented import documented
from fastdistill.errors import InputError
from fastdistill.tasks.digits.data import SHAPE

SCHEDULE = NoiseSchedule.cosine()


class ClippedDDIM(DDIMScheduler):  # type: ignore[misc]
    """DDIM that computes the noise again from the clipped sample, as ``ddim`` does."""

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
        clipped = {"use_clipped_model_output": True, "return_dict": return_dict}
        return super().step(model_output, timestep, sample, **clipped)


def scheduler() -> ClippedDDIM:
    """The noise levels of ``SCHEDULE`` and the sampler of the task, as a scheduler of diffusers."""
    limit = Sampling().clip_sample
    return ClippedDDIM(1000, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", clip_sample_range=limit)


@documented
@dataclass(frozen=True)
class Sampling:
    """DDIM sampling with classifier-free guidance."""

    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    """Number of sampling steps."""
    guidance_scale: Annotated[float, Field(allow_inf_nan=False)] = 2.5
    """Guidance scale as in diffusers; 1 is no guidance."""
    guidance: str | float | None = None
    """In place of guidance_scale a schedule of the weight w = guidance_scale - 1, such as 4@3,-1@0.5,0."""
    clip_sample: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.2
    """Limit of the magnitude of the predicted clean sample; images are in [-1, 1]."""

    def guided(self) -> dict[str, Any]:
        """The argument ``guidance_scale`` or ``guidance`` of samplers.

        Raises:
            InputError: a schedule together with a scale other than the default.
        """
        if self.guidance is None:
            return {"guidance_scale": self.guidance_scale}
        if self.guidance_scale != Sampling.guidance_scale:
            rule = f"its default {Sampling.guidance_scale} beside sampling.guidance"
            raise InputError.of("sampling.guidance_scale", rule, self.guidance_scale)
        return {"guidance": self.guidance}

    def describe(self) -> dict[str, object]:
        return asdict(self) | {"sampler": "ddim", "schedule": SCHEDULE.to_config()}


def sample(
    model: nn.Module,
    bank: PromptBank,
    prompt: Tensor,
    rows: Tensor,
    seed: int,
    sampling: Sampling,
    *,
    batch: int = 64,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Images [n, 3, 8, 8] float32 on the CPU.

    Args:
        bank: prompts on the device of the model. prompt: [n] int64, rows of the bank.
        rows: [n] int64, numbers of the initial noise for ``seed``; image i depends only on (seed, rows[i], prompt[i]).
        progress: called after each batch with the number of finished images.
    """
    options = {"steps": sampling.steps, "clip_sample": sampling.clip_sample, **sampling.guided()}

    def make(noise: Tensor, prompts: Tensor, rows: Tensor) -> Tensor:
        return ddim(model, noise, prompts, bank.null, SCHEDULE, **options)

    return in_batches(make, model, bank, prompt, rows, seed, batch, progress)


def in_batches(
    make: Callable[[Tensor, Tensor, Tensor], Tensor],
    model: nn.Module,
    bank: PromptBank,
    prompt: Tensor,
    rows: Tensor,
    seed: int,
    batch: int,
    progress: Callable[[int], object] | None,
) -> Tensor:
    """The images of ``make``, which is called with noise [b, 3, 8, 8], embeddings [b, ...] and rows [b] on the
    device."""
    if not len(rows):
        return torch.empty(0, *SHAPE)
    device = next(model.parameters()).device
    images = []
    for numbers, wanted in zip(torch.split(rows, batch), torch.split(prompt, batch), strict=True):
        own = numbers.to(device)
        images.append(make(initial_noise(seed, own, SHAPE), bank.embeddings[wanted.to(device)], own).cpu())
        if progress is not None:
            progress(sum(map(len, images)))
    return torch.cat(images)
