# SPDX-License-Identifier: Apache-2.0
"""Embedded tasks: real data, a teacher and a judge that are part of the package."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastdistill.errors import InputError

if TYPE_CHECKING:
    from fastdistill.models.pipelines import PipelineFolder

PREFIX = "task:"
#: Tasks that can be the teacher of a run: each has a module ``pipeline`` with a function ``open_pipeline``.
TEACHERS = ("digits",)


def open_task(teacher: str) -> PipelineFolder:
    """The pipeline of an embedded task, for ``task:NAME``; InputError for an unknown name."""
    name = teacher.removeprefix(PREFIX)
    if name not in TEACHERS:
        raise InputError.of("teacher", f"one of {', '.join(PREFIX + name for name in TEACHERS)}", repr(teacher))
    module: Any = importlib.import_module(f"{__name__}.{name}.pipeline")
    found: PipelineFolder = module.open_pipeline()
    return found
