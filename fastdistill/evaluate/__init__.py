# SPDX-License-Identifier: Apache-2.0
"""Evaluation of students: metrics, figures and the report."""

from fastdistill.evaluate.figures import loss_curves, png, probability_curve, sample_grid
from fastdistill.evaluate.metrics import frechet_distance, mean_spread, wilson_interval
from fastdistill.evaluate.report import write_report

__all__ = [
    "frechet_distance",
    "loss_curves",
    "mean_spread",
    "png",
    "probability_curve",
    "sample_grid",
    "wilson_interval",
    "write_report",
]
