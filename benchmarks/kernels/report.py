# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.kernels.report``: registers, spills, shared memory and occupancy of every kernel for a GPU.

Writes benchmarks/kernels/report.csv and fails where a kernel spills.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.kernels import cuda
from benchmarks.kernels.resources import Row

PATH = Path(__file__).parent / "report.csv"


def triton_rows() -> list[Row]:
    """Of a process of its own, in which Triton compiles whatever this one does."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.kernels.triton"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return [Row(**row) for row in json.loads(done.stdout)]


def main() -> int:
    rows = triton_rows()
    try:
        rows += cuda.rows()
    except RuntimeError as error:
        print(f"CUDA kernels left out: {error}", file=sys.stderr)
    with PATH.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) | {"occupancy": f"{row.occupancy:.3f}"} for row in rows)
    table = Table(title=f"{len(rows)} kernels")
    columns = "op kernel backend arch registers spill_bytes shared_bytes threads occupancy".split()
    for column in columns:
        table.add_column(column.replace("_", " "))
    for row in rows:
        values = dataclasses.asdict(row) | {"occupancy": f"{row.occupancy:.0%}"}
        table.add_row(*(str(values[column]) for column in columns))
    Console(width=150).print(table)
    spilling = [f"{row.op}: {row.kernel} ({row.backend}, {row.arch})" for row in rows if row.spill_bytes]
    if spilling:
        print(f"registers spilled by {', '.join(spilling)}", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
