# SPDX-License-Identifier: Apache-2.0
"""write a page of a training, running or done: losses, taps, previews, speed"""

from __future__ import annotations

import json
from dataclasses import dataclass

from fastdistill.commands._arguments import parsed
from fastdistill.commands._options import import_pydantic, quiet, taken
from fastdistill.documented import documented
from fastdistill.errors import FastdistillError


@documented
@dataclass(frozen=True)
class ReportOptions:
    """Write a page about a training from its directory; the training may be running, stopped or done."""

    output: str | None = None
    """Folder for report.html and report.json; none: report/ in the directory."""


def run(arguments: list[str]) -> None:
    import_pydantic()
    arguments, as_json = taken(arguments, "--json")
    wanted = {"-h", "--help"} & set(arguments)
    if not wanted and (not arguments or arguments[0].startswith("-")):
        got = repr(arguments[0]) if arguments else "nothing"
        raise FastdistillError(f"report: expected the directory of a training, got {got}")
    directory, rest = ("", arguments) if wanted else (arguments[0], arguments[1:])
    options = parsed([ReportOptions], rest, "fastdistill report DIRECTORY")
    quiet()
    from fastdistill import runs
    from fastdistill.evaluate.training import finding
    from fastdistill.runs.report import FOLDER

    found = runs.report(directory, options.output)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        print(f"{finding(found)}\nReport: {options.output or f'{directory}/{FOLDER}'}/report.html")
