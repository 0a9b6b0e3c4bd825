# SPDX-License-Identifier: Apache-2.0
"""The distance of students' samples from the teacher's samples with the same noise, by kind of prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.errors import InputError
from fastdistill.evaluate.diversity import bootstrap_all
from fastdistill.evaluate.metrics import frechet_distance
from fastdistill.evaluate.samples import rms
from fastdistill.tasks.digits import data
from fastdistill.tasks.digits.judge import Judge

#: Number of prompts of each kind, evenly chosen: the bias of a Fréchet distance depends on the number of samples.
_COUNT = min(map(len, data.KINDS.values()))
PROMPTS = {kind: [rows[i * len(rows) // _COUNT] for i in range(_COUNT)] for kind, rows in data.KINDS.items()}


def likeness(judge: Judge, teacher: Tensor, students: Sequence[Tensor]) -> dict[str, dict[str, dict[str, Any]]]:
    """By kind of prompt and measure {value, interval, each}: means over the students of several seeds, with the 95 %
    interval over prompts, and the values of each student.

    ``distance``: root mean square difference of a sample, values in [-1, 1], from the teacher's with the same prompt
    and noise; ``unrelated`` is that of two teacher samples with the same prompt (None with one image per prompt).
    ``frechet``: Fréchet distance of both sets in the space of ``Judge.features``. The intervals are from the bootstrap
    for the distance, and from the delete-half jackknife for the Fréchet distance.

    Args:
        teacher, students: images [80 * I, 3, 8, 8], I consecutive ones for each prompt, with the same noise.

    Raises:
        InputError: wrong numbers of images.
    """
    images = len(teacher) // len(data.PROMPTS)
    for i, student in enumerate(students):
        if student.shape != teacher.shape or len(teacher) != images * len(data.PROMPTS) or not images:
            rule = f"images of each of the {len(data.PROMPTS)} prompts, as many as the teacher's"
            raise InputError.of(f"students[{i}]", rule, tuple(student.shape))
    each = [rms(student, teacher).view(-1, images).mean(1) for student in students]
    by_prompt = [judge.features(x).view(len(data.PROMPTS), images, -1) for x in (teacher, *students)]
    other = teacher.view(-1, images, *teacher.shape[1:]).roll(1, 1).flatten(0, 1)
    unrelated = rms(teacher, other).view(-1, images).mean(1)

    def mean(rows: Tensor) -> list[float]:
        return [float(distances[rows].mean()) for distances in each]

    def frechet(rows: Tensor) -> list[float]:
        real, *fakes = (features[rows].flatten(0, 1) for features in by_prompt)
        return [frechet_distance(real, fake) for fake in fakes]

    found: dict[str, dict[str, dict[str, Any]]] = {}
    for kind, rows in PROMPTS.items():
        prompts = torch.tensor(rows)
        found[kind] = {"distance": _measure(mean, prompts, replace=True), "frechet": _measure(frechet, prompts)}
        found[kind]["distance"]["unrelated"] = float(unrelated[prompts].mean()) if images > 1 else None
    return found


def _measure(values: Callable[[Tensor], list[float]], prompts: Tensor, *, replace: bool = False) -> dict[str, Any]:
    def both(rows: Tensor) -> list[float]:
        each = values(rows)
        return [sum(each) / len(each), *each]

    mean, *each = bootstrap_all(both, prompts, replace=replace)
    return {"value": mean.value, "interval": [max(0.0, mean.low), mean.high], "each": [one.value for one in each]}
