# SPDX-License-Identifier: Apache-2.0
"""A page about a training (``fastdistill report``), from its directory; the training may be running, stopped or
done."""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors

from fastdistill.data.fingerprint import sha256_of_json
from fastdistill.errors import InputError, StorageError
from fastdistill.files import LOCK_NAME, json_value, located, lock, reason
from fastdistill.runs.about import read_about, utilization
from fastdistill.runs.config import RunConfig
from fastdistill.runs.distill import RUN_FILE
from fastdistill.tasks.workers import versions
from fastdistill.train import checkpoint, health
from fastdistill.train.config import TrainConfig, from_mapping, from_yaml, to_yaml
from fastdistill.train.loop import PREVIEWS
from fastdistill.train.metrics import METRICS, read_metrics
from fastdistill.train.step import learning_rates
from fastdistill.train.waits import WAITED

FOLDER = "report"  # in the directory of the run
_PREVIEW = re.compile(r"step-(\d{8})\.png")
_PREVIEWS = 5  # number of previews on the page, including the first and the last


def report(directory: str | Path, output: str | Path | None = None) -> dict[str, Any]:
    """Write ``report.html`` and ``report.json`` of a training: curves of the losses (also of each tap), spreads,
    gradient norm, learning rate, images per second and waits; previews; the information of ``runs.about``; settings;
    how to reproduce it; and how the training ended. Nothing of the run is changed, so it may be running. Damaged files
    of the run are left out and listed in the ``concerns``.

    Args:
        directory: of a run, or of ``DistillTrainer.fit``. output: folder of the report; None: ``report`` in it.

    Returns:
        The report, as in ``report.json`` (``fastdistill.evaluate.training.write_training``).

    Raises:
        InputError: no directory, or one without metrics. StorageError: it cannot be read or written.
    """
    from fastdistill.evaluate.training import write_training

    folder = located(directory, "directory")
    lines = read_metrics(folder / METRICS) if folder.is_dir() else []
    about = read_about(folder)
    if not lines:
        rule = f"the directory of a training ({METRICS} with a line or more)"
        how = f", whose training ended before it ({ended})" if (ended := about.get("ended")) else ""
        raise InputError.of("directory", rule, f"{directory}{how}")
    run, config, made, damaged = _settings(folder)
    previews, unread = _previews(folder)
    steps = int(lines[-1]["step"])
    rates = learning_rates(config) if config is not None else ()
    found: dict[str, Any] = {
        "title": f"Training in {directory}",
        "metrics": lines,
        "steps": max(steps, config.steps) if config is not None else steps,
        "batch": config.batch if config is not None else 1,
        "rates": [float(rates[int(line["step"]) - 1]) if line["step"] <= len(rates) else None for line in lines],
        "settings": None if run is None else to_yaml(run),
        "concerns": [f"{text}." for text in [*health.concerns(lines).values(), *damaged, *unread]],
        "seconds": {"total": lines[-1]["seconds"]} | _waited(lines),
        "versions": about.get("versions") or versions(),
        "date": datetime.date.today().isoformat(),
        "about": about,
        "fingerprint": made,
        "identity": None if made is None else sha256_of_json(made),
        "seed": None if config is None else config.seed,
        "reproduce": [] if run is None else _commands(folder / RUN_FILE, directory),
    }
    if device := about.get("device"):
        found["device"] = device
    if steps < found["steps"]:
        found["ended"] = about.get("ended") or _silence(folder)
    before = {"step": 0, "seconds": 0.0} if len(lines) == 1 else lines[-2]
    if (seconds := lines[-1]["seconds"] - before["seconds"]) > 0:
        found |= utilization(about, (steps - before["step"]) / seconds)
    write_training(folder / FOLDER if output is None else located(output, "output"), found, previews)
    return found


def _settings(folder: Path) -> tuple[RunConfig | None, TrainConfig | None, dict[str, Any] | None, list[str]]:
    """The settings from the run file, or without a readable one, those of the training from its newest checkpoint; the
    fingerprint in that checkpoint; and messages about files that could not be read."""
    checkpoints = reversed(checkpoint.steps(folder).items())
    step, made = next(((step, found) for step, path in checkpoints if (found := _made_by(path))), (0, None))
    damaged = []
    file = folder / RUN_FILE
    if file.exists():
        try:
            run = from_yaml(RunConfig, file)
            return run, TrainConfig(**dataclasses.asdict(run.train), seed=run.seed), made, []
        except InputError as error:
            damaged = [_left_out(RUN_FILE, error)]
    if made is not None and isinstance(known := made.get("config"), dict):
        try:
            return None, from_mapping(TrainConfig, {"steps": step, **known}), made, damaged
        except InputError as error:
            damaged += [_left_out(f"the settings in the checkpoint of step {step}", error)]
    return None, None, made, damaged


def _left_out(what: str, why: object) -> str:
    return f"{what} could not be read and is left out ({' '.join(str(why).split())})"


def _made_by(path: Path) -> dict[str, Any] | None:
    """The fingerprint of a checkpoint, without reading its tensors; None if it is damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(json_value(file.metadata()["fastdistill"])["fingerprint"])
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError):
        return None


def _waited(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of all waits, from the lines that have them."""
    names = [name for name in WAITED.values() if any(name in line for line in lines)]
    return {name.replace("waited", "waiting_for"): sum(line.get(name, 0.0) for line in lines) for name in names}


def _silence(folder: Path) -> str | None:
    """What is known if a training has not recorded its end; None if it is running, or nothing is known."""
    place = folder / LOCK_NAME
    try:
        held = lock(place, shared=True) if place.exists() else None
    except StorageError:
        held = None
    if held is None:
        return None
    os.close(held)
    return "without a word: killed, or with its machine"


def _commands(file: Path, directory: str | Path) -> list[str]:
    """Commands that repeat the run in another directory."""
    own, other = shlex.quote(str(file)), shlex.quote(f"{directory}-again")
    return [f"fastdistill cache {own}", f"fastdistill distill {own} --directory {other}"]


def _previews(folder: Path) -> tuple[dict[int, bytes], list[str]]:
    """Some of the previews, evenly spaced over the training, and messages about those that could not be read."""
    files = {int(m[1]): p for p in (folder / PREVIEWS).glob("step-*.png") if (m := _PREVIEW.fullmatch(p.name))}
    steps = sorted(files)
    if len(steps) > _PREVIEWS:
        steps = [steps[round(i * (len(steps) - 1) / (_PREVIEWS - 1))] for i in range(_PREVIEWS)]
    found: dict[int, bytes] = {}
    damaged = []
    for step in steps:
        try:
            found[step] = files[step].read_bytes()
        except OSError as error:
            damaged.append(_left_out(f"{PREVIEWS}/{files[step].name}", reason(error)))
    return found, damaged
