# SPDX-License-Identifier: Apache-2.0
"""From a model folder to an exported student: one run file, and a function for each thing that is done with it."""

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

__all__ = [
    "CacheSettings",
    "EvaluateSettings",
    "LoraSettings",
    "ObjectiveSettings",
    "PreviewSettings",
    "PromptSettings",
    "RunConfig",
    "StudentSettings",
]
