# SPDX-License-Identifier: Apache-2.0
"""Writes ``report.json``, ``report.html`` and the figures from the results of the experiment."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fastdistill.diffusion.conditioning import replacement_probability
from fastdistill.evaluate.figures import loss_curves, png, probability_curve, sample_grid
from fastdistill.evaluate.metrics import mean_spread, wilson_interval
from fastdistill.evaluate.report import write_report
from fastdistill.files import atomic_write
from fastdistill.tasks import workers
from fastdistill.tasks.digits import data
from fastdistill.tasks.digits.config import STUDENTS, DigitsConfig
from fastdistill.tasks.digits.judge import Judge
from fastdistill.tasks.digits.likeness import likeness
from fastdistill.tasks.digits.sampling import SCHEDULE
from fastdistill.tasks.digits.worker import SAMPLES, SPEED

Results = dict[str, list[dict[str, Any]]]
_SHOWN_SEEN, _SHOWN_UNSEEN = 8, 8


def write(config: DigitsConfig, output: Path, results: Results, seconds: dict[str, float]) -> Path:
    """Write the report of the results (one entry per seed). Returns the path of the HTML page."""
    speed = results[SPEED][0]["images_per_second"]
    likeness = _likeness(output, results)
    report: dict[str, Any] = {
        "title": "Random conditioning on handwritten digits",
        "teacher": _model(results["teacher"], speed["teacher"]),
        "students": {name: _model(results[name], speed[name]) | {"likeness": likeness[name]} for name in STUDENTS},
        "seconds": seconds,
        "versions": workers.versions(),
        "backend": workers.backend(run for runs in results.values() for run in runs),
        "judge": _judge(results["teacher"][0]),
        "prompts": {"seen": len(data.SEEN), "unseen": len(data.UNSEEN)},
        "device": workers.device(config.device, config.threads, config.workers),
        "date": datetime.date.today().isoformat(),
        "reproduce": [workers.command("demo digits", config, DigitsConfig(quick=config.quick).resolved())],
    }
    figures = {
        "samples": _samples(output),
        "loss": loss_curves({name: _losses(results[name][0]) for name in STUDENTS}),
        "probability": probability_curve(_p().tolist()),
    }
    page = write_report(output, report, figures)
    for name, figure in figures.items():
        atomic_write(output / f"{name}.png", png(figure, transparent=False))
    return page


def _p() -> Tensor:
    name, parameters = STUDENTS["random_conditioning"]
    return replacement_probability(name, len(SCHEDULE), **parameters)


def _model(runs: list[dict[str, Any]], images_per_second: float) -> dict[str, Any]:
    """Accuracies over all seeds with Wilson intervals; with several seeds also mean and standard deviation."""
    model: dict[str, Any] = {"parameters": runs[0]["parameters"]}
    for kind in ("seen", "unseen"):
        right = sum(run["counts"][kind]["right"] for run in runs)
        n = sum(run["counts"][kind]["n"] for run in runs)
        model |= {kind: right / n, f"{kind}_interval": wilson_interval(right, n), f"{kind}_n": n}
        if len(runs) > 1:
            each = [run["counts"][kind]["right"] / run["counts"][kind]["n"] for run in runs]
            model[f"{kind}_mean"], model[f"{kind}_std"] = mean_spread(each)
            model[f"{kind}_each"] = each
    if len(runs) > 1:
        model["seeds"] = [run["seed"] for run in runs]
    if "seconds" in runs[0]:
        model["seconds"] = sum(run["seconds"] for run in runs) / len(runs)
    model["images_per_second"] = images_per_second
    return model


def _likeness(output: Path, results: Results) -> dict[str, Any]:
    """For each kind of student, over its seeds."""
    judge, teacher = Judge(), _images(output, "teacher")
    students = {name: [_images(output, f"{name}-{run['seed']}") for run in results[name]] for name in STUDENTS}
    return {name: likeness(judge, teacher, images) for name, images in students.items()}


def _images(output: Path, model: str) -> Tensor:
    """All samples of a model, [80 * I, 3, 8, 8]."""
    return safetensors.torch.load_file(output / "models" / model / SAMPLES)["images"]


def _judge(run: dict[str, Any]) -> dict[str, Any]:
    accuracy, n = run["judge_accuracy"], run["judge_n"]
    return {"accuracy": accuracy, "interval": wilson_interval(round(accuracy * n), n), "n": n}


def _losses(run: dict[str, Any]) -> tuple[list[float], list[float]]:
    return [m["step"] for m in run["history"]], [m["loss"] for m in run["history"]]


def _samples(output: Path) -> Any:
    """The first image of each model for evenly chosen seen and unseen prompts."""
    chosen = [
        rows[i * len(rows) // n]
        for rows, n in ((data.SEEN, _SHOWN_SEEN), (data.UNSEEN, _SHOWN_UNSEEN))
        for i in range(n)
    ]
    images, right = {}, {}
    for name, directory in {"teacher": "teacher", **{name: f"{name}-0" for name in STUDENTS}}.items():
        stored = safetensors.torch.load_file(output / "models" / directory / SAMPLES)
        first = torch.tensor(chosen) * (len(stored["images"]) // len(data.PROMPTS))
        images[name] = (stored["images"][first].clamp(-1, 1) + 1) / 2
        right[name] = stored["right"][first].tolist()
    prompts = [data.PROMPTS[row].text.removeprefix("a ") for row in chosen]
    return sample_grid(images, prompts, correct=right, seen=[data.PROMPTS[row].seen for row in chosen])
