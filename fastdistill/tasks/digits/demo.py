# SPDX-License-Identifier: Apache-2.0
"""The whole experiment (``fastdistill demo digits``): cache, training of the students, evaluation, report.

Each student is a run (``DigitsConfig.run_file``), so every command for run files works with it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from fastdistill import runs
from fastdistill.data.fingerprint import plain
from fastdistill.evaluate.page import number
from fastdistill.tables import print_table
from fastdistill.tasks import workers
from fastdistill.tasks.digits import data, worker
from fastdistill.tasks.digits.config import STUDENTS, DigitsConfig
from fastdistill.tasks.digits.report import write
from fastdistill.tasks.processes import Job, Processes
from fastdistill.train.config import validated
from fastdistill.train.devices import usable
from fastdistill.train.graph import check_device


def run(config: DigitsConfig, console: Console | None = None) -> Path:
    """Run the experiment, or continue an interrupted one. Returns the path of ``report.html``.

    Raises:
        InputError: settings that the students' runs refuse; nothing is written.
        FastdistillError: something cannot be read, written or computed; finished parts are kept.
        KeyboardInterrupt: after Ctrl-C, when every process has written its checkpoint.
    """
    config = validated(config, "digits").resolved()
    _check(config)
    console = console or Console()
    with workers.experiment(config) as (output, spent):
        with workers.bars(console) as progress:
            prepared = _prepare(config, output, progress)
            results = _models(config, output, progress)
        path = write(config, output, results, {"total": spent(), "cache": prepared})
    _summarize(console, json.loads((path.parent / "report.json").read_text(encoding="utf-8")))
    console.print(f"\nReport: [bold]{path}[/bold]", soft_wrap=True)
    return path


def _check(config: DigitsConfig) -> None:
    """What the runs of the students refuse, before anything is written."""
    check_device(config.train.execution, usable(config.device))
    for name in STUDENTS:
        for seed in {0, config.seeds - 1}:
            runs.opened(config.run_file(name, seed))


def _prepare(config: DigitsConfig, output: Path, progress: Progress) -> float:
    """Encode the prompts and sample the teacher. Returns the seconds spent on it in all calls."""
    task = progress.add_task("teacher: cache of seen prompts", total=None)

    def show(stage: str, done: int, total: int) -> None:
        if stage == "latents":
            progress.update(task, completed=done, total=total)

    with workers.timed(output / "cache-seconds.json") as spent:
        runs.cache(config.run_file(next(iter(STUDENTS)), 0), progress=show)
        return spent()


def _models(config: DigitsConfig, output: Path, progress: Progress) -> dict[str, list[dict[str, Any]]]:
    """Results by model name, one entry per seed."""
    jobs = []
    for seed in range(config.seeds):
        for name in STUDENTS:
            title = name.replace("_", " ") + (f", seed {seed}" if config.seeds > 1 else "")
            jobs.append(_job(config, output, title, name, seed))
    jobs.append(_job(config, output, "teacher", "teacher", 0))
    by_model: dict[str, list[dict[str, Any]]] = {}
    with Processes(worker.MODULE, config.workers) as processes:
        found = workers.results(jobs, processes, progress)
        speed = _job(config, output, "speed", worker.SPEED, 0)
        found += workers.results([speed], processes, progress)  # while nothing else runs
    for result in found:
        by_model.setdefault(result["model"], []).append(result)
    return by_model


def _job(config: DigitsConfig, output: Path, title: str, name: str, seed: int) -> Job:
    directory = output / "models" / (f"{name}-{seed}" if name in STUDENTS else name)
    content = {"model": name, "seed": seed, "config": plain(dataclasses.asdict(config))}
    finished = worker.finished(directory, worker.fingerprint(config, name, seed))
    return Job(title, directory, content, finished)


def _summarize(console: Console, report: dict[str, Any]) -> None:
    """Print the table at the end."""
    rows = []
    for name, model in {"teacher": report["teacher"], **report["students"]}.items():
        found = model.get("likeness")
        row = (
            name.replace("_", " "),
            *(f"{model[kind]:.1%}" for kind in data.KINDS),
            *(number(found[kind]["distance"]["value"]) if found else "-" for kind in data.KINDS),
            f"{model['parameters']:,}",
            f"{model['seconds']:.0f} s" if "seconds" in model else "-",
            f"{model['images_per_second']:.0f}",
        )
        rows.append(row)
    columns = (
        "model",
        "right, seen",
        "right, unseen",
        "distance, seen",
        "unseen",
        "parameters",
        "training",
        "images/s",
    )
    print_table(console, columns, rows, title="Images that match their prompt, and their distance from the teacher's")
