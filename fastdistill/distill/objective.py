# SPDX-License-Identifier: Apache-2.0
"""What an objective must offer, so that a new one is one new file beside this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fastdistill.diffusion.schedule import NoiseSchedule, PredictionType


@dataclass(frozen=True)
class Setting:
    """What a trainer gives an objective to work with: models in place, banks on the device.

    latents: [N, *S]. latent_prompts: [N] int64, rows of prompts. prompts: [M + 1, L, D], the null prompt last.
    batch: samples of a step. prediction_type: what teacher and student put out.
    """

    teacher: nn.Module
    student: nn.Module
    schedule: NoiseSchedule
    latents: Tensor
    latent_prompts: Tensor
    prompts: Tensor
    batch: int
    prediction_type: PredictionType = "epsilon"

    @property
    def device(self) -> torch.device:
        return self.latents.device


class BoundObjective(Protocol):
    """An objective bound to its models and data.

    Called with the counter [2] int64 (seed, step) on the device; returns the loss to differentiate and one 0-dim
    float32 tensor a name in ``metric_names``. It must not wait for the device or use any other source of randomness.
    ``trained`` holds modules that are trained, clipped and checkpointed beside the student, and dropped at export.
    """

    @property
    def metric_names(self) -> Sequence[str]: ...

    @property
    def trained(self) -> Sequence[nn.Module]: ...

    def __call__(self, counter: Tensor) -> tuple[Tensor, list[Tensor]]: ...


class Objective(Protocol):
    """A configuration that can be bound; ``describe`` is its part of a checkpoint's fingerprint."""

    def bind(self, setting: Setting) -> BoundObjective: ...

    def describe(self) -> dict[str, object]: ...


def predict(model: nn.Module, x_t: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
    """The output tensor of a model of diffusers' call shape, whatever it wraps it in."""
    output = model(x_t, timestep, encoder_hidden_states=prompt)
    output = getattr(output, "sample", output)
    prediction: Tensor = output[0] if isinstance(output, tuple) else output
    return prediction


def cast_inputs(model: nn.Module, x_t: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs in the model's own dtype, so that a teacher may run in a lower precision than its student."""
    dtype = next(model.parameters()).dtype
    return x_t.to(dtype), prompt.to(dtype)
