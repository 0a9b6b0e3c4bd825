# SPDX-License-Identifier: Apache-2.0
"""The parts of the context experiment, each in a separate process (``fastdistill.tasks.processes``): the sweep of one
timestep, the canonical images and baseline sets, the other teacher's projection, and each classifier.

``python -m fastdistill.tasks.context.worker JOB.json`` writes ``result.json`` next to the job file.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from fastdistill import ops
from fastdistill.distill.canonical import Clarid
from fastdistill.files import located
from fastdistill.tasks.context import data
from fastdistill.tasks.context.demo_config import DemoConfig
from fastdistill.tasks.context.measure import measured, on_curve
from fastdistill.tasks.context.selecting import SweepConfig, run_sweep
from fastdistill.tasks.context.sets import Name, Sets, make_sets
from fastdistill.tasks.context.students import needed, restored, train_student
from fastdistill.tasks.context.teacher import Kind
from fastdistill.tasks.processes import Report, serve
from fastdistill.tasks.workers import keep_result, result_in
from fastdistill.train.config import from_mapping

MODULE = "fastdistill.tasks.context.worker"
WEIGHTS = "student.safetensors"
CURVE = "cadistill at "  # prefix of the parts of the curve, followed by the share of the data


def run(job: Path, report: Report) -> None:
    """Do the part that the file describes."""
    described = json.loads(job.read_text(encoding="utf-8"))
    config = from_mapping(DemoConfig, described["config"])
    torch.set_num_threads(config.threads)
    work = {"sweep": _sweep, "other": _other, "sets": _sets}.get(described["work"], _classifier)
    start = time.perf_counter()
    result = work(config, described, job.parent, report)
    result |= {"part": described["part"], "seed": described["seed"], "backend": ops.used()}
    result |= {"all_seconds": time.perf_counter() - start, "fingerprint": described["fingerprint"]}
    keep_result(job.parent, result)


def settings(config: DemoConfig, t_e: int | None = None) -> list[Clarid]:
    """The settings to choose from, for one timestep or for all."""
    times = config.t_e if t_e is None else (t_e,)
    return [Clarid(t, k, tap) for t in times for tap in config.taps for k in config.k]


def per_class(share: float) -> int | None:
    """Images of each digit in a share of the classifier's data; None: all."""
    count = round(share * len(data.students().digit) / len(data.DIGITS))
    return None if share == 1 else max(1, count)


def sets_of(
    config: DemoConfig, names: Sequence[Name], setting: Clarid, share: float, report: Report | None = None
) -> Sets:
    """Sets for a share of the data, stored in the directory of the experiment and made if they are missing."""

    def told(name: str, done: int, total: int) -> None:
        if report is not None:
            report(phase=name, done=done, total=total)

    folder = f"{config.teacher}-{setting.t_e}-{setting.k}-{setting.tap}-{share:g}"
    options: dict[str, Any] = {"clarid": setting, "per_class": per_class(share), "teacher": config.teacher}
    return make_sets(located(config.output) / "sets" / folder, names, **options, device=config.device, progress=told)


def finished(directory: Path, wanted: str) -> bool:
    """Whether the directory has the complete result of a part with this fingerprint."""
    result = result_in(directory, wanted)
    return result is not None and ("training" not in result or (directory / result["training"] / WEIGHTS).exists())


def _sweep(config: DemoConfig, described: Mapping[str, Any], directory: Path, report: Report) -> dict[str, Any]:
    """Rows of the settings of a timestep; finished rows are stored beside the result."""
    wanted = SweepConfig(t_e=(described["t_e"],), k=config.k, tap=config.taps)
    return _swept(config, config.teacher, wanted, directory, described["fingerprint"], report)


def _other(config: DemoConfig, described: Mapping[str, Any], directory: Path, report: Report) -> dict[str, Any]:
    """What the chosen setting removes with the other teacher."""
    kind: Kind = "same" if config.teacher == "broad" else "broad"
    setting = Clarid(**described["setting"])
    wanted = SweepConfig(t_e=(setting.t_e,), k=(setting.k,), tap=(setting.tap,))
    return {"kind": kind, **_swept(config, kind, wanted, directory, described["fingerprint"], report)}


def _swept(
    config: DemoConfig, kind: Kind, wanted: SweepConfig, directory: Path, fingerprint: str, report: Report
) -> dict[str, Any]:
    wanted = dataclasses.replace(
        wanted, teacher=kind, per_class=config.images // len(data.DIGITS), threads=config.threads,
        device=config.device, output=str(directory / f"rows-{fingerprint[:16]}"),
    )  # fmt: skip
    found = run_sweep(wanted, lambda done, total: report(phase="settings", done=done, total=total))
    return {"rows": found["sweep"]}


def _sets(config: DemoConfig, described: Mapping[str, Any], directory: Path, report: Report) -> dict[str, Any]:
    sets_of(config, described["names"], Clarid(**described["setting"]), described["share"], report)
    return {}


def _classifier(config: DemoConfig, described: Mapping[str, Any], directory: Path, report: Report) -> dict[str, Any]:
    """Trains and measures a classifier; adversarial images for the plain one of its seed are also tested on the
    others."""
    kind, seed = described["work"], described["seed"]
    student = dataclasses.replace(config.student, kind=kind, seed=seed, device=config.device)
    sets = None
    if names := needed([kind]):
        share = described["share"]
        whole = config.share if share <= config.share else max(config.shares)
        sets = sets_of(config, names, Clarid(**described["setting"]), whole)
        if share != whole and (many := per_class(share)) is not None:
            sets = sets.part(many)

    def told(done: int, metrics: dict[str, float] | None) -> None:
        report(phase="training", done=done, total=student.train.steps, loss=metrics and metrics["loss"])

    made = train_student(student, sets, directory / described["training"], told)
    model = restored(made["weights"], student.width)

    def attacking(name: str, done: int, total: int) -> None:
        report(phase=name, done=done, total=total)

    if described["part"].startswith(CURVE):
        return {"figures": on_curve(config, model, attacking), "training": described["training"]}
    rival = None
    if (place := described["transfer"]) is not None:
        weights = safetensors.torch.load_file(located(config.output) / "parts" / place / WEIGHTS)
        rival = restored(weights, student.width)
    found = measured(config, model, rival, attacking)
    return {"figures": found | {"seconds": made["seconds"]}, "training": described["training"]}


def main() -> int:
    return serve(run, "lower --student.train.batch or --workers")


if __name__ == "__main__":
    sys.exit(main())
