# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of the README and docs/benchmarks.md from the committed measurements: ``python docs/tables.py``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # Python adds only the folder of a script

from benchmarks.report import FULL, filled, page, summary  # noqa: E402

#: Students of the table of canonical latents.
CONTEXT = {
    "plain": "plain",
    "feature_kd": "feature KD",
    "augment": "hue and noise augmentation",
    "cadistill": "CaDistill",
}


def digits() -> str:
    """The table of ``docs/digits/report.json``."""
    report = json.loads((ROOT / "docs" / "digits" / "report.json").read_text())
    lines = [
        "| | correct, prompts in the cache | correct, prompts not in the cache | parameters | images/s |",
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
        f"{seeds} seeds (mean ± standard deviation), {images} images per model and seed, judged by a classifier "
        f"trained only on the real scans ({100 * judge['accuracy']:.1f} % correct on {judge['n']} held-out scans)."
    )
    return "\n".join(lines)


def context(report: Mapping[str, Any]) -> str:
    """The table of four students of ``docs/context/report.json``."""
    columns = {"clean": "own hue", "independent": "any hue", "swapped": "another class's hue", "apgd": "under attack"}
    lines = [f"| right, % | {' | '.join(columns.values())} |", "|---|" + "---|" * len(columns)]
    for kind, name in CONTEXT.items():
        cells = []
        for field in columns:
            found = report["students"][kind][field]
            spread = "" if found["std"] is None else f" ± {100 * found['std']:.1f}"
            void = field == "apgd" and report["masking"][kind]["failed"]
            cells.append("gradients are masked" if void else f"{100 * found['mean']:.1f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    clean = report["students"]["cadistill"]["clean"]
    seeds = len(clean["each"])
    radii = report["masking"]["cadistill"]["epsilon"]
    lines.append("")
    lines.append(
        f"{'1 seed' if seeds == 1 else f'{seeds} seeds (mean ± standard deviation)'}, {clean['n']} held-out images; "
        f"the attack is APGD, which changes a value by at most {radii[len(radii) // 2]:g} of 2 (any hue)."
    )
    return "\n".join(lines)


def readme_filled(readme: str) -> str:
    """The README with its tables filled in; that of canonical latents where it was measured."""
    readme = filled(filled(readme, "results", digits()), "benchmarks", summary())
    measured = ROOT / "docs" / "context" / "report.json"
    if measured.exists():
        readme = filled(readme, "context", context(json.loads(measured.read_text(encoding="utf-8"))))
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(readme_filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    FULL.write_text(page(), encoding="utf-8")
