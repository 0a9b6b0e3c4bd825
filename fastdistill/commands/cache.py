# SPDX-License-Identifier: Apache-2.0
"""encode the prompts of a run and sample its teacher, or resume this"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from typing import Literal

from rich.progress import TaskID

from fastdistill.commands._bars import Bars
from fastdistill.commands._options import quiet, run_file
from fastdistill.documented import documented


@documented
@dataclass(frozen=True)
class CacheOptions:
    """Encode the prompts of a run, then sample its teacher for the seen ones. A stopped call can be resumed by the same
    command; existing rows are kept. Concurrent calls, such as those of torchrun, share the work."""

    only: Literal["prompts", "latents"] | None = None
    """Create only the encodings or only the latents; none: both."""
    verify: bool = True
    """Check the existing rows, and create damaged ones again."""


def run(arguments: list[str]) -> None:
    given = run_file(CacheOptions, arguments, "cache", ranks=True)
    if given is None:
        return
    quiet()
    from fastdistill import runs
    from fastdistill.train import distributed

    config = given.config
    with Bars("bar" in config.log and not given.json and distributed.started_as() == 0) as bars:
        stages: dict[str, _Stage] = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in stages:
                stages[name] = _Stage(bars.begin(name, total), time.perf_counter(), done)
            bars.show(stages[name].task, done, name)
            if estimate := stages[name].estimate(done, total):
                bars.print(f"{name}: {total:,} rows, {estimate}")

        own = given.own
        result = runs.cache(config, only=own.only, verify=own.verify, allow_code=given.allow_code, progress=show)
    if distributed.started_as() != 0:
        return
    if given.json:
        print(json.dumps(dataclasses.asdict(result), default=str))
    else:
        counts = f"{result.texts:,} encodings and {result.samples:,} latents, of which {result.made:,} are new"
        print(f"{config.cache.directory}: {counts}")


@dataclass
class _Stage:
    """One bar. begun: start time, and number of rows that existed then."""

    task: TaskID
    begun: float
    first: int
    told: bool = False

    def estimate(self, done: int, total: int) -> str | None:
        """Print the expected duration once, estimated from the first batch, unless it is below a minute."""
        if self.told or done <= self.first or done >= total:
            return None
        self.told = True
        minutes = (time.perf_counter() - self.begun) / (done - self.first) * (total - done) / 60
        if minutes < 1:
            return None
        return f"about {minutes / 60:.1f} hours" if minutes >= 90 else f"about {minutes:.0f} minutes"
