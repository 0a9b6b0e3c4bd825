# SPDX-License-Identifier: Apache-2.0
"""Writes the README's figures from the committed measurements: ``python docs/tables.py``. None is typed by hand."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def digits() -> str:
    """The table of ``docs/digits/report.json``."""
    report = json.loads((ROOT / "docs" / "digits" / "report.json").read_text())
    lines = [
        "| | right on prompts in the cache | right on prompts never in it | parameters | images/s |",
        "|---|---|---|---|---|",
    ]
    for name, model in {"teacher": report["teacher"], **report["students"]}.items():
        shares = []
        for kind in ("seen", "unseen"):
            spread = f" ± {100 * model[f'{kind}_std']:.1f}" if f"{kind}_std" in model else ""
            shares.append(f"{100 * model[kind]:.1f}{spread} %")
        images = f"{model['images_per_second']:.0f}"
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(shares)} | {model['parameters']:,} | {images} |")
    seeds = len(report["students"]["paired"].get("seeds", [0]))
    judge = report["judge"]
    lines.append("")
    images = report["teacher"]["seen_n"] + report["teacher"]["unseen_n"]
    lines.append(
        f"{seeds} seeds (mean ± standard deviation), {images} images a model and seed, judged by a classifier that "
        f"knows the real scans only ({100 * judge['accuracy']:.1f} % right on {judge['n']} held-out ones)."
    )
    return "\n".join(lines)


def benchmarks() -> str:
    """For each device the latest ratio of each op, shape, dtype, thread count and rival."""
    parts = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.csv")):
        latest = {}
        with path.open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                latest[tuple(row[k] for k in ("op", "shape", "dtype", "threads", "rival"))] = row
        parts += [f"Measured on {path.stem} (`python -m benchmarks.run`): times faster than the rival.", ""]
        parts += ["| op | shape | dtype | threads | rival | ratio |", "|---|---|---|---|---|---|"]
        parts += [f"| {' | '.join(key)} | {row['ratio'] or 'not measured'} |" for key, row in latest.items()]
    return "\n".join(parts)


def filled(readme: str) -> str:
    """The README with both tables in their places."""
    for name, table in {"results": digits(), "benchmarks": benchmarks()}.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        readme = re.sub(pattern, lambda m, table=table: f"{m[1]}{table}\n{m[2]}", readme, flags=re.DOTALL)
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
