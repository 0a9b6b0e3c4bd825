# SPDX-License-Identifier: Apache-2.0
"""Compare the student of a run with its teacher.

The same prompts and noise for both; writes evaluation/report.html in the run's directory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastdistill.commands._options import progress_bars, run_file
from fastdistill.documented import documented


@documented
@dataclass(frozen=True)
class EvaluateOptions:
    """Compare the student of a run with its teacher, on the same prompts and noise."""

    step: int | None = None
    """Step of the student's checkpoint; none: the newest."""


def run(arguments: list[str]) -> None:
    given = run_file(EvaluateOptions, arguments, "evaluate")
    if given is None:
        return
    import json

    from fastdistill.runs.evaluate import FOLDER, evaluate

    with progress_bars(not given.json) as bars:
        task = bars.add_task("samples", total=None, rate="")

        def show(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)
            speed = bars.tasks[0].speed
            bars.update(task, rate=f"{speed:.1f} img/s" if speed else "")

        report = evaluate(given.config, step=given.own.step, allow_code=given.allow_code, progress=show)
    if given.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    _print(report, f"{given.config.directory}/{FOLDER}/report.html")


def _print(report: dict[str, Any], page: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from fastdistill.evaluate.comparison import MEASURES, finding, number
    from fastdistill.evaluate.samples import MODELS

    table = Table("measure", *MODELS, "95 %", box=None)
    for name in ("parameters", "images_per_second"):
        table.add_row(name.replace("_", " "), *(f"{report[model][name]:,.6g}" for model in MODELS), "")
    for name, (heading, _) in MEASURES.items():
        cells = [report[model]["measures"].get(name) for model in MODELS]
        if any(cells):
            ends = (cells[1] or {}).get("interval")
            interval = "" if ends is None else f"{number(ends[0])} to {number(ends[1])}"
            table.add_row(heading, *(number(cell["value"]) if cell else "" for cell in cells), interval)
    console = Console()
    console.print(table)
    console.print(f"\n{finding(report)}\nReport: [bold]{page}[/bold]", soft_wrap=True)
