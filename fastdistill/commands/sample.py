# SPDX-License-Identifier: Apache-2.0
"""write images of the student, or of the teacher, for prompts of your own"""

from __future__ import annotations

import json
from dataclasses import dataclass

from fastdistill.commands._bars import Bars
from fastdistill.commands._options import quiet, run_file
from fastdistill.documented import documented
from fastdistill.errors import FastdistillError, named


@documented
@dataclass(frozen=True)
class SampleOptions:
    """Write an image of each prompt for each seed."""

    prompts: str | None = None
    """File of prompts: text with one per line, CSV, TSV, JSON lines or Parquet."""
    prompt: tuple[str, ...] = ()
    """Prompts, given directly."""
    to: str | None = None
    """New folder for the images; none: samples/ of the run."""
    of_teacher: bool = False
    """Sample the teacher instead of the student."""
    step: int | None = None
    """Step of the student's checkpoint; none: the newest."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the initial noise."""
    steps: int | None = None
    """Number of sampling steps; none: that of the cache."""
    guidance_scale: float | None = None
    """Guidance scale as in diffusers; none: that of the cache."""
    size: tuple[int, int] | None = None
    """Height and width of the images; none: the first of cache.sizes."""


def run(arguments: list[str]) -> None:
    given = run_file(SampleOptions, arguments, "sample")
    if given is None:
        return
    own = given.own
    if (own.prompts is None) == (not own.prompt):
        raise FastdistillError("sample: expected one of --prompts FILE and --prompt TEXT ..., got none or both")
    quiet()
    from fastdistill import runs
    from fastdistill.data.texts import read_prompts
    from fastdistill.files import located

    with named("--prompts"):
        prompts = own.prompt if own.prompts is None else read_prompts(located(own.prompts, "--prompts")).texts
    to = own.to if own.to is not None else f"{given.config.directory}/samples{'-teacher' if own.of_teacher else ''}"
    with Bars(not given.json) as bars:
        task = bars.begin("sample")
        files = runs.sample(
            given.config,
            prompts,
            to,
            teacher=own.of_teacher,
            step=own.step,
            seeds=own.seeds,
            steps=own.steps,
            guidance_scale=own.guidance_scale,
            size=own.size,
            allow_code=given.allow_code,
            progress=lambda done, total: bars.show(task, done, "sample", total=total),
        )
    print(json.dumps([str(file) for file in files]) if given.json else f"{to}: {len(files)} images")
