# SPDX-License-Identifier: Apache-2.0
"""Information that a run writes about itself into its directory, and how much of its device it uses."""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field

import fastdistill
from fastdistill import schemas
from fastdistill.errors import Stopped, StorageError, quoted
from fastdistill.files import atomic_write, json_value
from fastdistill.plan import Plan
from fastdistill.tasks.workers import versions
from fastdistill.train import distributed

ABOUT = "about.json"  # in the directory of a run; about the last call of ``distill``


class _Values(BaseModel):
    """The fields of ``about.json``; any may be missing, because older versions do not write all."""

    model_config = ConfigDict(strict=True)
    command: str = ""
    versions: dict[str, str] = {}
    device: str = ""
    lines: list[str] = []
    ended: str | None = None
    flops: Annotated[float, Field(gt=0, le=1e30)] = 1.0
    ceiling: Annotated[float, Field(ge=1, le=1e30)] = 1.0
    source: str = ""


class About:
    """``about.json``: ``command``, ``versions``, ``device``, the ``lines`` printed at the beginning, and ``ended``: why
    the training ended before its last step, if known. For a run with a plan also ``flops``, the operations of a step on
    a rank according to the plan, and ``ceiling``, the operations per second that the device reaches in a large matrix
    product, with the ``source`` of that figure.
    """

    def __init__(self, directory: Path, device: torch.device, planned: Plan | None) -> None:
        self._path = directory / ABOUT
        self._since = 0, 0.0
        self.values: dict[str, Any] = {
            "schema": schemas.ABOUT.version,
            "command": _command(),
            "versions": versions(),
            "device": _device(device),
            "lines": [],
            "ended": None,
        }
        if planned is not None:
            flops, card = sum(planned.flops.values()) * planned.batch, planned.card
            self.values |= {"flops": flops, "ceiling": card.matmul, "source": card.source}

    def begin(self, done: int) -> None:
        """Start measuring the time of the steps."""
        self._since = done, time.perf_counter()

    def add(self, lines: Sequence[str]) -> None:
        """Add lines printed at the beginning, and write the file."""
        self.values["lines"] += lines
        self._write()

    def end(self, error: BaseException) -> None:
        """Record what has ended the training."""
        self.values["ended"] = str(error) if isinstance(error, Stopped) else quoted(error)
        self._write()

    def utilization(self, done: int) -> dict[str, float]:
        """``mfu``: the operations of the steps since the last call, divided by those that the device can do in this
        time; empty without a plan."""
        (before, start), self._since = self._since, (done, time.perf_counter())
        seconds = self._since[1] - start
        return {} if seconds <= 0 else utilization(self.values, (done - before) / seconds)

    def _write(self) -> None:
        try:
            atomic_write(self._path, json.dumps(self.values, indent=2).encode())
        except StorageError as error:
            warnings.warn(f"{error}; the report of the run will lack it", stacklevel=3)


def read_about(directory: Path) -> dict[str, Any]:
    """The information that a run has written about itself; empty if there is none or it cannot be read.

    Raises:
        StorageError: a newer fastdistill wrote it.
    """
    file = directory / ABOUT
    try:
        found = json_value(file.read_bytes())
        schemas.ABOUT.check(found.pop("schema", 1), file)
        return _Values.model_validate(found).model_dump(exclude_unset=True)
    except StorageError:
        raise
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def utilization(about: dict[str, Any], rate: float) -> dict[str, float]:
    """``mfu`` for ``rate`` steps per second."""
    flops, ceiling = about.get("flops"), about.get("ceiling")
    return {"mfu": rate * flops / ceiling} if flops and ceiling else {}


def _command() -> str:
    """The command line of this process; empty if another program called this package."""
    program, *rest = sys.argv or [""]
    if Path(program).name in ("fastdistill", "__main__.py"):
        program = "fastdistill"
    elif Path(fastdistill.__file__).parent in Path(program).absolute().parents:
        return ""
    return shlex.join([program, *rest])


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type.upper()} ({platform.machine()}, threads: {torch.get_num_threads()})"
    return name if distributed.size() == 1 else f"{distributed.size()} ranks, this one on {name}"
