# SPDX-License-Identifier: Apache-2.0
"""Checks the guidance in a run file: for the samples in its cache, and for a student that learns it."""

from __future__ import annotations

from collections.abc import Iterable

from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Guidance
from fastdistill.diffusion.hooks import Cads, PowerLaw
from fastdistill.distill.guidance import check_products
from fastdistill.errors import InputError, called
from fastdistill.models.pipelines import PipelineFolder
from fastdistill.runs.config import GuidanceSettings, RunConfig


def check_cache(config: RunConfig, given: str | float, pipeline: PipelineFolder) -> None:
    """InputError if the samples of the cache cannot use this schedule."""
    scale, rule = config.cache.guidance_scale, None
    if scale is not None:
        way = "--cache.guidance-scale null, or --cache.guidance null"
        rule = f"none beside cache.guidance_scale {scale:g} = 1 + w ({way})"
    elif pipeline.family.reads_guidance(pipeline.config) or config.objective.guidance.scale is not None:
        rule = "none for models that read the guidance scale themselves (cache.guidance_scale)"
    if rule is not None:
        raise InputError.of("cache.guidance", rule, given)
    with called("cache.guidance"):
        Guidance.parse(given)


def check_distilled(
    guidance: GuidanceSettings, text: str, pipeline: PipelineFolder, sizes: Iterable[tuple[int, int] | None]
) -> None:
    """InputError if this schedule has no weights for the drawn noise levels; called before the latents are made."""
    if guidance.scale is not None and not guidance.scale[0] < guidance.scale[1]:
        raise InputError.of("objective.guidance.scale", "the lowest factor and the highest", guidance.scale)
    with called("objective.guidance.schedule"):
        weights = Guidance.parse(text)
    for size in sizes:
        schedule = pipeline.schedule(size)
        with called("objective.guidance.grid"):
            grid = None if guidance.grid is None else Grid.parse(guidance.grid, schedule)
        if isinstance(weights, PowerLaw | Cads):  # those have weights per sample
            continue
        with called("objective.guidance.schedule"):
            found = weights.table(schedule) if grid is None else weights.weights(grid)
        if guidance.scale is not None:
            with called("objective.guidance.scale"):
                check_products(guidance.scale, float(found.max()))
