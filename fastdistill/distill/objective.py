# SPDX-License-Identifier: Apache-2.0
"""What an objective must offer, so that a new one is one new file beside this."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastdistill.data.staged import Batches, Rows
from fastdistill.diffusion.schedule import NoiseSchedule, PredictionType

_as_captured: contextvars.ContextVar[bool] = contextvars.ContextVar("fastdistill_as_captured", default=False)


@contextlib.contextmanager
def as_captured() -> Iterator[None]:
    """Inside, an eager step runs on the streams that it will have in a CUDA graph. What a library allocates once for
    each stream, such as cuBLAS's workspace, is then there before the capture and not a part of the graph's memory."""
    token = _as_captured.set(True)
    try:
        yield
    finally:
        _as_captured.reset(token)


def has_streams(tensor: Tensor) -> bool:
    """Whether parts of a step on this tensor's device run side by side on streams: in a CUDA graph, and in a step that
    runs ``as_captured``."""
    if not tensor.is_cuda or torch.compiler.is_compiling():
        return False
    return _as_captured.get() or torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True)
class Setting:
    """What a trainer gives an objective to work with: models and tables in place, banks where they fit.

    latents: [N, *S]. latent_prompts: [N] int64 on the device, rows of prompts. prompts: [M + 1, L, D], the null prompt
    last. batch: samples of a step. prediction_type: what teacher and student put out. ahead: steps whose rows are read
    ahead where banks are on the disk. grad_scale: 0-dim float32 by which the loss will be multiplied before the
    backward, for losses that store their gradient; None: 1. first_sample, global_batch: where several processes share
    a step, which of its samples are this one's (``noise_gather``).
    """

    teacher: nn.Module
    student: nn.Module
    schedule: NoiseSchedule
    latents: Rows
    latent_prompts: Tensor
    prompts: Rows
    batch: int
    prediction_type: PredictionType = "epsilon"
    ahead: int = 3
    grad_scale: Tensor | None = None
    first_sample: int = 0
    global_batch: int | None = None

    @property
    def device(self) -> torch.device:
        return self.latent_prompts.device

    def batches(self, replace: Tensor, **options: Any) -> Batches:
        """The draws of ``noise_gather`` on these banks; ``replace`` [T] int64, options as ``Batches``."""
        tables = self.schedule.coefficients(self.prediction_type).to(self.device), replace.to(self.device)
        return Batches(
            self.latents, self.latent_prompts, self.prompts, *tables, batch=self.batch,
            null_index=len(self.prompts) - 1, ahead=self.ahead, first_sample=self.first_sample,
            global_batch=self.global_batch, **options,
        )  # fmt: skip


class BoundObjective(Protocol):
    """An objective bound to its models and data.

    Called with the counter [2] int64 (seed, step) on the device; returns the loss to differentiate and one 0-dim
    float32 tensor a name in ``metric_names``. It must not wait for the device or use any other source of randomness.
    Before each step the host calls ``prepare`` with its seed and number, and ``close`` after the last: what has to
    happen outside of the step is done there (``Batches``).
    ``trained`` holds modules that are trained, clipped and checkpointed beside the student, and dropped at export.
    """

    @property
    def metric_names(self) -> Sequence[str]: ...

    @property
    def trained(self) -> Sequence[nn.Module]: ...

    def prepare(self, seed: int, step: int) -> None: ...

    def close(self) -> None: ...

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
