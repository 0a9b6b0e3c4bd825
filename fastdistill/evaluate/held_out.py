# SPDX-License-Identifier: Apache-2.0
"""How well a student predicts the teacher's predictions, on latents and prompts that were not in its training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistill.data.encoded import rows_of
from fastdistill.diffusion.prompts import null_rows
from fastdistill.distill.guidance import Guiding
from fastdistill.distill.objective import Setting
from fastdistill.errors import InputError
from fastdistill.models.calling import with_guidance
from fastdistill.models.taps import Taps
from fastdistill.ops import noise_gather
from fastdistill.ops.noise_gather.banks import listed


class HeldOut(NamedTuple):
    """The losses of n noised latents, on the CPU.

    output: [n] float64, mean square of the difference of the predictions. features: [n, taps] float64, the same for
    each tap; None: there are no taps, or they have other channels than the teacher's and there are no adapters.
    timestep: [n]. latent: [n], the row of the latent.
    """

    output: Tensor
    features: Tensor | None
    timestep: Tensor
    latent: Tensor

    @property
    def feature(self) -> Tensor | None:
        """[n]: the sum over taps, as in training."""
        return None if self.features is None else self.features.sum(1)


@torch.no_grad()
def held_out_losses(
    setting: Setting,
    taps: Sequence[tuple[str, str]] = (),
    *,
    seed: int,
    rounds: int = 8,
    adapters: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None,
    guided: tuple[Guiding, float] | None = None,
) -> HeldOut:
    """Output and feature loss (arXiv 2504.02011) of ``setting.student`` for each latent with its own prompt.

    Each latent is used ``rounds`` times with timestep and noise from (seed, round, latent), uniform over the schedule's
    timesteps, whatever ``setting.batch`` is. Losses are not weighted.

    Args:
        setting: models in eval mode; latents [N, *S], prompts and the schedule. Latents and prompts are in memory.
        taps: pairs (teacher module, student module). adapters: for features with other channels (``Adapters``).
        guided: for a student distilled with guidance: the guidance weights of the teacher's prediction, and the
            corresponding v, which the student gets if it takes one (``GuidanceDistillation``).

    Raises:
        InputError: no rounds; modules that do not exist in a model.
    """
    if rounds < 1:
        raise InputError.of("rounds", "at least 1", rounds)
    names: list[Sequence[str]] = list(zip(*taps, strict=True)) if taps else []
    coefficients = setting.schedule.coefficients(setting.prediction_type).to(setting.device)
    paired = torch.zeros(len(setting.schedule), dtype=torch.int64, device=setting.device)
    latents: Any = setting.latents
    prompts: Any = setting.prompts
    tapped = [Taps(model, own) for model, own in zip((setting.teacher, setting.student), names, strict=False)]
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    known: list[Tensor] = []
    try:
        for number in range(rounds):
            counter = torch.tensor([seed, number], dtype=torch.int64, device=setting.device)
            for first in range(0, len(latents), setting.batch):
                draw = noise_gather(
                    latents, setting.latent_prompts, prompts, coefficients, paired, counter,
                    batch=min(setting.batch, len(latents) - first), first_sample=first, global_batch=len(latents),
                    null_index=len(listed(prompts)[0]) - 1, null_probability=0.0,
                )  # fmt: skip
                channels = latents.shape[1]  # the channels of a learned variance are ignored
                asked: Any = draw.prompt
                if guided is not None:  # before the prompts, whose features must be the last ones
                    null = null_rows(asked, rows_of(prompts, slice(-1, None), setting.device))
                    without = setting.predict(setting.teacher, draw.x_t, draw.timestep, null)[:, :channels].float()
                    asked = with_guidance(setting.student, asked, guided[1])
                theirs = setting.predict(setting.teacher, draw.x_t, draw.timestep, draw.prompt)[:, :channels]
                if guided is not None:
                    v = torch.full((len(theirs),), guided[1], device=theirs.device)
                    w = guided[0](theirs, without, draw.timestep, v)
                    theirs = theirs.float() + w.view(-1, *[1] * (theirs.ndim - 1)) * (theirs.float() - without)
                own = setting.predict(setting.student, draw.x_t, draw.timestep, asked)[:, :channels]
                output = _squares(own, theirs)
                parts.append((output, draw.timestep, draw.latent_index))
                features = _features(tapped[0].features(), tapped[1].features(), adapters) if tapped else None
                known += [] if features is None else [features]
    finally:
        for tap in tapped:
            tap.remove()
    output, timestep, latent = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return HeldOut(output, torch.cat(known).cpu() if known else None, timestep, latent)


def _features(
    theirs: list[Tensor], own: list[Tensor], adapters: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None
) -> Tensor | None:
    """[B, taps]; None if shapes differ."""
    pairs = list(zip(own if adapters is None else adapters(own), theirs, strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return None
    return torch.stack([_squares(a, b) for a, b in pairs], 1)


def _squares(one: Tensor, two: Tensor) -> Tensor:
    """[B] float64: mean square of the differences."""
    return (one.float() - two.float()).square().flatten(1).mean(1, dtype=torch.float64)
