# SPDX-License-Identifier: Apache-2.0
"""Writes ``report.json``, ``report.html`` and the figures from the results of the guidance experiment."""

from __future__ import annotations

import datetime
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch

from fastdistill.diffusion.grid import Grid
from fastdistill.evaluate.figures import png, schedule_curve
from fastdistill.evaluate.guidance import finding, write_guidance_report
from fastdistill.evaluate.guidance_figures import diversity_plane, prompt_samples
from fastdistill.evaluate.page import percent
from fastdistill.files import atomic_write
from fastdistill.tasks import workers
from fastdistill.tasks.digits.sampling import SCHEDULE
from fastdistill.tasks.guidance import lab, worker
from fastdistill.tasks.guidance.demo_config import DemoConfig
from fastdistill.tasks.shades import data

#: By part, one entry per seed.
Results = dict[str, list[dict[str, Any]]]
_WORLD = ("rows", "fits", "recovered")
_DECIDED = 0.8  # share of the logarithm of the variance that constant guidance removes in the band of the figure


def write(
    config: DemoConfig, output: Path, results: Results, spent: Callable[[], float]
) -> tuple[dict[str, Any], Path]:
    """Write the report of the results; ``spent``: seconds so far. Returns the report and the path of the page."""
    worlds = results["worlds"][0]["worlds"]
    taught = [row for runs in results.values() for row in _named(runs)]
    speed = results["speed"][0]["images_per_second"]
    parts = {part.replace("_", " "): sum(run["all_seconds"] for run in runs) for part, runs in results.items()}
    default = DemoConfig(quick=config.quick, full=config.full).resolved()
    report: dict[str, Any] = {
        "title": "Schedules of guidance on shades, digits and exact worlds",
        "worlds": {name: {key: world[key] for key in _WORLD if key in world} for name, world in worlds.items()},
        "models": {task: {name: results[task][0][name] for name in ("rows", "recovered")} for task in worker.TEACHERS},
        "students": {name: student_row(runs) for name, runs in taught},
        "seconds": {"total": spent(), **parts},
        "versions": workers.versions(),
        "backend": workers.backend(run for runs in results.values() for run in runs),
        "device": workers.device(config.device, config.threads, config.workers),
        "date": datetime.date.today().isoformat(),
        "reproduce": [workers.command("demo guidance", config, default)],
    }
    for row in report["models"]["shades"]["rows"]:
        row["images_per_second"] = speed[row["schedule"]]
    for name, part in ((name, part) for part, runs in results.items() for name in _names(runs)):
        report["students"][name]["images_per_second"] = speed[f"student {part}"]
    report["finding"] = found(report)
    figures = {
        "samples": _samples(config, output / "parts" / "shades" / "samples.safetensors", results["shades"][0]["shown"]),
        "plane": diversity_plane(report["models"]["shades"]["rows"], report["students"]),
        "schedules": schedule_curve(_drawn(config), Grid.parse(config.grid, SCHEDULE), band=band()),
        **lab.pictures(worlds),
    }
    page = write_guidance_report(output, report, figures)
    for name, figure in figures.items():
        atomic_write(output / f"{name}.png", png(figure, transparent=False))
    return report, page


def found(report: Mapping[str, Any]) -> str:
    """The finding of the report: on the shades, on the students compared with their teachers, and on the digits."""
    rows = {row["schedule"]: row for row in report["models"]["shades"]["rows"]}
    parts = [finding(report)]
    for title, chosen in (("A student of the window", ("window",)), ("A student that reads the weight", ())):
        names = chosen or [name for name in report["students"] if name.startswith("scale_")]
        pairs = [(report["students"][name], rows.get(report["students"][name]["schedule"])) for name in names]
        apart = [_apart(student, teacher) for student, teacher in pairs if teacher is not None]
        if apart:
            right, separation, variance = (max(values) for values in zip(*apart, strict=True))
            parts.append(
                f"{title} is within {right:.1f} points of its teacher in right images, "
                f"{percent(separation, 0)} in separation and {percent(variance, 0)} in variance."
            )
    digits = report["models"]["digits"]
    free = next(row for row in digits["rows"] if row["schedule"] == "0")
    back = [
        given for given in digits["recovered"] if given["value"] is not None and (given["interval"] or [0.0])[0] > 0
    ]
    best = max(back, key=lambda given: float(given["value"]), default=None)
    told = f"On digits, {percent(free['right'], 0)} are right without guidance, and "
    if best is None:
        told += "no window gives back variance beyond its error"
    else:
        told += f"the best window ({best['schedule']}) gives back {percent(best['value'], 0)} at equal {best['at']}"
    return " ".join([*parts, told + "."])


def _apart(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> tuple[float, float, float]:
    """Percentage points of right images, and shares of separation and variance, of a student relative to its
    teacher."""
    separation, variance = (abs(student[name] / teacher[name] - 1) for name in ("separation", "variance_ratio"))
    return 100 * abs(student["right"] - teacher["right"]), separation, variance


def band() -> tuple[float, float]:
    """Lowest and highest sigma between which constant guidance removes four fifths of the logarithm of a tint's
    variance. L(tau) = ln((u + tau) / (c + tau)), with variance c within a color and u in total, falls there from nine
    tenths of L(0) to one tenth (``distortion.neutral_window``)."""
    c = (data.SPREAD * data.norm()) ** 2
    u = c + data.norm() ** 2

    def sigma(share: float) -> float:
        ratio = (u / c) ** share
        return math.sqrt((u - ratio * c) / (ratio - 1))

    return sigma((1 + _DECIDED) / 2), sigma((1 - _DECIDED) / 2)


def student_row(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A student's row as the mean of its seeds' rows; with several seeds also their standard deviations (``_std``) and
    ``seeds``; with one seed its intervals."""
    if len(runs) == 1:
        return dict(runs[0])
    row: dict[str, Any] = {}
    for name, value in runs[0].items():
        values = [run[name] for run in runs]
        if name.endswith("_interval"):
            continue
        numbers = isinstance(value, int | float) and not isinstance(value, bool)
        row[name] = statistics.fmean(values) if numbers and len(set(values)) > 1 else value
        if name in ("right", "separation", "variance_ratio"):
            row[f"{name}_std"] = statistics.stdev(values)
    return row | {"seeds": len(runs), "images": sum(run["images"] for run in runs)}


def _names(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of a student's rows in the report; none for other parts."""
    return list(runs[0]["rows"]) if "parameters" in runs[0] else []


def _named(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Rows of a student for each seed, by their name in the report."""
    more = [{name: run.get(name) for name in ("parameters", "seconds")} for run in runs]
    return [(name, [run["rows"][name] | own for run, own in zip(runs, more, strict=True)]) for name in _names(runs)]


def _samples(config: DemoConfig, file: Path, schedules: Sequence[str]) -> Any:
    stored = safetensors.torch.load_file(file)
    names = [f"no guidance, w = {schedules[0]}", f"constant w = {schedules[1]}", f"window {schedules[2]}"]
    prompts = len(worker.SHOWN)
    images = (stored["images"].clamp(-1, 1) + 1) / 2
    shown = {name: one.unflatten(0, (prompts, -1)) for name, one in zip(names, images, strict=True)}
    return prompt_samples(shown, worker.SHOWN, dict(zip(names, stored["right"].tolist(), strict=True)))


def _drawn(config: DemoConfig) -> list[str]:
    return list(dict.fromkeys(("1", *config.windows, config.student)))
