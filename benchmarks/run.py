# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.run``: check, time against rivals in one interleaved run, print, append to
results/<device>.csv."""

from __future__ import annotations

import csv
import datetime
import json
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from pydantic import Field
from rich.console import Console
from rich.table import Table

from benchmarks.registry import MAKERS, Benchmark, benchmarks
from benchmarks.timing import interleaved
from fastdistill.errors import FastdistillError
from fastdistill.ops import _native
from fastdistill.train.config import validated

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Options:
    """Ratios of the ops' CPU kernels to what a user would write. Ratios count; absolute times of a shared machine do
    not."""

    op: tuple[Literal["adamw_ema", "feature_match", "noise_gather"], ...] = tuple(MAKERS)  # type: ignore[assignment]
    """Ops to measure."""
    dtype: tuple[Literal["fp32", "bf16"], ...] = ("fp32",)
    """Dtypes of the tensors."""
    batch: tuple[Annotated[int, Field(ge=1)], ...] = (4, 16)
    """Batch sizes."""
    threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads, the rivals' too."""
    rounds: Annotated[int, Field(ge=4)] = 41
    """Rounds counted at least; short ones are repeated for two seconds."""
    compiled: bool = True
    """Time torch.compile as well."""
    csv: str = ""
    """File to append to (default: benchmarks/results/<device>.csv; "none" for no file)."""
    json: bool = False
    """Print rows as JSON instead of a table."""


def device() -> str:
    """The processor's name."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def measure(benchmark: Benchmark, options: Options) -> list[dict[str, Any]]:
    """One row a rival. A kernel that does not match its reference is not timed."""
    benchmark.check()
    times, ratios = interleaved({"ours": benchmark.ours, **benchmark.rivals}, options.rounds)
    common = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "op": benchmark.op,
        "shape": benchmark.shape,
        "dtype": benchmark.dtype,
        "threads": options.threads,
    }
    ours = times["ours"]
    about = {
        "ours_ms": round(ours.median, 4),
        "ours_iqr_ms": round(ours.spread, 4),
        "ours_gb_s": round(benchmark.bytes / ours.median / 1e6, 2),
        "isa": _native.cpu().isa() if _native.cpu_reason() is None else "reference",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }
    rows = [
        common
        | {
            "rival": name,
            "ratio": round(ratios[name], 3),
            "rival_ms": round(times[name].median, 4),
            "rival_iqr_ms": round(times[name].spread, 4),
        }
        | about
        for name in benchmark.rivals
    ]
    gone = {"ratio": "", "rival_ms": "", "rival_iqr_ms": ""}
    return rows + [common | {"rival": f"{name}: {why}"} | gone | about for name, why in benchmark.missing.items()]


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or "unknown"


def main() -> int:
    options = validated(tyro.cli(Options, prog="python -m benchmarks.run"), "benchmarks")
    torch.set_num_threads(options.threads)
    rows = []
    for benchmark in benchmarks(list(options.op), list(options.dtype), list(options.batch), options.compiled):
        rows += measure(benchmark, options)
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        table = Table(title=f"{device()}, {options.threads} thread(s): times faster than the rival")
        for column in ("op", "shape", "dtype", "rival", "ratio", "ours, GB/s"):
            table.add_column(column)
        for row in rows:
            cells = (row[k] for k in ("op", "shape", "dtype", "rival", "ratio", "ours_gb_s"))
            table.add_row(*(str(cell) for cell in cells))
        Console().print(table)
    if options.csv != "none":
        slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", device().lower())).strip("-")
        append(Path(options.csv) if options.csv else RESULTS / f"cpu-{slug}.csv", rows)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FastdistillError as error:
        sys.exit(f"benchmarks: {error}")
