# SPDX-License-Identifier: Apache-2.0
"""The objective of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from fastdistill.distill import GuidanceDistillation, RandomConditioning, Regions, Rolling, Weights
from fastdistill.errors import InputError, set_by
from fastdistill.models import Student
from fastdistill.runs.config import ObjectiveSettings, RunConfig
from fastdistill.train.config import TrainConfig

_CONDITIONING = "objective.random_conditioning"
#: Settings of the trainer, and fields of a run file that are not in ``train``.
_ELSEWHERE = {"seed": "seed", "trackers": "log", "preview": "preview"}
_OF_TRAINER = re.compile(rf"\bconfig\.({'|'.join(field.name for field in dataclasses.fields(TrainConfig))})\b")
#: Settings of the objective by the names that its errors have, and the fields that set them.
OF_OBJECTIVE = {
    **{name: f"{_CONDITIONING}.{name}" for name in ("probability", "rolling", "regions", "with_replacement")},
    "parameters": f"{_CONDITIONING}.parameters",
    "p(t)": f"{_CONDITIONING}.parameters: p(t)",
    "null_probability": f"{_CONDITIONING}.null",
    **{name: f"objective.{name}" for name in ("weights", "loss_weighting", "min_snr_gamma", "feature_distance")},
    **{name: f"objective.guidance.{name}" for name in ("scale", "lowest", "grid", "weight_limit")},
}
#: The same, for errors that are not of a trainer, which has a schedule of noise, and previews with guidance.
OF_GUIDANCE = {"schedule": "objective.guidance.schedule", "guidance": "objective.guidance.schedule"}


@contextlib.contextmanager
def as_fields(*, objective: bool = True) -> Iterator[None]:
    """Names, in the InputErrors of a trainer (and of its objective), the fields of the run file."""
    try:
        with set_by(OF_OBJECTIVE if objective else {}):
            yield
    except InputError as error:
        text = _OF_TRAINER.sub(lambda found: _ELSEWHERE.get(found[1], f"train.{found[1]}"), str(error))
        if text == str(error):
            raise
        raise InputError(text) from error


def objective_of(settings: ObjectiveSettings, student: Student) -> RandomConditioning:
    """Random conditioning, or guidance distillation with it, with these settings and the student's taps."""
    given, weights, guidance = settings.random_conditioning, settings.weights, settings.guidance
    kind: Any = RandomConditioning
    own: dict[str, Any] = {"loss_weighting": settings.loss_weighting or "uniform"}
    if guidance.schedule is not None:
        kind, own = GuidanceDistillation, dataclasses.asdict(guidance) | {"loss_weighting": settings.loss_weighting}
    made: RandomConditioning = kind(
        **own,
        probability=given.probability,
        parameters=given.parameters,
        null_probability=given.null,
        weights=Weights(output=weights.output, feature=weights.feature, task=weights.task),
        feature_distance=settings.feature_distance,
        taps=tuple(zip(student.teacher_taps, student.student_taps, strict=True)) if weights.feature else (),
        with_replacement=given.with_replacement,
        min_snr_gamma=settings.min_snr_gamma,
        rolling=Rolling(**dataclasses.asdict(given.rolling)),
        regions=Regions(**dataclasses.asdict(given.regions)),
    )
    return made


def check_conditioning(config: RunConfig, timesteps: int, ranks: int) -> None:
    """InputError for regions or rolling states that do not fit the rest of the run file or the number of ranks."""
    _check_regions(config)
    objective, rolling = config.objective, config.objective.random_conditioning.rolling
    every, name = rolling.every, "objective.random_conditioning.rolling.every"
    if every is None:
        return
    sizes = {"train.batch": config.train.batch, "train.micro_batch": config.train.micro_batch}
    if ranks > 1 and config.train.batch % ranks == 0:
        sizes[f"the part that each of {ranks} ranks has of train.batch"] = config.train.batch // ranks
    for other, size in sizes.items():
        if size is not None and size % every:
            raise InputError.of(name, f"a divisor of {other}, {size}", every)
    if rolling.steps > timesteps:
        where = "objective.random_conditioning.rolling.steps"
        raise InputError.of(where, f"at most the {timesteps} timesteps of the schedule", rolling.steps)
    if config.cache.sizes is not None and len(config.cache.sizes) > 1:
        raise InputError.of(name, "none for latents of several sizes (cache.sizes)", every)
    if objective.guidance.schedule is not None:
        raise InputError.of(name, "none with objective.guidance.schedule", every)
    if objective.weights.task:
        raise InputError.of(
            "objective.weights.task", "0 with rolling states, which are of no latent", objective.weights.task
        )


def _check_regions(config: RunConfig) -> None:
    count, name = config.objective.random_conditioning.regions.count, "objective.random_conditioning.regions.count"
    if count is None:
        return
    needed = {
        "cache.encodings": (config.cache.encodings, "stored"),
        "cache.read": (config.cache.read, "memory"),
        "train.banks": (config.train.banks, "device"),
    }
    for field, (value, wanted) in needed.items():
        if value not in (wanted, "auto"):
            raise InputError.of(name, f"none where prompts are not in the device's memory ({field}: {wanted})", value)
    if config.cache.sizes is not None and len(config.cache.sizes) > 1:
        raise InputError.of(name, "none for latents of several sizes (cache.sizes)", count)
    if not config.objective.weights.output:
        raise InputError.of("objective.weights.output", "above 0 with regions, which go by that distance", 0.0)
