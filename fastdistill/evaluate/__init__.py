# SPDX-License-Identifier: Apache-2.0
"""Evaluation of students: metrics, figures and the report."""

from fastdistill.evaluate.classification import accuracy, calibration, logits_of, reliance, saliency, saliency_on
from fastdistill.evaluate.corruptions import corrupted, corruptions
from fastdistill.evaluate.diagnosis import diagnose
from fastdistill.evaluate.diversity import (
    bootstrap,
    bootstrap_all,
    class_separation,
    density_coverage,
    mean_shift,
    precision_recall,
    variance_ratio,
    vendi_score,
)
from fastdistill.evaluate.figures import loss_curves, png, probability_curve, sample_grid, schedule_curve
from fastdistill.evaluate.frontier import frontier
from fastdistill.evaluate.guidance import write_guidance_report
from fastdistill.evaluate.metrics import frechet_distance, mean_spread, wilson_interval
from fastdistill.evaluate.report import write_report
from fastdistill.evaluate.robustness import attacked, robustness

__all__ = [
    "accuracy",
    "attacked",
    "bootstrap",
    "bootstrap_all",
    "calibration",
    "class_separation",
    "corrupted",
    "corruptions",
    "density_coverage",
    "diagnose",
    "frechet_distance",
    "frontier",
    "logits_of",
    "loss_curves",
    "mean_shift",
    "mean_spread",
    "png",
    "precision_recall",
    "probability_curve",
    "reliance",
    "robustness",
    "saliency",
    "saliency_on",
    "sample_grid",
    "schedule_curve",
    "variance_ratio",
    "vendi_score",
    "wilson_interval",
    "write_guidance_report",
    "write_report",
]
