# SPDX-License-Identifier: Apache-2.0
"""Runs: from a model folder to an exported student, described by one run file; one function per command."""

from __future__ import annotations

from pathlib import Path

from fastdistill.runs.cache import Cached, cache
from fastdistill.runs.config import (
    CacheSettings,
    EvaluateSettings,
    LoraSettings,
    ObjectiveSettings,
    PreviewSettings,
    PromptSettings,
    RunConfig,
    StudentSettings,
)
from fastdistill.runs.distill import distill, metrics_of, trainer_of
from fastdistill.runs.evaluate import evaluate
from fastdistill.runs.export import export
from fastdistill.runs.init import init, recipes
from fastdistill.runs.models import trained_student
from fastdistill.runs.opened import Run, opened
from fastdistill.runs.plan import plan
from fastdistill.runs.pool import Pool
from fastdistill.runs.report import report
from fastdistill.runs.sample import sample
from fastdistill.train.config import from_yaml


def load(path: str | Path) -> RunConfig:
    """Read a run file.

    Raises:
        InputError: it does not exist, is not YAML, or has unknown fields or wrong values; all of them in one message.
    """
    return from_yaml(RunConfig, path)


__all__ = [
    "CacheSettings",
    "Cached",
    "EvaluateSettings",
    "LoraSettings",
    "ObjectiveSettings",
    "Pool",
    "PreviewSettings",
    "PromptSettings",
    "Run",
    "RunConfig",
    "StudentSettings",
    "cache",
    "distill",
    "evaluate",
    "export",
    "init",
    "load",
    "metrics_of",
    "opened",
    "plan",
    "recipes",
    "report",
    "sample",
    "trained_student",
    "trainer_of",
]
