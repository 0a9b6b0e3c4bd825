# SPDX-License-Identifier: Apache-2.0
"""CLARID: canonical latents, that is, noised latents without the directions that change a feature of the teacher most.

Xu, Zhang, Pajouheshgar, Suesstrunk 2025 (2506.09955): (1) invert an image to the noise level t_e; (2) compute the
extraneous directions: the top k right singular vectors V of the Jacobian of a feature there; (3) project them out of
the latent once, x - V V^T x; (4) decode. The values of t_e and k and the feature are not public.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Guidance
from fastdistill.diffusion.guided import sample
from fastdistill.diffusion.inversion import Method, invert
from fastdistill.diffusion.prompts import Rows, check_prompts
from fastdistill.diffusion.schedule import PredictionType, Schedule, check_prediction_type
from fastdistill.errors import InputError, called, described
from fastdistill.models.jacobian import TapFunction
from fastdistill.models.subspace import Method as Search
from fastdistill.models.subspace import Subspace, project, top_subspace
from fastdistill.ops import _check


@dataclass(frozen=True)
class Clarid:
    """Settings of CLARID.

    Args:
        t_e: timestep to which images are inverted, a row of the schedule, at least 1.
        k: number of directions to project out; 0: none, so images are only inverted and decoded.
        tap: the feature, as in ``TapFunction``: a module's name, ``output`` or ``x0``.
        steps: number of steps of the inversion, and of the decoding; evenly spaced timesteps from t_e.
        guidance: text of a ``Guidance`` for the decoding; the inversion and the feature use none.
        method: ``ddim`` or ``heun``, for both. correct: fixed-point passes per step of the inversion.
        search, oversample, tolerance, seed: see ``top_subspace``.
    """

    t_e: int
    k: int
    tap: str
    steps: int = 20
    guidance: str = "0"
    method: Method = "ddim"
    correct: int = 0
    search: Search = "auto"
    oversample: int = 4
    tolerance: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("t_e", 1), ("k", 0), ("steps", 1), ("correct", 0), ("oversample", 0)):
            value = getattr(self, name)
            is_one = isinstance(value, int) and not isinstance(value, bool) and value >= low
            _check.require(is_one, name, f"a whole number from {low}", described(value))
        for name, known in (("method", get_args(Method)), ("search", get_args(Search))):
            value = getattr(self, name)
            _check.require(value in known, name, f"one of {', '.join(known)}", described(value))
        _check.require(isinstance(self.tap, str), "tap", "the name of a module, output or x0", described(self.tap))
        _check.require(
            0 < _check.real(self.tolerance, "tolerance") < 1, "tolerance", "a sine between 0 and 1", self.tolerance
        )
        _check.seed(self.seed)
        with called("guidance"):
            object.__setattr__(self, "guidance", str(Guidance.parse(self.guidance)))

    def grid(self, schedule: Schedule) -> Grid:
        """The noise levels from t_e to the data.

        Raises:
            InputError: t_e is outside of the schedule or has no signal; more steps than timesteps.
        """
        if not isinstance(schedule, Schedule):
            raise InputError.of("schedule", "a NoiseSchedule or a FlowSchedule", described(schedule))
        inside = self.t_e < len(schedule) and float(schedule.signal[self.t_e]) > 0
        last = int((schedule.signal > 0).sum()) - 1
        _check.require(inside, "t_e", f"a timestep of the schedule with signal, 1 to {last}", self.t_e)
        return Grid.trailing(schedule, self.steps, first=self.t_e)


@dataclass(frozen=True, eq=False)
class Canonical:
    """The result of ``canonical`` for a batch.

    Attributes:
        latents: [B, *S], the images inverted to t_e. clareps: [B, *S], the same without the top directions.
        samples: [B, *S], the clareps decoded. features: [B, *F], the tap at the clareps.
        energy: [B], ||latent - clarep||^2 / ||latent||^2.
        subspace: the directions; None if k = 0 or they were given.
    """

    latents: Tensor
    clareps: Tensor
    samples: Tensor
    features: Tensor
    energy: Tensor
    subspace: Subspace | None


def canonical(
    model: nn.Module,
    x: Tensor,
    prompts: Rows,
    clarid: Clarid,
    *,
    schedule: Schedule,
    null_prompt: Rows | None = None,
    prediction_type: PredictionType | None = None,
    clip_sample: float | None = None,
    inverted: bool = False,
    directions: Tensor | None = None,
    rows: Tensor | None = None,
    chunk: int | None = None,
) -> Canonical:
    """Canonical latents and samples of x [B, *S]; samples are independent of each other.

    Args:
        model: the teacher, in eval mode, float32 or float64, neither fused nor compiled.
        x: images or latents, in the scale of the model's latents.
        prompts: rows [B, ...] of the images' classes or captions. null_prompt: one row; None if the guidance is 0.
        schedule: the teacher's noise schedule. prediction_type: what it predicts; None: the schedule's usual one.
        clip_sample: limit of the predicted x_0 during decoding.
        inverted: x are already latents at t_e, such as noise.
        directions: [B, n, any], orthonormal; they are projected out instead of the top ones.
        rows, chunk: see ``top_subspace``.

    Raises:
        InputError: a setting, a model or arguments that do not fit. It is raised before anything runs, except if k is
            larger than the feature.
    """
    if not isinstance(clarid, Clarid):
        raise InputError.of("clarid", "a Clarid", described(clarid))
    _check.valued(x=x)
    if x.ndim < 2 or not x.dtype.is_floating_point:
        raise InputError.of("x", "floating point [B, ...]", f"{x.dtype} {tuple(x.shape)}")
    grid = clarid.grid(schedule)
    kind = check_prediction_type(prediction_type or schedule.prediction_types[0])
    guidance = Guidance.parse(clarid.guidance)
    weights = guidance.weights(grid).tolist()
    check_prompts(x, prompts, null_prompt, next((1 + w for w in weights if w != 0), 1.0))
    n = x[0].numel()
    _check.require(clarid.k <= n, "k", f"at most {n}, the elements of a sample", clarid.k)
    level = float(grid.signal[0]), float(grid.noise[0])
    f = TapFunction(model, clarid.tap, grid.model_times(x.device)[0], prompts, level=level, prediction_type=kind)
    if directions is not None:
        _check.valued(directions=directions)
        _check.shape(directions, "directions", (len(x), n, None), f"orthonormal vectors [{len(x)}, {n}, any]")

    latents = x.detach().to(f.dtype)
    if not inverted:
        backwards: dict[str, Any] = {"method": clarid.method, "correct": clarid.correct}
        latents = invert(model, latents, prompts, grid, prediction_type=kind, **backwards)
    subspace = None
    if directions is None and clarid.k:
        subspace = top_subspace(
            f, latents, clarid.k, method=clarid.search, oversample=clarid.oversample, tolerance=clarid.tolerance,
            seed=clarid.seed, rows=rows, chunk=chunk,
        )  # fmt: skip
        directions = subspace.vectors
    clareps = latents if directions is None else project(latents, directions.to(latents.dtype))
    with torch.no_grad():
        features = f.feature(clareps)
    samples = sample(
        model, clareps, prompts, null_prompt, grid, method=clarid.method, guidance=guidance, prediction_type=kind,
        clip_sample=clip_sample,
    )  # fmt: skip
    whole = latents.flatten(1).square().sum(1)
    energy = (latents - clareps).flatten(1).square().sum(1) / whole.clamp(min=torch.finfo(whole.dtype).tiny)
    return Canonical(latents, clareps, samples, features, energy, subspace)
