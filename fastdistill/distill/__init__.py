# SPDX-License-Identifier: Apache-2.0
"""Objectives: one file each. ``objective.py`` says what a new one must offer."""

from fastdistill.distill.guidance import GuidanceDistillation
from fastdistill.distill.knowledge import Weights
from fastdistill.distill.objective import BoundObjective, Objective, Setting
from fastdistill.distill.random_conditioning import RandomConditioning
from fastdistill.distill.regions import Regions
from fastdistill.distill.rolling import Rolling
from fastdistill.distill.trajectory import TrajectoryCache, generate_trajectory_cache

__all__ = [
    "BoundObjective",
    "GuidanceDistillation",
    "Objective",
    "RandomConditioning",
    "Regions",
    "Rolling",
    "Setting",
    "TrajectoryCache",
    "Weights",
    "generate_trajectory_cache",
]
