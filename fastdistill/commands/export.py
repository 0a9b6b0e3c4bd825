# SPDX-License-Identifier: Apache-2.0
"""write the student as a pipeline folder, or its adapters alone"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from fastdistill.commands._options import quiet, run_file
from fastdistill.documented import documented
from fastdistill.errors import FastdistillError


@documented
@dataclass(frozen=True)
class ExportOptions:
    """Write the student of a checkpoint as a pipeline folder with a model card; with LoRA, only the adapters."""

    to: str | None = None
    """The folder to create."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the weights; none: float32."""
    step: int | None = None
    """Step of the checkpoint; none: the newest."""
    averaged: bool = True
    """Write the averaged weights instead of those of the last step."""
    link: bool = False
    """Link the other components to the teacher's folder instead of copying them."""
    overwrite: bool = False
    """Replace an existing pipeline folder."""


def run(arguments: list[str]) -> None:
    given = run_file(ExportOptions, arguments, "export")
    if given is None:
        return
    own = given.own
    if own.to is None:
        raise FastdistillError("export: expected a new folder (--to FOLDER), got none")
    quiet()
    from fastdistill import runs

    path = runs.export(
        given.config,
        own.to,
        dtype=own.dtype,
        step=own.step,
        averaged=own.averaged,
        link=own.link,
        overwrite=own.overwrite,
        allow_code=given.allow_code,
    )
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    print(json.dumps({"folder": str(path), "bytes": size}) if given.json else f"{path}: {size / 1e6:,.1f} MB")
