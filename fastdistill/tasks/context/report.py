# SPDX-License-Identifier: Apache-2.0
"""Writes ``report.json``, ``report.html`` and the figures from the results of the context experiment."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdistill.evaluate.context import figure, finding, write_context_report
from fastdistill.evaluate.figures import png
from fastdistill.files import atomic_write
from fastdistill.tasks import workers
from fastdistill.tasks.context import data
from fastdistill.tasks.context.demo_config import DemoConfig
from fastdistill.tasks.context.pictures import pictures
from fastdistill.tasks.context.teacher import provenance
from fastdistill.tasks.context.worker import CURVE

#: By part, one entry per seed (for the sweep: per timestep).
Results = dict[str, list[dict[str, Any]]]
_SHARES = ("clean", "independent", "swapped", "clutter")
_MEANS = ("ece", "nll", "reliance", "saliency", "seconds")
_ATTACKS = ("pgd", "apgd", "square", "transfer")


def write(
    config: DemoConfig, output: Path, results: Results, choice: Mapping[str, Any], spent: Callable[[], float]
) -> tuple[dict[str, Any], Path]:
    """Write the report of the results; ``spent``: seconds so far. Returns the report and the path of the page."""
    made = provenance(config.teacher)["metrics"]
    taught = {kind: [run["figures"] for run in results[kind]] for kind in config.kinds}
    curve = {config.share: taught["cadistill"]} if "cadistill" in taught else {}
    curve |= {float(p.removeprefix(CURVE)): [r["figures"] for r in runs] for p, runs in results.items() if CURVE in p}
    other = results["other"][0]
    parts = {part: sum(run["all_seconds"] for run in runs) for part, runs in results.items()}
    default = DemoConfig(quick=config.quick, full=config.full).resolved()
    report: dict[str, Any] = {
        "title": "Canonical latents, and classifiers that learn from them not to look at the background",
        "teacher": {"kind": config.teacher, "right": made["right"], "round_trip": made["round_trip"]},
        "sweep": [row for found in results["sweep"] for row in found["rows"]],
        "chosen": dict(choice),
        "other_teacher": {"kind": other["kind"], **other["rows"][0]},
        "students": {kind: student(runs, config) for kind, runs in taught.items()},
        "fraction": [{"share": share, **_on_curve(curve[share], config)} for share in sorted(curve)],
        "ink": float(data.held_out("independent").ink.double().mean()),
        "masking": {kind: masking(runs, config) for kind, runs in taught.items()},
        "seconds": {"total": spent(), **parts},
        "versions": workers.versions(),
        "backend": workers.backend(run for runs in results.values() for run in runs),
        "device": workers.device(config.device, config.threads, config.workers),
        "date": datetime.date.today().isoformat(),
        "reproduce": [workers.command("demo context", config, default)],
    }
    report["finding"] = finding(report)
    figures = pictures(config, output, report, results)
    page = write_context_report(output, report, figures)
    for name, drawn in figures.items():
        atomic_write(output / f"{name}.png", png(drawn, transparent=False))
    return report, page


def student(runs: Sequence[Mapping[str, Any]], config: DemoConfig) -> dict[str, Any]:
    """The measures of a kind of classifier over its seeds, with attacks at the middle epsilon."""
    count, middle = len(data.held_out("same").digit), len(config.epsilon) // 2
    found: dict[str, Any] = {name: figure([run[name] for run in runs], count) for name in _SHARES}
    attacks = [run["attacks"] for run in runs]
    for name in ("pgd", "apgd", "square"):
        n = attacks[0]["square_n" if name == "square" else "n"]
        found[name] = figure([made[name][middle] for made in attacks], n)
    found["corruptions"] = {
        name: [figure(each, count) for each in zip(*(run["corruptions"][name] for run in runs), strict=True)]
        for name in runs[0]["corruptions"]
    }
    return found | {name: figure([run[name] for run in runs], count, successes=False) for name in _MEANS}


def masking(runs: Sequence[Mapping[str, Any]], config: DemoConfig) -> dict[str, Any]:
    """The checks for gradient masking over the seeds, and the accuracy under each attack at each epsilon."""
    attacks = [run["attacks"] for run in runs]
    failed = [text for found in attacks for text in found["masking"]["failed"]]
    told: dict[str, Any] = {"failed": list(dict.fromkeys(failed)), "epsilon": list(config.epsilon)}
    for name in _ATTACKS:
        if name in attacks[0]:
            n = attacks[0]["square_n" if name == "square" else "n"]
            values = zip(*(found[name] for found in attacks), strict=True)
            told[name] = [figure(each, n) for each in values]
    return told


def _on_curve(runs: Sequence[Mapping[str, Any]], config: DemoConfig) -> dict[str, Any]:
    attacks = [run["attacks"] for run in runs]
    middle = attacks[0]["epsilon"].index(config.epsilon[len(config.epsilon) // 2])
    apgd = figure([found["apgd"][middle] for found in attacks], attacks[0]["n"])
    count = len(data.held_out("independent").digit)
    return {"independent": figure([run["independent"] for run in runs], count), "apgd": apgd}
