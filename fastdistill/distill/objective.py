# SPDX-License-Identifier: Apache-2.0
"""The interface of objectives. A new objective is one new file in this folder."""

from __future__ import annotations

import contextlib
import contextvars
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastdistill.data.buckets import Buckets
from fastdistill.data.encoded import rows_of
from fastdistill.data.fingerprint import dtype_name
from fastdistill.data.staged import Batches, Rows
from fastdistill.diffusion.schedule import PredictionType, Schedule
from fastdistill.errors import FastdistillError, InputError, quoted
from fastdistill.models import families
from fastdistill.models.calling import Call, Predictor, trial
from fastdistill.ops.noise_gather.banks import listed

_as_captured: contextvars.ContextVar[bool] = contextvars.ContextVar("fastdistill_as_captured", default=False)


@contextlib.contextmanager
def as_captured() -> Iterator[None]:
    """Inside, an eager step uses the same streams as in a CUDA graph. Memory that libraries allocate once per stream,
    such as cuBLAS's workspace, then exists before the capture and does not belong to the graph's memory."""
    token = _as_captured.set(True)
    try:
        yield
    finally:
        _as_captured.reset(token)


def has_streams(tensor: Tensor) -> bool:
    """Whether parts of a step on this tensor's device run in parallel on streams: in a CUDA graph, and in a step that
    runs ``as_captured``."""
    if not tensor.is_cuda or torch.compiler.is_compiling():
        return False
    return _as_captured.get() or torch.cuda.is_current_stream_capturing()


class Trajectory(NamedTuple):
    """For latents that are states of a sampler: the step of each, [N] int64 on the device, and its schedule and grid
    from the fingerprint of their cache."""

    step: Tensor
    sampler: Mapping[str, Any]


@dataclass(frozen=True)
class Bucket:
    """Latents of one shape [N, *S], the row of each latent's prompt [N] int64, the prompts (as in ``Setting``), and a
    ``Trajectory`` if the latents are states of a sampler."""

    latents: Rows
    latent_prompts: Tensor
    prompts: Rows | Mapping[str, Rows]
    trajectory: Trajectory | None = None


@dataclass(frozen=True)
class Setting:
    """What a trainer passes to an objective. Models and tables are on the device; banks may be elsewhere.

    latents: [N, *S]. latent_prompts: [N] int64 on the device, rows of prompts. prompts: [M + 1, L, D], or banks
    [M + 1, ...] by name, the null prompt last. call: how both models are called, if not as in their family
    (``fastdistill.models.calling.Predictor``). batch: samples per step. prediction_type: what teacher and student
    predict. ahead: for how many steps rows are read in advance if banks are on disk. grad_scale: 0-dim float32 by which
    the loss will be multiplied before the backward, for losses that compute their gradient in the forward; None: 1.
    first_sample, global_batch: if several processes share a step, which of its samples this process has
    (``noise_gather``). micro_batch: for how many samples the losses are computed at once
    (``TrainConfig.micro_batch``); None: all. others: latents of other shapes; each step draws from one shape.
    trajectory: for latents that are states of a sampler. null_once: whether a guided, fused teacher projects the null
    prompt's keys and values once (``TrainConfig.teacher_null_once``).
    """

    teacher: nn.Module
    student: nn.Module
    schedule: Schedule
    latents: Rows
    latent_prompts: Tensor
    prompts: Rows | Mapping[str, Rows]
    batch: int
    prediction_type: PredictionType = "epsilon"
    ahead: int = 3
    grad_scale: Tensor | None = None
    first_sample: int = 0
    global_batch: int | None = None
    micro_batch: int | None = None
    call: Call | None = None
    others: tuple[Bucket, ...] = ()
    trajectory: Trajectory | None = None
    null_once: bool = False

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The latents of every shape."""
        return Bucket(self.latents, self.latent_prompts, self.prompts, self.trajectory), *self.others

    @property
    def device(self) -> torch.device:
        return self.latent_prompts.device

    @cached_property
    def predictors(self) -> tuple[Predictor, Predictor]:
        """How teacher and student are called."""
        return self._predictor(self.teacher), self._predictor(self.student)

    def _predictor(self, model: nn.Module) -> Predictor:
        return Predictor(model, self.call, self._times)

    @cached_property
    def _times(self) -> Tensor | None:
        times = self.schedule.times
        return None if times is None else times.to(self.device, torch.float32)

    def predict(
        self, model: nn.Module, x_t: Tensor, timestep: Tensor, prompt: Any, timestep_cond: Tensor | None = None
    ) -> Tensor:
        """The prediction of a model; its inputs are cast to the dtype in which it computes.

        Args:
            model: the teacher or the student (any other model is inspected again in every call).
            x_t: [B, *S]. timestep: [B] int64. prompt: [B, L, D], or rows [B, ...] by the names of the banks.
            timestep_cond: [B, ...], replaces the prompt's own guidance weight for models that read one
                (``Family.guidance_rows``).
        """
        for predictor in self.predictors:
            if predictor.model is model:
                return predictor(x_t, timestep, prompt, timestep_cond)
        return self._predictor(model)(x_t, timestep, prompt, timestep_cond)

    def batches(self, replace: Tensor, coefficients: Tensor | None = None, **options: Any) -> Batches | Buckets:
        """The draws of ``noise_gather`` from these banks; ``replace`` [T] int64; options as for ``Batches``.

        ``coefficients``: [T, 4], the noise levels that are drawn from; None: those of the schedule. If teacher and
        student compute in one dtype, x_t and the prompts of a draw have this dtype.
        """
        if coefficients is None:
            if any(bucket.trajectory for bucket in self.buckets):
                rule = "samples to be noised (states of a sampler are for GuidanceDistillation(states='trajectory'))"
                raise InputError.of("latents", rule, "a TrajectoryCache")
            coefficients = self.schedule.coefficients(self.prediction_type)
        tables = coefficients.to(self.device), replace.to(self.device)
        dtypes = {predictor.dtype for predictor in self.predictors}
        dtype = dtypes.pop() if len(dtypes) == 1 else None
        parts = [
            Batches(
                bucket.latents, bucket.latent_prompts, bucket.prompts, *tables, batch=self.batch,
                null_index=len(listed(bucket.prompts)[0]) - 1, ahead=self.ahead, first_sample=self.first_sample,
                global_batch=self.global_batch, dtype=dtype, in_parts=self.micro_batch not in (None, self.batch),
                **options,
            )
            for bucket in self.buckets
        ]  # fmt: skip
        if not self.others:
            return parts[0]
        return Buckets(parts, [len(bucket.latents) for bucket in self.buckets], self.device)

    def check(self, name: Literal["teacher", "student"], timestep_cond: Tensor | None = None) -> None:
        """One forward of a model on the first sample of each shape. It has no side effects except that taps fire.
        ``timestep_cond``: of one sample, as in ``predict``.

        Raises:
            InputError: the model cannot process the latents and prompts, or its prediction has another shape than the
                latents.
        """
        for bucket in reversed(self.buckets):  # so that the taps fire last for the first shape
            self._check(name, bucket.latents, bucket.prompts, timestep_cond)

    def _check(self, name: str, latents: Any, prompts: Any, timestep_cond: Tensor | None) -> None:
        model: nn.Module = getattr(self, name)
        x = latents[:1].to(self.device)
        prompt = rows_of(prompts, slice(1), self.device)
        timestep = torch.zeros(1, dtype=torch.int64, device=self.device)
        if self.call is None and (family := families.find(model)) is not None:
            banks = prompts if isinstance(prompts, Mapping) else {families.EMBEDDINGS: prompts}
            if timestep_cond is not None:
                banks = {**banks, family.guidance_bank(families.unwrapped(model).config): timestep_cond}
            family.check(name, model, tuple(latents.shape), banks)
        try:
            with trial(model):
                shape = tuple(self.predict(model, x, timestep, prompt, timestep_cond).shape)
        except (FastdistillError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise self._refusal(name, x, prompt, error) from error
        channels = x.shape[1]
        if shape not in {(1, c, *x.shape[2:]) for c in (channels, 2 * channels)}:  # or with a learned variance
            raise InputError.of(name, f"a prediction of its latents' shape {tuple(x.shape)}", shape)

    def explained(self, error: RuntimeError) -> InputError | None:
        """Advice for an error of torch about unequal dtypes if models and banks have several; else None."""
        teacher, student = self.predictors
        found = {"teacher": teacher.dtype, "student": student.dtype, "latents": self.latents.dtype}
        floating = [bank.dtype for bank in listed(self.prompts) if bank.dtype.is_floating_point]
        if floating:
            found["prompts"] = floating[0]
        if len(set(found.values())) == 1 or not re.search("same dtype|scalar type|expected dtype", str(error)):
            return None
        rule = "models called by Setting.predict, which casts their inputs"
        dtypes = ", ".join(f"{name} {dtype_name(dtype)}" for name, dtype in found.items())
        return InputError.of("objective", rule, f"{quoted(error)} ({dtypes})")

    def _refusal(self, name: str, x: Tensor, prompt: Any, error: Exception) -> InputError:
        """Why a model failed: an input that its configuration requires, else its own message."""
        config = getattr(getattr(self, name), "config", None)
        config = config if isinstance(config, Mapping) else {}
        channels = config.get("in_channels")
        if isinstance(channels, int) and channels != x.shape[1]:
            return InputError.of("latents", f"{channels} channels (in_channels of the {name})", x.shape[1])
        dtype = dtype_name(Predictor(getattr(self, name)).dtype)
        banks = prompt if isinstance(prompt, Mapping) else {families.EMBEDDINGS: prompt}
        prompts = ", ".join(f"{label} {tuple(bank.shape)}" for label, bank in banks.items())
        rule = f"a model that takes {dtype} latents {tuple(x.shape)}, a timestep and {prompts}"
        if self.call is None and families.find(getattr(self, name)) is None:
            rule += " (call= says how another one is called)"
        return InputError.of(name, rule, quoted(error))


class BoundObjective(Protocol):
    """An objective bound to its models and data.

    It is called with the counter [2] int64 (seed, step) on the device, and returns the loss to differentiate and one
    0-dim float32 tensor per name in ``metric_names``. It must not wait for the device or use any other source of
    randomness. It calls the models by ``Setting.predict``, which casts their inputs; ``bind`` may check them by
    ``Setting.check``. The host calls ``prepare(seed, step)`` before each step, and ``close()`` after the last one, for
    work outside of the step (``Batches``, hooks on the models). ``prepare`` may follow ``close``.

    To support gradients accumulated over parts of a batch (``TrainConfig.micro_batch``), it has ``draw(counter)``,
    which returns a ``fastdistill.Draw`` of the whole batch, and ``loss(draw, counter)`` of a part of it, which returns
    the same as a call. The loss must be a mean over samples; if it is not, ``whole`` is a text with the reason.

    To support a teacher that runs a step ahead (``TrainConfig.teacher_ahead``), it has ``begin_ahead()``, which returns
    None, or the reason why this is not possible; and ``teach(counter)``, which stores the teacher's output for that
    step, always in the same memory. The next call uses it. ``taught``: whether there is a stored output.

    ``trained`` contains modules that are trained, clipped and checkpointed together with the student, but not exported.
    ``state`` (optional) contains tensors by name that the steps change; their dimension 1 is divided among the
    processes. ``common`` has tensors that are equal on all ranks, ``sums`` integers that are summed over the ranks.
    Checkpoints store all of them.
    """

    @property
    def metric_names(self) -> Sequence[str]: ...

    @property
    def trained(self) -> Sequence[nn.Module]: ...

    def prepare(self, seed: int, step: int) -> None: ...

    def close(self) -> None: ...

    def __call__(self, counter: Tensor) -> tuple[Tensor, list[Tensor]]: ...


class Objective(Protocol):
    """The settings of an objective. ``bind`` returns the bound objective; ``describe`` returns its part of a
    checkpoint's fingerprint.
    """

    def bind(self, setting: Setting) -> BoundObjective: ...

    def describe(self) -> dict[str, object]: ...
