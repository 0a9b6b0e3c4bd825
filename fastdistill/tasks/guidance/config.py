# SPDX-License-Identifier: Apache-2.0
"""Settings of the lab of guidance, from which the command line options and YAML fields are made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import Field

from fastdistill.documented import documented
from fastdistill.train.config import Seed

World = Literal["gaussian", "two_class", "hypercube", "random_centres"]
WORLDS: tuple[World, ...] = get_args(World)


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
