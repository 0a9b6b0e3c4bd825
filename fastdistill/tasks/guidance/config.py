# SPDX-License-Identifier: Apache-2.0
"""Settings of the commands ``fastdistill guidance``; they define the command line options and the YAML fields."""

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
    """Directory for the results; an interrupted run in it is continued."""
    quick: bool = False
    """Short version, half a minute: fewer dimensions and samples (default output runs/guidance-lab-quick)."""
    world: Annotated[tuple[World, ...], Field(min_length=1)] = WORLDS
    """Distributions to measure."""
    samples: Annotated[int, Field(ge=64, le=1_000_000)] = 8192
    """Number of samples per row; fewer if they have many dimensions."""
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
    """Print a schedule of guidance for the steps of a sampler, with the number of model evaluations, and draw it."""

    schedule: str | None = None
    """Schedule, such as 8@10,-1@2,0 (docs/guidance.md). Also as the first argument."""
    grid: str = "karras:30"
    """Steps of the sampler: karras:30, karras:30@30..0.09, trailing:20, flow:28 or flow:28@3."""
    noise: Literal["scaled_linear", "linear", "cosine"] = "scaled_linear"
    """Noise schedule of the model (scaled_linear: Stable Diffusion); not used by flow grids."""
    method: Literal["ddim", "euler", "heun", "ancestral"] = "ddim"
    """Sampler; it determines the number of model evaluations."""
    png: str | None = "runs/guidance-show.png"
    """File of the picture; none: no picture."""


@documented
@dataclass(frozen=True)
class SolveConfig:
    """Guidance above a switch (a noise level) reduces the variance; find the weight below it that restores it.

    The variances are measured on the latents of a run or a cache (each prompt is a class), or given with --c and --u.
    """

    run: str | None = None
    """Run file; its latents and the noise schedule of its teacher are used. Also as the first argument."""
    cache: str | None = None
    """Directory of a latent cache, whose latents are used."""
    c: tuple[Positive, ...] = ()
    """Variances within a class, one for each direction."""
    u: tuple[Positive, ...] = ()
    """Variances of all data in the same directions."""
    rank: Annotated[int, Field(ge=1)] = 16
    """Number of directions that are measured one by one; all others get one common variance."""
    noise: Literal["scaled_linear", "linear", "cosine"] = "scaled_linear"
    """Noise schedule if no run file is given (scaled_linear: Stable Diffusion); not used by flow grids."""
    grid: str = "karras:30"
    """Steps of the sampler: karras:30, karras:30@30..0.09, trailing:20, flow:28 or flow:28@3."""
    method: Literal["ddim", "euler", "heun", "ancestral"] = "ddim"
    """Sampler."""
    w_plus: Positive = 4.0
    """Weight above the switch (guidance scale - 1)."""
    switch: Positive | None = None
    """Sigma of the switch; none: the lowest sigma for which the variance can be restored."""
    stop: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Sigma below which there is no guidance."""
    floor: Annotated[float, Field(le=0, allow_inf_nan=False)] = -1.0
    """Minimum weight below the switch."""
