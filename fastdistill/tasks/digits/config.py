# SPDX-License-Identifier: Apache-2.0
"""Settings of the digits experiment; they define the command line options and the YAML fields."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fastdistill.documented import documented
from fastdistill.errors import InputError
from fastdistill.ops.feature_match import Distance
from fastdistill.runs.config import (
    CacheSettings,
    LossSettings,
    ObjectiveSettings,
    PreviewSettings,
    PromptSettings,
    RandomConditioningSettings,
    RollingSettings,
    RunConfig,
    StudentSettings,
)
from fastdistill.tasks.digits import data
from fastdistill.tasks.digits.pipeline import EXPERIMENT
from fastdistill.tasks.digits.sampling import Sampling
from fastdistill.train.config import PreviewConfig, TrainConfig, TrainSettings

CACHE_SEED = 0  # seed of the latents; students of all seeds share them

#: The students to compare: name -> p(t) and its parameters. Everything else is the same for all.
STUDENTS: dict[str, tuple[str, dict[str, float]]] = {
    "random_conditioning": ("exp", {}),
    "paired": ("const", {"value": 0.0}),
}


@documented
@dataclass(frozen=True)
class DigitsConfig:
    """Compare random conditioning with paired prompts on handwritten digits, using the shipped teacher."""

    output: str = "runs/digits"
    """Directory of the experiment; an interrupted experiment in it is continued."""
    quick: bool = False
    """Short version, one minute instead of ten: fewer steps, latents and images (default output runs/digits-quick)."""
    seeds: Annotated[int, Field(ge=1, le=100)] = 1
    """Number of students to train of each kind; if above 1, results are mean and standard deviation."""
    student: Literal["narrow", "blocks"] = "narrow"
    """narrow: fewer channels, random weights, 1x1 adapters at the taps. blocks: no mid block, the teacher's weights."""
    channels: tuple[int, int] = EXPERIMENT["student"]["channels"]
    """Channels per stage of the narrow student (the teacher has 32, 64)."""
    cache_images: Annotated[int, Field(ge=48, le=1_000_000)] = 1536
    """Number of latents that the teacher generates, rounded up to a multiple of the 48 seen prompts."""
    images_per_prompt: Annotated[int, Field(ge=1, le=1000)] = 16
    """Images per prompt (there are 80) to evaluate each model."""
    feature_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Weight of the feature loss, relative to the output loss."""
    feature_distance: Distance = "mse"
    """normalized_mse: MSE / mean square of the teacher; huber: linear above 1; cosine: one distance per sample."""
    null_probability: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Fraction of prompts that are replaced by the null prompt."""
    rolling: Annotated[int, Field(ge=2)] | None = 2
    """With random conditioning, n replaces every n-th sample by a rolling state (docs/unseen_prompts.md); none: off."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            **EXPERIMENT["train"], preview=PreviewConfig(guidance_scale=Sampling().guidance_scale)
        )
    )
    sampling: Sampling = Sampling()
    workers: Annotated[int, Field(ge=1, le=64)] = field(default_factory=lambda: min(2, os.cpu_count() or 1))
    """Processes to run at the same time, each with one model."""
    threads: Annotated[int, Field(ge=1, le=os.cpu_count() or 1)] = 1
    """CPU threads per process; more than one was slower on small machines."""
    device: str = "auto"
    """Device to run on; auto: a GPU if there is one, else the CPU."""

    def resolved(self) -> DigitsConfig:
        """The configuration with ``quick`` applied and ``device`` resolved."""
        import torch

        config = self
        if config.device == "auto":
            config = dataclasses.replace(config, device="cuda" if torch.cuda.is_available() else "cpu")
        if config.quick:
            output = "runs/digits-quick" if config.output == DigitsConfig.output else config.output
            train = dataclasses.replace(config.train, steps=min(config.train.steps, 160), warmup=20)
            config = dataclasses.replace(config, output=output, train=train, cache_images=384, images_per_prompt=3)
        return config

    def run_file(self, name: str, seed: int) -> RunConfig:
        """The run of the student ``name`` (a key of ``STUDENTS``) with a seed, in ``output``; all runs share a cache.

        Raises:
            InputError: the limit of the samples differs from the task's; a preview of an unknown prompt.
        """
        limit, preview, output = Sampling().clip_sample, self.train.preview, Path(self.output)
        for place, given in (
            ("sampling", self.sampling.clip_sample),
            ("train.preview", preview.clip_sample),
        ):
            if given not in (None, limit):
                raise InputError.of(f"{place}.clip_sample", f"{limit}, that of the task", given)
        probability, parameters = STUDENTS[name]
        every = self.rolling if name == "random_conditioning" else None
        narrow = StudentSettings(channels=self.channels, init="random")
        cache = {
            "directory": str(output / "cache"),
            "images_per_prompt": -(-self.cache_images // len(data.SEEN)),
            "steps": self.sampling.steps,
            "guidance_scale": None,
            **self.sampling.guided(),
            "seed": CACHE_SEED,
        }
        return RunConfig(
            directory=str(output / "models" / f"{name}-{seed}" / "training"),
            device=self.device,
            seed=self.train.seed + seed,
            teacher="task:digits",
            teacher_dtype=EXPERIMENT["teacher_dtype"],
            log=("jsonl", *self.train.trackers),
            prompts=PromptSettings(**EXPERIMENT["prompts"]),
            cache=CacheSettings(**EXPERIMENT["cache"] | cache),
            student=narrow if self.student == "narrow" else StudentSettings(spec="bk_small"),
            objective=ObjectiveSettings(
                random_conditioning=RandomConditioningSettings(
                    probability=probability,
                    parameters=parameters,
                    null=self.null_probability,
                    rolling=RollingSettings()
                    if every is None
                    else RollingSettings(every=every, clip_sample=limit, null=self.null_probability),
                ),
                weights=LossSettings(feature=self.feature_weight),
                feature_distance=self.feature_distance,
            ),
            train=TrainSettings(**{f.name: getattr(self.train, f.name) for f in dataclasses.fields(TrainSettings)}),
            preview=PreviewSettings(
                every=preview.every,
                prompts=_texts(preview.prompts),
                seeds=preview.seeds,
                steps=preview.steps,
                guidance_scale=preview.guidance_scale,
            ),
        )


def _texts(prompts: int | tuple[int | str, ...]) -> int | tuple[str, ...]:
    """The prompts of previews; row numbers of ``PROMPTS`` become texts."""
    if isinstance(prompts, int):
        return prompts
    for row in prompts:
        if isinstance(row, int) and not 0 <= row < len(data.PROMPTS):
            raise InputError.of("train.preview.prompts", f"rows 0 to {len(data.PROMPTS) - 1}, or texts", row)
    return tuple(row if isinstance(row, str) else data.PROMPTS[row].text for row in prompts)
