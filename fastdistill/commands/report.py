# SPDX-License-Identifier: Apache-2.0
"""write a page of a training, running or done: losses, taps, previews, speed"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass

from fastdistill.commands._arguments import parsed
from fastdistill.commands._options import import_pydantic, quiet, taken
from fastdistill.documented import documented
from fastdistill.errors import FastdistillError


@documented
@dataclass(frozen=True)
class ReportOptions:
    """Write a page of a training from its directory, whether it runs, was stopped or is done; of several, one each."""

    output: str | None = None
    """Folder of report.html and report.json, of one directory; none: report, in each directory."""


def run(arguments: list[str]) -> None:
    import_pydantic()
    arguments, as_json = taken(arguments, "--json")
    wanted = {"-h", "--help"} & set(arguments)
    if not wanted and (not arguments or arguments[0].startswith("-")):
        got = repr(arguments[0]) if arguments else "nothing"
        raise FastdistillError(f"report: expected the directory of a training, got {got}")
    directories = [] if wanted else list(itertools.takewhile(lambda argument: argument[:1] != "-", arguments))
    options = parsed([ReportOptions], arguments[len(directories) :], "fastdistill report DIRECTORY ...")
    if options.output is not None and len(directories) > 1:
        raise FastdistillError(f"--output: expected none for several directories, got {options.output}")
    quiet()
    failed = []
    for directory in directories:
        try:
            _report(directory, options.output, as_json)
        except FastdistillError as error:
            if len(directories) == 1:
                raise
            failed.append(directory)
            print(f"fastdistill: {error}", file=sys.stderr)
    if failed:
        raise FastdistillError(f"report: no page of {len(failed)} of {len(directories)}: {', '.join(failed)}")


def _report(directory: str, output: str | None, as_json: bool) -> None:
    from fastdistill import runs
    from fastdistill.evaluate.training import finding
    from fastdistill.runs.report import FOLDER

    found = runs.report(directory, output)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        print(f"{finding(found)}\nReport: {output or f'{directory}/{FOLDER}'}/report.html")
