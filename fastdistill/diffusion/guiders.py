# SPDX-License-Identifier: Apache-2.0
"""Schedules of guidance in the pipelines of diffusers: a guider for the modular ones, a block for the classic ones."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor, nn

from fastdistill.diffusion.flow import FlowSchedule, schedule_of
from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Guidance
from fastdistill.diffusion.hooks import Cads, PowerLaw
from fastdistill.diffusion.schedule import NoiseSchedule, Schedule, flow_matching
from fastdistill.errors import InputError, described
from fastdistill.models import families


class ScheduledGuidance(BaseGuidance):
    """A guider of diffusers' modular pipelines with a schedule of w: pred_uncond + (1 + w) (pred_cond - pred_uncond).

    ``num_conditions`` is 1 if w is 0 (the prompt alone) or -1 (the null prompt alone). ``save_pretrained`` keeps the
    schedule's text and the noise.

    Args:
        schedule: a schedule or its text, without hooks (``power_law``, ``cads``).
        noise: the noise of the pipeline's timesteps: a ``Schedule``, a scheduler of diffusers, or ``to_config()`` of a
            schedule.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]  # noqa: RUF012 # as diffusers has it

    def __init__(self, schedule: Guidance | float | str, noise: Schedule | Mapping[str, Any] | Any) -> None:
        super().__init__()
        self._guidance = _plain(schedule)
        self._noise = _noise(noise)
        # a function has no text from which it could be loaded
        self.register_to_config(schedule=str(Guidance.parse(str(self._guidance))), noise=self._noise.to_config())
        self._w = 0.0

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        """See ``BaseGuidance``; raises InputError if a threshold is not below the noise of the first step."""
        super().set_state(step, num_inference_steps, timestep)
        time = torch.as_tensor(timestep).detach().flatten()[:1]
        grid = Grid.at(self._noise, time)
        place = {"sigma": float(grid.sigma[0]), "t": float(grid.clock[0]), "step": step / num_inference_steps}
        value = torch.tensor([place[self._guidance.by]], dtype=torch.float64, device="cpu")
        if step == 0:
            self._guidance._check_within(value, 0.0, False)
        self._w = float(self._guidance._finite(value))

    def prepare_inputs(self, data: Mapping[str, Any]) -> list[Any]:
        return [self._prepare_batch(data, index, self._input_predictions[index]) for index in self._asked]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Mapping[str, Any]) -> list[Any]:
        return [
            self._prepare_batch_from_block_state(input_fields, data, index, self._input_predictions[index])
            for index in self._asked
        ]

    def forward(self, pred_cond: Tensor | None = None, pred_uncond: Tensor | None = None) -> GuiderOutput:
        pred = pred_uncond if pred_cond is None else pred_cond
        if pred_cond is not None and pred_uncond is not None:
            pred = pred_uncond + (1 + self._w) * (pred_cond - pred_uncond)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared == 1 and self._asked[0] == 0

    @property
    def num_conditions(self) -> int:
        return len(self._asked)

    @property
    def _asked(self) -> list[int]:
        """The predictions that the step needs: 0 for the prompt, 1 for the null prompt."""
        if not self._enabled or self._w == 0:
            return [0]
        return [1] if self._w == -1 else [0, 1]


@contextmanager
def scheduled_guidance(pipeline: Any, schedule: Guidance | float | str) -> Iterator[Any]:
    """In this context a classic pipeline of diffusers samples with a schedule of w; call it with guidance_scale > 1.

    Such pipelines have one scale g for all steps, and skip guidance for g <= 1. Here the forward of the denoiser
    (``unet`` or ``transformer``) is wrapped: it evaluates those of (null prompts, prompts) that w needs (one half if w
    is 0 or -1), and returns the guided prediction in both halves. Then u + g (c - u) is that prediction for any g. w is
    taken at the timestep of each evaluation (``Grid.visited``).

    Args:
        pipeline: with one batch for both predictions, the null prompts first: Stable Diffusion 1 to 3, SDXL, PixArt,
            Sana. schedule: or its text, without hooks (``power_law``, ``cads``).

    Raises:
        InputError: a pipeline without a denoiser or of another order (DiT), a compiled or wrapped denoiser; in a call
            ``guidance_scale`` <= 1, ``guidance_rescale`` if w is not 0 everywhere, ``skip_guidance_layers``, a
            threshold outside of the noise of the steps.
    """
    guidance = _plain(schedule)
    model = next(
        (part for name in ("unet", "transformer") if (part := getattr(pipeline, name, None)) is not None), None
    )
    if not isinstance(model, nn.Module) or not hasattr(pipeline, "scheduler"):
        raise InputError.of("pipeline", "a pipeline with a scheduler and a unet or transformer", described(pipeline))
    family = families.find(model)
    if family is not None and family.name in ("dit", "flux"):
        rule = "a pipeline that has (null prompts, prompts) evaluated in one batch"
        raise InputError.of("pipeline", rule, type(pipeline).__name__)
    if isinstance(model, torch._dynamo.OptimizedModule) or getattr(model, "_compiled_call_impl", None) is not None:
        raise InputError.of("pipeline", "a denoiser that is not compiled", type(model).__name__)
    own = vars(model).get("forward")
    if isinstance(own, _Halves):
        raise InputError.of("pipeline", f"a denoiser without a schedule (it has {own.guidance})", str(guidance))
    model.forward = _Halves(pipeline, model, guidance)
    try:
        yield pipeline
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


class _Halves:
    """A denoiser's forward that gets (null prompts, prompts) and returns the guided prediction in both halves."""

    def __init__(self, pipeline: Any, model: nn.Module, guidance: Guidance) -> None:
        self.pipeline, self.guidance, self.inner = pipeline, guidance, model.forward
        self.factor = getattr(getattr(model, "config", None), "timestep_scale", 1.0)  # for Sana
        self.signature = inspect.signature(type(model).forward.__get__(model))  # hooks may hide the inner one
        self.timesteps: Tensor | None = None
        self.weights: list[float] = []
        self.times: list[float] = []
        self.at = -1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.signature.bind(*args, **kwargs)
        x, time = next(iter(bound.arguments.values())), bound.arguments["timestep"]
        if (layers := bound.arguments.get("skip_layers")) is not None:
            raise InputError.of("skip_guidance_layers", f"None with the schedule {self.guidance}", layers)
        first = self._advance(float(torch.as_tensor(time).flatten()[0]))
        self._check(x, first)
        w, half = self.weights[self.at], len(x) // 2
        if w in (0, -1):
            rows = slice(half) if w == -1 else slice(half, None)
            return _doubled(self.inner(*_rows(bound.args, len(x), rows), **_rows(bound.kwargs, len(x), rows)))
        return _doubled(self.inner(*args, **kwargs), 1 + w)

    def _advance(self, time: float) -> bool:
        """Moves to the evaluation at this time; returns whether it is the first one of a call."""
        scheduler = self.pipeline.scheduler
        if self.timesteps is not scheduler.timesteps:  # every call of a pipeline sets them again
            grid = Grid.visited(scheduler)
            self.weights, self.timesteps = self.guidance.weights(grid).tolist(), scheduler.timesteps
            self.times, self.at = (torch.as_tensor(scheduler.timesteps) * self.factor).tolist(), -1
        following = self.at + 1
        if 0 < following < len(self.times) and self.times[following] == time:
            self.at = following
            return False
        if time not in self.times:
            raise InputError.of("timestep", f"one of the scheduler's ({self.times[:3]}...)", time)
        self.at = self.times.index(time)
        return True

    def _check(self, x: Tensor, first: bool) -> None:
        half, pipeline = len(x) // 2, self.pipeline
        doubled = getattr(pipeline, "do_classifier_free_guidance", True) and len(x) % 2 == 0
        if not doubled or (first and not x[:half].equal(x[half:])):
            rule = "a number above 1 (of no further effect), so that the pipeline asks for both predictions"
            got = getattr(pipeline, "guidance_scale", f"a batch of {len(x)} that is not twice the same")
            raise InputError.of("guidance_scale", rule, got)
        if getattr(pipeline, "guidance_rescale", 0.0) and any(w != 0 for w in self.weights):
            raise InputError.of("guidance_rescale", f"0 with the schedule {self.guidance}", pipeline.guidance_rescale)


def _plain(schedule: Guidance | float | str) -> Guidance:
    guidance = Guidance.parse(schedule)
    if isinstance(guidance, (PowerLaw, Cads)):
        rule = "a schedule without hooks (fastdistill.sample_with takes them)"
        raise InputError.of("schedule", rule, repr(str(guidance)))
    return guidance


def _noise(noise: Any) -> Schedule:
    if isinstance(noise, Schedule):
        return noise
    if isinstance(noise, Mapping):
        return (FlowSchedule if noise.get("name") == "flow" else NoiseSchedule).from_config(noise)
    config = getattr(noise, "config", None)
    if isinstance(config, Mapping) and flow_matching(type(noise).__name__, config):
        T = int(config["num_train_timesteps"])
        return FlowSchedule(T, factor=float(T))  # any shift: the timesteps define the noise
    return schedule_of(noise)


def _rows(value: Any, batch: int, rows: slice) -> Any:
    """An argument of the denoiser for half of its batch."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() and len(value) == batch else value
    if isinstance(value, dict):
        return {name: _rows(item, batch, rows) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_rows(item, batch, rows) for item in value)
    return value


def _doubled(output: Any, scale: float | None = None) -> Any:
    """An output with the prediction in both halves: the one of the evaluated half, or the guided one of two halves."""
    found = output[0] if isinstance(output, tuple) else output.sample
    if scale is not None:
        unconditional, conditional = found.chunk(2)
        found = unconditional + scale * (conditional - unconditional)
    both = torch.cat([found, found])
    return (both, *output[1:]) if isinstance(output, tuple) else type(output)(sample=both)
