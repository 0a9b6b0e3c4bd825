# SPDX-License-Identifier: Apache-2.0
"""compare student and teacher on the same prompts and noise: report.html"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastdistill.commands._bars import Bars
from fastdistill.commands._options import quiet, run_file
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

    quiet()
    with Bars(not given.json) as bars:
        task = bars.begin("samples")
        report = evaluate(
            given.config,
            step=given.own.step,
            allow_code=given.allow_code,
            progress=lambda done, total: bars.show(task, done, "samples", 1, total=total),
        )
    if given.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    _print(report, f"{given.config.directory}/{FOLDER}/report.html")


def _print(report: dict[str, Any], page: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from fastdistill.evaluate.comparison import MEASURES, finding
    from fastdistill.evaluate.page import number
    from fastdistill.evaluate.samples import MODELS

    table = Table("measure", *MODELS, "95 %", box=None)
    for name in ("parameters", "images_per_second"):
        digits = ",.0f" if name == "parameters" else ",.3g"
        table.add_row(name.replace("_", " "), *(f"{report[model][name]:{digits}}" for model in MODELS), "")
    for name, (heading, _) in MEASURES.items():
        cells = [report[model]["measures"].get(name) for model in MODELS]
        if any(cells):
            ends = (cells[1] or {}).get("interval")
            interval = "" if ends is None else f"{number(ends[0])} to {number(ends[1])}"
            table.add_row(heading, *(number(cell["value"]) if cell else "" for cell in cells), interval)
    console = Console()
    console.print(table)
    console.print(f"\n{finding(report)}\nReport: [bold]{page}[/bold]", soft_wrap=True)
