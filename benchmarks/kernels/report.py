# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.kernels.report``: registers, spills, shared memory and occupancy of every kernel for a GPU.

Writes benchmarks/kernels/report.csv and fails if a kernel spills or does not compile. ``--triton`` adds the kernels
compiled by another Triton, in a folder made by ``pip install --no-deps --target``. It also writes lint.csv with what
costs time in each kernel (see ``lint``).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.kernels import cuda, lint
from benchmarks.kernels.resources import Row

ROOT = Path(__file__).parents[2]
PATH = Path(__file__).parent / "report.csv"


def by_tritons(folders: Iterable[Path], *options: str) -> list[dict[str, Any]]:
    """The output of ``benchmarks.kernels.triton`` with the installed Triton and with those in the folders. Each runs in
    a process of its own, in which Triton compiles (this process may use the interpreter); all run at once.

    Raises:
        RuntimeError: a kernel does not compile.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.kernels.triton", *options]
    found: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        processes = {}
        for path in (None, *folders):
            places = [str(path), *filter(None, [environment.get("PYTHONPATH")])]
            own = {"PYTHONPATH": os.pathsep.join(places)} if path else {}
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment | own)
            processes[path] = stack.enter_context(process)
            stack.callback(process.kill)  # runs before the wait for the process
        for path, process in processes.items():
            printed, _ = process.communicate()
            if process.returncode:
                raise RuntimeError(f"Triton{f' of {path}' if path else ''} did not compile every kernel (see above)")
            found += json.loads(printed)
    return found


def linted(folders: Iterable[Path]) -> list[lint.Figures]:
    """What costs time in every kernel: those of Triton, and those of the extension if it was built.

    Raises:
        RuntimeError: a kernel does not compile.
    """
    found = [lint.Figures(**row) for row in by_tritons(folders, "--lint")]
    with contextlib.suppress(RuntimeError):  # the extension was not built
        found += cuda.figures()
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.kernels.report", description=__doc__, allow_abbrev=False)
    parser.add_argument("--triton", type=Path, nargs="+", default=[], metavar="FOLDER", help="other Tritons")
    parser.add_argument("--csv", type=Path, default=PATH, metavar="FILE", help=f"({PATH.relative_to(ROOT)})")
    options = parser.parse_args(arguments)
    if wrong := [path for path in options.triton if not (path / "triton" / "__init__.py").is_file()]:
        parser.error(f"--triton: expected a folder with the package triton, got {wrong[0]}")
    folders = [path.resolve() for path in options.triton]
    rows = [Row(**row) for row in by_tritons(folders)]
    try:
        rows += cuda.rows()
    except RuntimeError as error:
        print(f"CUDA kernels left out: {error}", file=sys.stderr)
    with options.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) | {"occupancy": f"{row.occupancy:.3f}"} for row in rows)
    lint.write(linted(folders), options.csv.with_name(lint.PATH.name))
    table = Table(title=f"{len(rows)} kernels")
    columns = "op kernel backend triton arch registers spill_bytes shared_bytes threads occupancy".split()
    for column in columns:
        table.add_column(column.replace("_", " "))
    for row in rows:
        values = dataclasses.asdict(row) | {"occupancy": f"{row.occupancy:.0%}"}
        table.add_row(*(str(values[column]) for column in columns))
    Console(width=150).print(table)
    spilling = [f"{row.op}: {row.kernel} ({row.backend} {row.triton}, {row.arch})" for row in rows if row.spill_bytes]
    if spilling:
        print(f"registers spilled by {', '.join(spilling)}", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
