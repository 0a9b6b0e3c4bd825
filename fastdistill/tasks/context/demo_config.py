# SPDX-License-Identifier: Apache-2.0
"""Settings of the context experiment, from which the command line options and YAML fields are made."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from fastdistill.documented import documented
from fastdistill.tasks.context.students import KINDS, StudentConfig
from fastdistill.tasks.context.students import Kind as Student
from fastdistill.tasks.context.teacher import Kind

Share = Annotated[float, Field(gt=0, le=1)]
Radius = Annotated[float, Field(gt=0, le=2)]
#: What ``quick`` changes.
_QUICK: dict[str, Any] = {
    "output": "runs/context-quick",
    "t_e": (400,),
    "k": (5, 15),
    "taps": ("up_blocks.0",),
    "images": 30,
    "share": 0.04,
    "shares": (),
    "kinds": ("plain", "cadistill"),
    "queries": 50,
    "square_images": 20,
}
#: What ``full`` changes: the attacks of a published table, and all shares of the data.
_FULL: dict[str, Any] = {
    "shares": (0.01, 0.03, 0.1, 0.3, 1.0),
    "epsilon": (0.05, 0.1, 0.2),
    "steps": 100,
    "queries": 5000,
}


@documented
@dataclass(frozen=True)
class DemoConfig:
    """Train classifiers with canonical images of a diffusion teacher, so that they ignore the background."""

    output: str = "runs/context"
    """Directory of the experiment; an interrupted experiment in it is continued."""
    quick: bool = False
    """Short version, two minutes (default output runs/context-quick)."""
    full: bool = False
    """Longer version: longer attacks, and canonical images of up to all of the data."""
    seeds: Annotated[int, Field(ge=1, le=100)] = 1
    """Number of classifiers to train of each kind."""
    teacher: Kind = "broad"
    """Data of the teacher: broad: backgrounds of any hue; same: only the classifier's own data."""
    t_e: Annotated[tuple[Annotated[int, Field(ge=1, le=999)], ...], Field(min_length=1)] = (400, 500, 650)
    """Candidates for the timestep of the latents."""
    k: Annotated[tuple[Annotated[int, Field(ge=1, le=192)], ...], Field(min_length=1)] = (5, 15, 40)
    """Candidates for the number of directions."""
    taps: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "down_blocks.1",
        "mid_block",
        "up_blocks.0",
        "up_blocks.1",
        "x0",
    )
    """Candidates for the feature."""
    images: Annotated[int, Field(ge=30, le=360)] = 60
    """Number of images on which a setting is chosen, the same for each digit."""
    share: Share = 0.1
    """Fraction of the classifier's data for which canonical images are made."""
    shares: tuple[Share, ...] = (0.01, 0.03, 0.1)
    """Fractions for the curve of accuracy over this fraction."""
    kinds: Annotated[tuple[Student, ...], Field(min_length=1)] = KINDS
    """Kinds of classifiers to train; plain must be one of them."""
    epsilon: Annotated[tuple[Radius, ...], Field(min_length=1)] = (0.1,)
    """Radii of the attacks, ascending, for images in [-1, 1]; the summary reports the middle one."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    """Number of steps of the attack APGD (PGD has 20)."""
    queries: Annotated[int, Field(ge=1, le=100_000)] = 500
    """Number of queries of the attack Square."""
    square_images: Annotated[int, Field(ge=1, le=360)] = 100
    """Number of images that Square attacks; the other attacks use 360."""
    student: StudentConfig = field(default_factory=StudentConfig)
    """How a classifier is trained; kind and seed come from the experiment."""
    workers: Annotated[int, Field(ge=1, le=64)] = field(default_factory=lambda: min(2, os.cpu_count() or 1))
    """Processes to run at the same time."""
    threads: Annotated[int, Field(ge=1, le=os.cpu_count() or 1)] = 1
    """CPU threads per process; more than one was slower on small machines."""
    device: str = "auto"
    """Device to run on; auto: a GPU if there is one, else the CPU."""

    def resolved(self) -> DemoConfig:
        """The configuration with ``quick`` and ``full`` applied and ``device`` resolved."""
        import torch

        config, default = self, DemoConfig()
        changes = (_FULL if config.full else {}) | (_QUICK if config.quick else {})
        given = {name: value for name, value in changes.items() if getattr(config, name) == getattr(default, name)}
        config = dataclasses.replace(config, **given)
        if config.device == "auto":
            config = dataclasses.replace(config, device="cuda" if torch.cuda.is_available() else "cpu")
        return config
