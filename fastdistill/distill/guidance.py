# SPDX-License-Identifier: Apache-2.0
"""Guidance distillation: one pass of the student predicts what the guided teacher predicts (Meng et al., arXiv
2210.03142).

    target = c + w (c - u),    w = h(t) of a schedule, or w = v max(h(t), 0) + min(h(t), 0) with v ~ U[v_min, v_max]

c and u are the teacher's predictions with the prompt and with the null prompt, computed in one batch of 2 B. The target
is computed inside of ``output_match``; v is also an input of the student.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fastdistill.data.encoded import rows_of
from fastdistill.data.fingerprint import differences, plain
from fastdistill.data.fingerprint import listed as listed_lines
from fastdistill.diffusion.grid import Grid, GridSchedule
from fastdistill.diffusion.guidance import Guidance
from fastdistill.diffusion.hooks import Cads, PowerLaw, score_scale
from fastdistill.diffusion.matching import LossWeighting, limited_weights
from fastdistill.distill.objective import Setting
from fastdistill.distill.random_conditioning import BoundRandomConditioning, RandomConditioning
from fastdistill.distill.trajectory import grid_text, schedule_text
from fastdistill.errors import InputError, described
from fastdistill.models import families
from fastdistill.ops import Draw, philox
from fastdistill.ops.noise_gather.banks import listed

Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class _Guided:
    schedule: Any
    scale: tuple[Finite, Finite] | None = None
    lowest: Annotated[float, Field(ge=0, lt=1)] = 0.0
    grid: Any = None
    states: Literal["noised", "trajectory"] = "noised"
    weight_limit: Annotated[float, Field(gt=0)] = 5.0


@dataclass(frozen=True)
class GuidanceDistillation(RandomConditioning, _Guided):
    """Settings of guidance distillation (arXiv 2210.03142), checked when they are used.

    schedule: the guidance weight w for each noise level: a ``Guidance``, its text or a number. w = 0 is the conditional
        teacher; ``guidance_scale`` of diffusers is 1 + w. ``power:2^0.9`` has one weight per sample; schedules with
        noised prompts (cads) are refused.
    scale: (v_min, v_max): the student gets a number v as an input, drawn for each sample, and the positive weights of
        the schedule are multiplied by it (with schedule 1, v is the guidance weight). ``make_student(...,
        guidance_embedding=True)`` makes such a student. None: it has no such input.
    lowest: fraction of the samples with v = v_min. Without such samples a student with v_min = 0 differed strongly from
        its teacher at v = 0 (docs/guidance.md).
    grid: the sampler's steps (a ``Grid`` or its text); only their timesteps are drawn. Schedules by step require it.
        None: all timesteps of training.
    states: ``noised`` samples, or states of a ``trajectory``: those that the guided sampler visits, stored by
        ``generate_trajectory_cache`` for this schedule and grid.
    weight_limit: the loss at each timestep has the weight min(1 / (a q - b p)^2, weight_limit), for a model that
        predicts p x_0 + q eps: for epsilon min(1 / abar, weight_limit), for v and flow 1. Only used if
        ``loss_weighting`` is None.

    The other fields are those of ``RandomConditioning``, but the default of ``probability`` is 0. For null prompts the
    target is the unconditional prediction, for any w.
    """

    probability: str | Callable[[float], float] = "const"
    loss_weighting: LossWeighting | None = None  # type: ignore[assignment] # wider than that of plain distillation

    def bind(self, setting: Setting) -> BoundGuidanceDistillation:
        return BoundGuidanceDistillation(self._checked(), setting)

    def describe(self) -> dict[str, object]:
        config = self._checked()
        told = {"schedule": schedule_text(config.schedule), "grid": config.grid and grid_text(config.grid)}
        return RandomConditioning.describe(dataclasses.replace(config, **told))

    def guiding(self, setting: Setting) -> tuple[Setting, Guiding]:
        """The setting, restricted to the levels of the grid if there is one, and the weights at these levels."""
        config = self._checked()
        if config.grid is not None:
            grid = Grid.parse(config.grid, setting.schedule) if isinstance(config.grid, str) else config.grid
            setting = dataclasses.replace(setting, schedule=GridSchedule(grid, setting.schedule))
        return setting, Guiding(config.schedule, setting)

    def _checked(self) -> GuidanceDistillation:
        """The same settings, with a ``Guidance`` as the schedule."""
        if self.grid is not None and not isinstance(self.grid, Grid | str):
            raise InputError.of("grid", "a Grid, its text or None", described(self.grid))
        config = dataclasses.replace(self, schedule=None, grid=None)._validated()
        if config.lowest and config.scale is None:
            raise InputError.of("lowest", "0 without a scale", config.lowest)
        if config.rolling.every is not None:
            rule = "None, as a step has no guided output of the sampler's states to move them by"
            raise InputError.of("rolling.every", rule, config.rolling.every)
        weighting, (limit, gamma) = config.loss_weighting, (_Guided.weight_limit, RandomConditioning.min_snr_gamma)
        if weighting is None and config.min_snr_gamma != gamma:
            rule = f"its default {gamma}, as the loss has no weighting min_snr"
            raise InputError.of("min_snr_gamma", rule, config.min_snr_gamma)
        if weighting is not None and config.weight_limit != limit:
            rule = f"its default {limit}, as the loss has the weighting {weighting}"
            raise InputError.of("weight_limit", rule, config.weight_limit)
        schedule = Guidance.parse(self.schedule)
        if isinstance(schedule, Cads):
            rule = "a schedule without cads, whose prompts are noised anew in every step: no function to learn"
            raise InputError.of("schedule", rule, repr(str(schedule)))
        return dataclasses.replace(config, schedule=schedule, grid=self.grid)


class Guiding:
    """The guidance weights of samples at the timesteps of a setting's schedule.

    positive, negative: [T] float32, the schedule's weights above and below 0 (for a power law, omega). largest: the
    largest of all weights.
    """

    def __init__(self, guidance: Guidance, setting: Setting) -> None:
        schedule, device = setting.schedule, setting.device
        self._law = guidance if isinstance(guidance, PowerLaw) else None
        self._channels = setting.latents.shape[1]  # the other channels are a learned variance, which is not guided
        if self._law is not None:
            weights = torch.full((len(schedule),), self._law.omega, device="cpu")
            coefficients = schedule.coefficients(setting.prediction_type).double()
            self._scores = score_scale(*coefficients.unbind(1)).to(device)
        elif isinstance(schedule, GridSchedule):
            weights = guidance.weights(schedule.grid)
        else:
            weights = guidance.table(schedule)
        self.largest = float(weights.float().max())  # read here: a plan has its tensors on the meta device
        self.positive = weights.clamp(min=0).to(device, torch.float32)
        self.negative = weights.clamp(max=0).to(device, torch.float32)

    def __call__(self, conditional: Tensor, unconditional: Tensor, timestep: Tensor, v: Tensor) -> Tensor:
        """w [B] float32 of the teacher's two outputs [B, ...] at ``timestep`` [B], with v [B]."""
        if self._law is None:
            return self.positive[timestep] * v + self.negative[timestep]
        difference = conditional[:, : self._channels].float() - unconditional[:, : self._channels].float()
        return self._law.sample_weights(difference, self._scores[timestep]) * v


class GuidedDraw(NamedTuple):
    """A batch, and v of each of its samples, [B] float32."""

    batch: Draw[Any]
    scale: Tensor

    def part(self, start: int, stop: int) -> GuidedDraw:
        """Samples ``start`` to ``stop`` (exclusive), in the same memory."""
        return GuidedDraw(self.batch.part(start, stop), self.scale[start:stop])


class BoundGuidanceDistillation(BoundRandomConditioning):
    """Draws a batch and its guidance weights by counter and compares the student with the guided teacher on it."""

    guided = True  # the student's single pass is guided: previews add no guidance

    def __init__(self, config: GuidanceDistillation, setting: Setting) -> None:
        device, (setting, self._guiding) = setting.device, config.guiding(setting)
        coefficients = setting.schedule.coefficients(setting.prediction_type)
        drawn = None if config.states == "noised" else _check_trajectory(config, setting)
        self._step = {
            tuple(bucket.latents.shape[1:]): bucket.trajectory.step for bucket in setting.buckets if bucket.trajectory
        }
        self._scale, self._lowest, self._embed = config.scale, config.lowest, None
        self._samples = setting.first_sample + torch.arange(setting.batch, device=device)
        self._ones = torch.ones(setting.batch, device=device)
        if config.scale is not None:
            self._embed = _embedding(config, setting, self._guiding.largest)
        self._null_row = {
            tuple(bucket.latents.shape[1:]): len(listed(bucket.prompts)[0]) - 1 for bucket in setting.buckets
        }
        null = {
            tuple(bucket.latents.shape[1:]): rows_of(bucket.prompts, slice(row, row + 1), device)
            for bucket, row in zip(setting.buckets, self._null_row.values(), strict=True)
        }
        super().__init__(
            config,
            setting,
            drawn,
            null=null,
            loss_weighting=config.loss_weighting or limited_weights(coefficients, config.weight_limit),
            timestep_cond=None if self._embed is None else self._embed(self._ones[:1]),
        )

    @torch.no_grad()
    def draw(self, counter: Tensor) -> GuidedDraw:  # type: ignore[override] # with what its loss needs beside
        """The batch of a step; v is word 0 of block 0 in the stream of guidance weights (``ops.philox``)."""
        scale = self._ones
        if self._scale is not None:
            low, high = self._scale
            word = philox.words(counter[0], counter[1], self._samples, torch.zeros_like(counter[0]), philox.GUIDANCE)[0]
            share = (philox.uniform(word) - self._lowest) / (1 - self._lowest)
            scale = low + (high - low) * share.clamp_min(0)
        return GuidedDraw(self._placed(super().draw(counter)), scale)

    def _placed(self, batch: Draw[Any]) -> Draw[Any]:
        if not self._step:
            return batch
        step = self._step[tuple(batch.x_t.shape[1:])]
        return batch.replaced(timestep=step.index_select(0, batch.latent_index))

    def loss(self, draw: GuidedDraw, counter: Tensor) -> tuple[Tensor, list[Tensor]]:  # type: ignore[override]
        batch, scale = draw
        without = batch.prompt_index == self._null_row[tuple(batch.x_t.shape[1:])]

        def weights(conditional: Tensor, unconditional: Tensor) -> Tensor:
            return torch.where(without, 0.0, self._guiding(conditional, unconditional, batch.timestep, scale))

        task = self._batches.task(batch, counter) if self._weights.task else None
        condition = None if self._embed is None else self._embed(scale)
        return self._knowledge(batch, task, weights, condition, **self._observers(batch, counter))


def _check_trajectory(config: GuidanceDistillation, setting: Setting) -> Tensor:
    """Coefficients [T, 4] with which a draw returns a state as it is stored.

    Raises:
        InputError: latents that are no states of this sampler; options that require noised samples.
    """
    if not isinstance(setting.schedule, GridSchedule):
        raise InputError.of("grid", "that of the trajectories (states='trajectory')", None)
    grid = setting.schedule.grid
    for bucket in setting.buckets:
        if bucket.trajectory is None:
            raise InputError.of("latents", "a TrajectoryCache (states='trajectory')", "samples")
        wanted = plain({"guidance": schedule_text(config.schedule), "grid": grid_text(grid)})
        if changed := differences(wanted, dict(bucket.trajectory.sampler)):
            raise InputError.of("latents", f"states of {config.schedule} on {grid}", listed_lines(changed))
        if int(bucket.trajectory.step.max()) >= len(grid):
            raise InputError.of("latents", f"steps below {len(grid)}", int(bucket.trajectory.step.max()))
    if config.scale is not None:
        rule = "None for the states of a trajectory, which are those of one weight"
        raise InputError.of("scale", rule, config.scale)
    if config.weights.task:
        rule = "0 for the states of a trajectory, which are of no sample"
        raise InputError.of("weights.task", rule, config.weights.task)
    p = config.p(setting.schedule.clock)
    if bool((p != p[0]).any()):
        rule = "the same at every timestep (const) for the states of a trajectory, which have their own"
        raise InputError.of("probability", rule, config.probability)
    stored = torch.zeros(len(grid), 4, device="cpu")
    stored[:, 0] = 1
    return stored


def check_products(scale: tuple[float, float], largest: float) -> None:
    """InputError if a factor of this range times the largest weight is too large for float32."""
    low, high = scale
    if max(-low, high, high - low) * max(largest, 1.0) > torch.finfo(torch.float32).max:
        rule = f"factors whose products with the schedule's weights, up to {largest:g}, are within float32"
        raise InputError.of("scale", rule, scale)


def _embedding(config: GuidanceDistillation, setting: Setting, largest: float) -> Callable[[Tensor], Tensor]:
    """The function that computes the student's input from v [B]."""
    low, high = config.scale or (0.0, 0.0)
    if not low < high:
        raise InputError.of("scale", "(lowest, highest) guidance weight", (low, high))
    check_products((low, high), largest)
    if largest <= 0:
        raise InputError.of("scale", "None for a schedule without positive weights to multiply", str(config.schedule))
    student = families.unwrapped(setting.student)
    family = families.find(student)
    own = {} if family is None else student.config
    if family is None or setting.call is not None or family.guidance_bank(own) is None:
        rule = "None, or a student that reads it (make_student(..., guidance_embedding=True))"
        raise InputError.of("scale", rule, f"{(low, high)} and a {type(student).__name__} without that input")
    return lambda v: family.guidance_rows(own, v)
