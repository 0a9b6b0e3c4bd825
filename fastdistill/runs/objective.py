# SPDX-License-Identifier: Apache-2.0
"""What the student of a run learns."""

from __future__ import annotations

from fastdistill.distill import RandomConditioning, Weights
from fastdistill.models import Student
from fastdistill.runs.config import ObjectiveSettings


def objective_of(settings: ObjectiveSettings, student: Student) -> RandomConditioning:
    """Random conditioning with these settings, at the student's taps."""
    given, weights = settings.random_conditioning, settings.weights
    return RandomConditioning(
        probability=given.probability,
        parameters=given.parameters,
        null_probability=given.null,
        weights=Weights(output=weights.output, feature=weights.feature, task=weights.task),
        feature_distance=settings.feature_distance,
        taps=tuple(zip(student.teacher_taps, student.student_taps, strict=True)) if weights.feature else (),
        with_replacement=given.with_replacement,
        loss_weighting=settings.loss_weighting,
        min_snr_gamma=settings.min_snr_gamma,
    )
