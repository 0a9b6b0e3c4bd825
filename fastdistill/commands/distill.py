# SPDX-License-Identifier: Apache-2.0
"""train the student of a run, or resume it"""

from __future__ import annotations

import json
from dataclasses import dataclass

from fastdistill.commands._bars import Bars
from fastdistill.commands._options import quiet, run_file
from fastdistill.documented import documented


@documented
@dataclass(frozen=True)
class DistillOptions:
    """Train the student of a run to its last step; a stopped run is resumed. Under torchrun, each process is a
    rank."""


def run(arguments: list[str]) -> None:
    given = run_file(DistillOptions, arguments, "distill", ranks=True)
    if given is None:
        return
    quiet()
    from fastdistill import runs
    from fastdistill.commands._training import Course
    from fastdistill.train import distributed

    config = given.config
    with Bars("bar" in config.log and not given.json and distributed.started_as() == 0) as bars:
        course = Course(bars, config.train.steps, config.train.batch)

        def tell(line: str) -> None:
            bars.console.print(line, highlight=False, soft_wrap=True)

        shown = tell if "bar" in config.log and not given.json else None
        result = runs.distill(config, allow_code=given.allow_code, progress=course.show, tell=shown)
    if distributed.started_as() != 0:
        return
    found = runs.metrics_of(result)
    if given.json:
        print(json.dumps(found))
    else:
        print(f"{config.directory}: {result.steps:,} steps in {result.seconds:,.0f} s, loss {found.get('loss', 0):.4g}")
