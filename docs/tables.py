# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of the README and of pages of docs from the committed measurements: ``python docs/tables.py``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # Python adds only the folder of a script

from benchmarks.report import FULL, filled, gpu_state, page  # noqa: E402
from fastdistill.ops import OPS  # noqa: E402

#: Students of the table of canonical latents.
CONTEXT = {
    "plain": "plain",
    "feature_kd": "feature KD",
    "augment": "hue and noise augmentation",
    "cadistill": "CaDistill",
}


def digits(report: Mapping[str, Any]) -> str:
    """The table of ``docs/digits/report.json``."""
    lines = [
        "| | correct, prompts in the cache | not in the cache | distance from the teacher, in the cache | not in it "
        "| parameters | images/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, model in {"teacher": report["teacher"], **report["students"]}.items():
        shares = []
        for kind in ("seen", "unseen"):
            spread = f" ± {100 * model[f'{kind}_std']:.1f}" if f"{kind}_std" in model else ""
            shares.append(f"{100 * model[kind]:.1f}{spread} %")
        for kind in ("seen", "unseen"):
            shares.append(f"{model['likeness'][kind]['distance']['value']:.3f}" if "likeness" in model else "")
        images = f"{model['images_per_second']:.0f}"
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(shares)} | {model['parameters']:,} | {images} |")
    paired = report["students"]["paired"]
    seeds = len(paired.get("seeds", [0]))
    apart = {kind: found["distance"]["unrelated"] for kind, found in paired["likeness"].items()}
    judge = report["judge"]
    lines.append("")
    images = report["teacher"]["seen_n"] + report["teacher"]["unseen_n"]
    lines.append(
        f"{seeds} seeds (mean ± standard deviation), {images} images per model and seed, judged by a classifier "
        f"trained only on the real scans ({100 * judge['accuracy']:.1f} % correct on {judge['n']} held-out scans). "
        f"Distance: root mean square difference from the teacher's image of the same noise, of values in [-1, 1]; two "
        f"images of the teacher for one prompt differ by {apart['seen']:.2f} and {apart['unseen']:.2f}."
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


def guidance(report: Mapping[str, Any]) -> str:
    """The table of ``docs/guidance/report.json``: of the shades without guidance, of the window that the student
    learns, of the constant weight whose separation is nearest to the window's, and of the student."""
    student = report["students"]["window"]
    rows = {row["schedule"]: row for row in report["models"]["shades"]["rows"]}
    window = rows[student["schedule"]]
    constants = [row for text, row in rows.items() if "@" not in text and text != "0"]
    nearest = min(constants, key=lambda row: abs(row["separation"] - window["separation"]))
    named = {
        "no guidance, w = 0": rows["0"],
        f"constant w = {nearest['schedule']}": nearest,
        f"window {window['schedule']}": window,
        "student of the window": student,
    }
    lines = ["| | right | separation | variance | evaluations per image | images/s |", "|---|---|---|---|---|---|"]
    for name, row in named.items():
        counted = f"{row['evaluations_per_image']:.0f} | {row['images_per_second']:.0f}"
        figures = f"{row['separation']:.2f} | {row['variance_ratio']:.2f} | {counted}"
        lines.append(f"| {name} | {100 * row['right']:.1f} % | {figures} |")
    images = f"{window['seeds']} seeds, {window['images']} images of each"
    lines += ["", f"{images}; separation and variance within a class are relative to the real images."]
    return "\n".join(lines)


def kernels() -> str:
    """Which kernels each op has, its backward included: of the registry, no measurement."""
    found: dict[str, set[str]] = {}
    for name, op in OPS.items():
        found.setdefault(name.removesuffix("_backward"), set()).update(kernel.name for kernel in op.kernels)
    columns = {"cpp": "C++", "triton": "Triton", "cuda": "CUDA"}
    lines = [f"| op | {' | '.join(columns.values())} |", "|---|" + ":-:|" * len(columns)]
    for name, kinds in sorted(found.items()):
        if kinds & columns.keys():
            lines.append(f"| `{name}` | {' | '.join('yes' if kind in kinds else '' for kind in columns)} |")
    return "\n".join(lines)


#: The table of each ``docs/<name>/report.json``, and the page that has it between the marks of that name.
TABLES = {
    "digits": (digits, "README.md"),
    "guidance": (guidance, "docs/guidance.md"),
    "context": (context, "docs/canonical.md"),
}


def pages() -> dict[Path, str]:
    """What every page with a table should be, filled in with what was measured."""
    made = {ROOT / "README.md": filled(_read(ROOT / "README.md"), "benchmarks", gpu_state()), FULL: page()}
    for name, (table, file) in TABLES.items():
        text = made.get(ROOT / file) or _read(ROOT / file)
        made[ROOT / file] = filled(text, name, table(json.loads(_read(ROOT / "docs" / name / "report.json"))))
    ops = ROOT / "docs" / "ops.md"
    made[ops] = filled(_read(ops), "kernels", kernels())
    return made


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


if __name__ == "__main__":
    for file, text in pages().items():
        file.write_text(text, encoding="utf-8")
