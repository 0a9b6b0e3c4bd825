# SPDX-License-Identifier: Apache-2.0
"""Sampling: deterministic DDIM with classifier-free guidance, and initial noise as a function of row numbers."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.data.prompt_bank import EMBEDDINGS
from fastdistill.diffusion.grid import Grid, trailing_timesteps
from fastdistill.diffusion.guidance import Guidance
from fastdistill.diffusion.hooks import Cads
from fastdistill.diffusion.passes import Passes
from fastdistill.diffusion.prompts import Rows, check_scale
from fastdistill.diffusion.schedule import NoiseSchedule, PredictionType, check_prediction_type
from fastdistill.errors import InputError, described
from fastdistill.ops import _check
from fastdistill.ops.philox import INITIAL_NOISE, normal


def initial_noise(seed: int, rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal noise [B, *shape], float32 on the device of ``rows``. Row i depends only on (seed, rows[i]).

    The noise comes from a stream of the counter-based generator that no training step uses.

    Args:
        seed: any int64.
        rows: [B] int64 in [0, 2**32), such as row numbers of a latent cache.
        shape: of one sample.
    """
    _check.valued(rows=rows)
    seed = _check.seed(seed)
    if not isinstance(shape, Sequence) or not all(isinstance(size, int) for size in shape):
        raise InputError.of("shape", "the sizes of one sample", described(shape))
    if rows.ndim != 1 or rows.dtype != torch.int64:
        raise InputError.of("rows", "int64 row numbers [B]", f"{rows.dtype} {tuple(rows.shape)}")
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < 2**32:
        raise InputError.of("rows", "row numbers in [0, 2**32)", f"{int(rows.min())} to {int(rows.max())}")
    key = torch.tensor(seed, dtype=torch.int64, device=rows.device)
    return normal(key, torch.zeros_like(key), rows, shape, stream=INITIAL_NOISE)


@torch.no_grad()
def ddim(
    model: Callable[..., Any],
    x_T: Tensor,
    prompts: Rows,
    null_prompt: Rows | None,
    schedule: NoiseSchedule | Any,
    *,
    steps: int,
    guidance_scale: float | None = None,
    guidance: Guidance | float | str | None = None,
    prediction_type: PredictionType | None = None,
    timesteps: Sequence[int] | None = None,
    clip_sample: float | None = None,
    callback: Callable[[int, int, Tensor], object] | None = None,
) -> Tensor:
    """x_0 [B, *S] from noise x_T [B, *S] by DDIM with eta = 0 (Song, Meng, Ermon 2021, 2010.02502, eq. 12).

    Args:
        model: in eval mode. A module of a known family is called as this family requires; anything else as
            ``model(x, t, encoder_hidden_states=prompts)``, or with banks as ``model(x, t, **prompts)``, with t int64
            [b]. Returns the prediction in the shape of x, an object with ``.sample``, or a tuple that starts with it
            (as in diffusers). If it has twice as many channels, the first half is used (such models also learn their
            variance).
        x_T: floating point; the state between the steps is at least float32. A module gets state and prompts in the
            dtype in which it computes; any other callable gets the state in the dtype of x_T.
        prompts: embeddings [B, L, D], or banks [B, ...] by name. null_prompt: one row [...] or [1, ...] of each; None
            only when guidance_scale is 1 (or guidance 0).
        schedule: a ``NoiseSchedule``, or a ``DDIMScheduler`` of diffusers, whose settings then apply: timestep spacing,
            ``steps_offset``, ``set_alpha_to_one``, ``prediction_type``, ``clip_sample`` with its range. Each step is
            that of ``DDIMScheduler.step`` with its defaults. In particular it ends at the noise level of timestep
            t - T // steps, even if the next timestep is another one.
        steps: number of steps, 1 to T.
        guidance_scale: g as in diffusers: prediction = null + g (conditional - null), computed in one batch of 2 B. Any
            finite g (g = 1 + w in the notation s_c + w (s_c - s_u)). g = 1 skips the null prompt, g = 0 the prompts.
        guidance: instead of guidance_scale, a schedule of w (``Guidance`` or its text), taken at the noise where a step
            starts; or a number w. ``cads`` is not possible here, only in ``guided.sample`` and ``sample_with``.
        prediction_type: what the model predicts; None: epsilon. Only with a NoiseSchedule, as are the next two.
        timesteps: ``steps`` decreasing timesteps; None: ``trailing_timesteps``. The last step goes to abar = 1
            (``set_alpha_to_one`` of diffusers).
        clip_sample: limit c of the predicted x_0. The noise is computed again from the clipped x_0
            (``use_clipped_model_output`` of diffusers).
        callback: called after each step with (index, timestep, state).

    Returns:
        x_0 in the dtype of x_T. Row i depends only on x_T[i] and prompts[i].

    Raises:
        InputError: shapes that do not fit, an epsilon prediction where abar is 0; with a scheduler, anything that DDIM
            would ignore: a class other than DDIM's, ``thresholding``, a second value for one of its settings.
    """
    _check.tensors(x_T=x_T)
    if x_T.ndim < 2 or not x_T.dtype.is_floating_point:
        raise InputError.of("x_T", "floating point [B, ...]", f"{x_T.dtype} {tuple(x_T.shape)}")
    weights = one_guidance(guidance_scale, guidance)
    _check.require(not isinstance(weights, Cads), "guidance", "a schedule without cads", repr(str(weights)))
    if clip_sample is not None and not _check.single(clip_sample, "clip_sample") > 0:
        raise InputError.of("clip_sample", "a limit above 0, or None", clip_sample)
    if isinstance(schedule, NoiseSchedule):
        plan = _schedule_plan(schedule, steps, prediction_type, timesteps, clip_sample)
    else:
        given = {"prediction_type": prediction_type, "timesteps": timesteps, "clip_sample": clip_sample}
        plan = _scheduler_plan(schedule, steps, given)
    first, abar, _ = plan.levels[0]
    if plan.prediction_type == "epsilon" and abar == 0:
        raise InputError.of("prediction_type", f"sample or v_prediction where abar is 0 (timestep {first})", "epsilon")
    if isinstance(weights, Guidance):
        passes = Passes.of(weights, plan.grid(len(schedule)), x_T, prompts, null_prompt, plan.prediction_type)
    else:
        passes = Passes([weights] * steps, x_T, prompts, null_prompt)

    predict = predictor(model, x_T.dtype)
    x = x_T.to(torch.promote_types(x_T.dtype, torch.float32))
    for index, (t, abar, next_abar) in enumerate(plan.levels):
        out = passes(predict, x, torch.tensor(t, device=x.device), index)
        x = _step(x, out, abar, next_abar, plan)
        if callback is not None:
            callback(index, t, x)
    return x.to(x_T.dtype)


@dataclass(frozen=True)
class _Plan:
    """A trajectory: the timestep of each step, abar before and after it; and how x_0 and the noise are computed."""

    levels: list[tuple[int, float, float]]
    prediction_type: PredictionType
    clip: float | None
    noise_of_clipped: bool

    def grid(self, T: int) -> Grid:
        """The levels where the steps start, and the last one."""
        abar = torch.tensor(
            [abar for _, abar, _ in self.levels] + [self.levels[-1][2]], dtype=torch.float64, device="cpu"
        )
        times = torch.tensor([t for t, _, _ in self.levels], dtype=torch.float64, device="cpu")
        return Grid(abar.sqrt(), (1 - abar).sqrt(), times, times / T)


def _schedule_plan(
    schedule: NoiseSchedule,
    steps: int,
    prediction_type: PredictionType | None,
    timesteps: Sequence[int] | None,
    clip: float | None,
) -> _Plan:
    T = len(schedule)
    times = trailing_timesteps(T, steps) if timesteps is None else _checked(timesteps, steps, T)
    abars = [float(schedule.alphas_cumprod[t]) for t in times] + [1.0]
    kind = check_prediction_type(
        "epsilon" if prediction_type is None else prediction_type, among=NoiseSchedule.prediction_types
    )
    return _Plan(list(zip(times, abars, abars[1:], strict=False)), kind, clip, noise_of_clipped=True)


def _scheduler_plan(scheduler: Any, steps: int, given: dict[str, Any]) -> _Plan:
    """Timesteps and noise levels as chosen by ``DDIMScheduler.set_timesteps`` and ``step``."""
    abar = NoiseSchedule._of(scheduler, "schedule").alphas_cumprod
    kind = type(scheduler).__name__
    if kind not in ("DDIMScheduler", "DDIMParallelScheduler"):
        got = (
            f"{kind}, whose algorithm ddim would ignore; DDIMScheduler.from_config(scheduler.config) makes a DDIM "
            "scheduler of it, NoiseSchedule.from_diffusers(scheduler) takes only its noise levels"
        )
        raise InputError.of("schedule", "a NoiseSchedule or a DDIMScheduler", got)
    config = scheduler.config
    if config.thresholding:
        raise InputError.of(
            "schedule", "a DDIMScheduler without thresholding, which ddim would ignore", "thresholding=True"
        )
    for name, value in given.items():
        if value is not None:
            raise InputError.of(name, f"None with a {kind}, which has this setting itself", value)
    T = config.num_train_timesteps
    if not isinstance(steps, int) or not 1 <= steps <= T:
        raise InputError.of("steps", f"1 to {T}, the timesteps of the schedule", described(steps))
    spaced = copy.copy(scheduler)
    spaced.set_timesteps(steps)
    times = [int(t) for t in spaced.timesteps]
    if times[0] >= len(abar) or times[-1] < 0:
        setting = f"{steps} steps, {config.timestep_spacing} spacing, steps_offset {config.steps_offset}"
        raise InputError.of("steps", f"timesteps from {len(abar) - 1} to 0", f"{times[0]} to {times[-1]} ({setting})")
    final = float(scheduler.final_alpha_cumprod)
    following = [t - T // steps for t in times]
    levels = [(t, float(abar[t]), float(abar[s]) if s >= 0 else final) for t, s in zip(times, following, strict=True)]
    clip = config.clip_sample_range if config.clip_sample else None
    return _Plan(
        levels,
        check_prediction_type(config.prediction_type, among=NoiseSchedule.prediction_types),
        clip,
        noise_of_clipped=False,
    )


def one_guidance(guidance_scale: Any, guidance: Any) -> Guidance | float:
    """The scale g or the schedule, whichever is given.

    Raises:
        InputError: both or neither are given, or the value is no schedule.
    """
    if (guidance is None) == (guidance_scale is None):
        got = "neither" if guidance is None else "both"
        raise InputError.of("guidance", "a schedule of w, or in its place guidance_scale (g = 1 + w)", got)
    if guidance is not None:
        return Guidance.parse(guidance)
    check_scale(guidance_scale)
    return guidance_scale  # type: ignore[no-any-return]


def predictor(model: Callable[..., Any], dtype: torch.dtype) -> Callable[[Tensor, Tensor, Rows], Any]:
    """A function that calls a module in the dtype in which it computes, and anything else with states of ``dtype``."""
    if isinstance(model, nn.Module):
        from fastdistill.models.calling import Predictor  # here, because it loads diffusers

        return Predictor(model)

    if not callable(model):
        raise InputError.of("model", "a model, or a function of (x_t, timestep, **banks)", described(model))

    def called(x: Tensor, timestep: Tensor, prompts: Rows) -> Any:
        banks = prompts if isinstance(prompts, Mapping) else {EMBEDDINGS: prompts}
        return model(x.to(dtype), timestep, **banks)

    return called


def _step(x: Tensor, out: Tensor, abar: float, next_abar: float, plan: _Plan) -> Tensor:
    """One DDIM step from abar to next_abar. Coefficients are computed in double precision (Python floats)."""
    signal, noise = math.sqrt(abar), math.sqrt(1 - abar)
    if plan.prediction_type == "epsilon":
        x0, eps = (x - noise * out) / signal, out
    elif plan.prediction_type == "sample":
        x0, eps = out, _noise_of(x, out, signal, noise)
    else:
        x0, eps = signal * x - noise * out, signal * out + noise * x
    if plan.clip is not None:
        x0 = x0.clamp(-plan.clip, plan.clip)
        if plan.noise_of_clipped:
            eps = _noise_of(x, x0, signal, noise)
    return math.sqrt(next_abar) * x0 + math.sqrt(1 - next_abar) * eps


def _noise_of(x: Tensor, x0: Tensor, signal: float, noise: float) -> Tensor:
    return (x - signal * x0) / noise if noise else torch.zeros_like(x)


def _checked(timesteps: Sequence[int], steps: int, T: int) -> list[int]:
    times = [int(t) for t in timesteps]
    if len(times) != steps:
        raise InputError.of("timesteps", f"{steps} values, one per step", len(times))
    falling = all(a > b for a, b in itertools.pairwise(times))
    if not times or not falling or times[0] >= T or times[-1] < 0:
        raise InputError.of("timesteps", f"decreasing values from {T - 1} to 0", times)
    return times
