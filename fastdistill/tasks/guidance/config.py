# SPDX-License-Identifier: Apache-2.0
"""Settings of the commands of guidance, from which the command line options and YAML fields are made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import Field

from fastdistill.documented import documented
from fastdistill.train.config import Seed

World = Literal["gaussian", "two_class", "hypercube", "random_centres"]
WORLDS: tuple[World, ...] = get_args(World)


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@documented
@dataclass(frozen=True)
class LabConfig:
    """Measure what guidance does to distributions whose scores are known exactly."""

    output: str = "runs/guidance-lab"
    """Directory of the results; what an interrupted run has measured in it is kept."""
    quick: bool = False
    """Short version, half a minute: fewer dimensions and samples (default output runs/guidance-lab-quick)."""
    world: Annotated[tuple[World, ...], Field(min_length=1)] = WORLDS
    """Which distributions."""
    samples: Annotated[int, Field(ge=64, le=1_000_000)] = 8192
    """Samples for each row; of high-dimensional ones fewer."""
    seed: Seed = 0
    """Seed of the noise, the classes and the random centres."""

    def resolved(self) -> LabConfig:
        """The configuration with ``quick`` applied."""
        if not self.quick:
            return self
        output = "runs/guidance-lab-quick" if self.output == LabConfig.output else self.output
        return dataclasses.replace(self, output=output, samples=min(self.samples, 2048))


@documented
@dataclass(frozen=True)
class ShowConfig:
    """Print a schedule of guidance over the steps of a sampler, with its evaluations, and draw it."""

    schedule: str | None = None
    """Such as 8@10,-1@2,0 (docs/guidance.md). Also as the first argument."""
    grid: str = "karras:30"
    """Steps of the sampler: karras:30, karras:30@30..0.09, trailing:20, flow:28 or flow:28@3."""
    noise: Literal["scaled_linear", "linear", "cosine"] = "scaled_linear"
    """Noise of the model (scaled_linear: Stable Diffusion); flow grids need none."""
    method: Literal["ddim", "euler", "heun", "ancestral"] = "ddim"
    """The sampler, by which the evaluations are counted."""
    png: str | None = "runs/guidance-show.png"
    """File of the picture; none: no picture."""


@documented
@dataclass(frozen=True)
class SolveConfig:
    """Solve the weight below a switch that gives back the variance which guidance takes above it.

    The variances are those of a run's latents or of a latent cache, whose prompts are the classes, or given.
    """

    run: str | None = None
    """Run file: the noise of its teacher, its latents. Also as the first argument."""
    cache: str | None = None
    """Directory of a latent cache."""
    c: tuple[Positive, ...] = ()
    """Variances within a class, one for each direction."""
    u: tuple[Positive, ...] = ()
    """Variances of all data in the same directions."""
    rank: Annotated[int, Field(ge=1)] = 16
    """Directions that are measured; the others are taken to be alike."""
    noise: Literal["scaled_linear", "linear", "cosine"] = "scaled_linear"
    """Noise of the model where no run file says it (scaled_linear: Stable Diffusion); flow grids need none."""
    grid: str = "karras:30"
    """Steps of the sampler: karras:30, karras:30@30..0.09, trailing:20, flow:28 or flow:28@3."""
    method: Literal["ddim", "euler", "heun", "ancestral"] = "ddim"
    """The sampler."""
    w_plus: Positive = 4.0
    """Weight above the switch (guidance scale - 1)."""
    switch: Positive | None = None
    """Sigma of the switch; none: the lowest at which the variance can be kept."""
    stop: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Sigma below which there is no guidance."""
    floor: Annotated[float, Field(le=0, allow_inf_nan=False)] = -1.0
    """Lowest weight below the switch."""
