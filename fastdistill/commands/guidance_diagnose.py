# SPDX-License-Identifier: Apache-2.0
"""measure what schedules of guidance do to the samples of a shipped teacher"""

from __future__ import annotations

import json

from fastdistill.commands._bars import Bars
from fastdistill.commands._options import configured, import_pydantic
from fastdistill.errors import InputError


def run(arguments: list[str]) -> None:
    import_pydantic()
    from rich.console import Console

    from fastdistill.tasks.guidance import diagnose

    if arguments[:1] in (["-h"], ["--help"]):
        arguments = ["shades", "--help"]
    task = arguments[0] if arguments else "nothing"
    if task not in diagnose.CONFIGS:
        raise InputError.of("guidance diagnose", f"{' or '.join(diagnose.CONFIGS)}", task)
    config = configured(diagnose.CONFIGS[task], arguments[1:], f"guidance diagnose {task}")
    if config is None:
        return
    with Bars(not config.json) as bars:
        bar = bars.begin(f"{task}: images")

        def show(done: int, total: int) -> None:
            bars.show(bar, done, f"{task}: images", total=total)

        found, report = diagnose.run(task, config, show)
    if config.json:
        print(json.dumps(report, allow_nan=False))
        return
    console = Console()
    diagnose.summarize(console, found.rows, found.recovered)
    console.print(report["finding"], soft_wrap=True)
    console.print(f"\nReport: {config.resolved().output}/report.html", soft_wrap=True)
