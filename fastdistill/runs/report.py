# SPDX-License-Identifier: Apache-2.0
"""The page of a training (``fastdistill report``): read from its directory, whether it runs, was stopped or is done."""

from __future__ import annotations

import dataclasses
import datetime
import re
from pathlib import Path
from typing import Any

import safetensors

from fastdistill.errors import InputError, StorageError
from fastdistill.files import json_value, located, reason
from fastdistill.runs.config import RunConfig
from fastdistill.runs.distill import RUN_FILE
from fastdistill.tasks.workers import versions
from fastdistill.train import checkpoint, health
from fastdistill.train.config import TrainConfig, from_mapping, from_yaml, to_yaml
from fastdistill.train.loop import METRICS, PREVIEWS, read_metrics
from fastdistill.train.step import learning_rates

FOLDER = "report"  # in the directory of the run
_PREVIEW = re.compile(r"step-(\d{8})\.png")
_PREVIEWS = 5  # on the page, the first and the last among them


def report(directory: str | Path, output: str | Path | None = None) -> dict[str, Any]:
    """Write ``report.html`` and ``report.json`` of a training: losses, also of each tap, norm of the gradient, learning
    rate and images per second over the steps, previews, settings. Nothing of the run is changed, so it may be running.

    Args:
        directory: of a run, or of ``DistillTrainer.fit``. output: folder of the report; None: ``report`` in it.

    Returns:
        The report, as in ``report.json`` (``fastdistill.evaluate.training.write_training``).

    Raises:
        InputError: no directory, or one without a line of metrics. StorageError: it cannot be read or written.
    """
    from fastdistill.evaluate.training import write_training

    folder = located(directory, "directory")
    lines = read_metrics(folder / METRICS) if folder.is_dir() else []
    if not lines:
        rule = f"the directory of a training ({METRICS} with a line or more)"
        raise InputError.of("directory", rule, str(directory))
    run, config = _settings(folder)
    steps = int(lines[-1]["step"])
    rates = [float(rate) for rate in learning_rates(config)] if config is not None else []
    found: dict[str, Any] = {
        "title": f"Training in {directory}",
        "metrics": lines,
        "steps": max(steps, config.steps) if config is not None else steps,
        "batch": config.batch if config is not None else 1,
        "rates": [rates[int(line["step"]) - 1] if line["step"] <= len(rates) else None for line in lines],
        "settings": None if run is None else to_yaml(run),
        "concerns": [f"{text}." for text in health.concerns(lines).values()],
        "seconds": {"total": lines[-1]["seconds"]},
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "reproduce": [] if run is None else [f"fastdistill distill {folder / RUN_FILE}"],
    }
    write_training(folder / FOLDER if output is None else located(output, "output"), found, _previews(folder))
    return found


def _settings(folder: Path) -> tuple[RunConfig | None, TrainConfig | None]:
    """What the run file says; without one, the settings of the training in its newest checkpoint."""
    file = folder / RUN_FILE
    if file.exists():
        run = from_yaml(RunConfig, file)
        return run, TrainConfig(**dataclasses.asdict(run.train), seed=run.seed)
    for step, path in reversed(checkpoint.steps(folder).items()):
        if (known := _trained_with(path)) is not None:
            return None, from_mapping(TrainConfig, {"steps": step, **known})
    return None, None


def _trained_with(path: Path) -> dict[str, Any] | None:
    """Settings that a checkpoint states, of which its tensors are not read; None where it is damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(json_value(file.metadata()["fastdistill"])["fingerprint"]["config"])
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError):
        return None


def _previews(folder: Path) -> dict[int, bytes]:
    """Some of the previews, evenly over the training."""
    files = {int(m[1]): p for p in (folder / PREVIEWS).glob("step-*.png") if (m := _PREVIEW.fullmatch(p.name))}
    steps = sorted(files)
    if len(steps) > _PREVIEWS:
        steps = [steps[round(i * (len(steps) - 1) / (_PREVIEWS - 1))] for i in range(_PREVIEWS)]
    try:
        return {step: files[step].read_bytes() for step in steps}
    except OSError as error:
        raise StorageError(f"{folder / PREVIEWS}: could not be read: {reason(error)}") from error
