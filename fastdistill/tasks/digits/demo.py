# SPDX-License-Identifier: Apache-2.0
"""The whole experiment (``fastdistill demo digits``): cache, training of the students, evaluation, report.

Each student is a run (``DigitsConfig.run_file``), with which every command of a run file works, too.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from fastdistill import runs
from fastdistill.data.fingerprint import plain
from fastdistill.tables import print_table
from fastdistill.tasks import workers
from fastdistill.tasks.digits import worker
from fastdistill.tasks.digits.config import STUDENTS, DigitsConfig
from fastdistill.tasks.digits.report import write
from fastdistill.tasks.processes import Job, Processes
from fastdistill.train.config import validated


def run(config: DigitsConfig, console: Console | None = None) -> Path:
    """Run the experiment, or continue an interrupted one. Returns the path of ``report.html``.

    Raises:
        FastdistillError: something cannot be read, written or computed; finished parts are kept.
        KeyboardInterrupt: after Ctrl-C, when every process has written its checkpoint.
    """
    config = validated(config, "digits").resolved()
    console = console or Console()
    with workers.experiment(config) as (output, spent):
        with workers.bars(console) as progress:
            prepared = _prepare(config, output, progress)
            results = _models(config, output, progress)
        path = write(config, output, results, {"total": spent(), "cache": prepared})
    _summarize(console, results)
    console.print(f"\nReport: [bold]{path}[/bold]", soft_wrap=True)
    return path


def _prepare(config: DigitsConfig, output: Path, progress: Progress) -> float:
    """Encode the prompts and sample the teacher. Returns the seconds that all calls spent on it."""
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
        found += workers.results([speed], processes, progress)  # when nothing else runs
    for result in found:
        by_model.setdefault(result["model"], []).append(result)
    return by_model


def _job(config: DigitsConfig, output: Path, title: str, name: str, seed: int) -> Job:
    directory = output / "models" / (f"{name}-{seed}" if name in STUDENTS else name)
    content = {"model": name, "seed": seed, "config": plain(dataclasses.asdict(config))}
    finished = worker.finished(directory, worker.fingerprint(config, name, seed))
    return Job(title, directory, content, finished)


def _summarize(console: Console, results: dict[str, list[dict[str, Any]]]) -> None:
    """Print the table at the end."""
    rows = []
    for name in ("teacher", *STUDENTS):
        runs = results[name]
        shares = [
            sum(r["counts"][kind]["right"] for r in runs) / sum(r["counts"][kind]["n"] for r in runs)
            for kind in ("seen", "unseen")
        ]
        seconds = sum(r.get("seconds", 0.0) for r in runs) / len(runs)
        row = (
            name.replace("_", " "),
            *(f"{share:.1%}" for share in shares),
            f"{runs[0]['parameters']:,}",
            f"{seconds:.0f} s" if seconds else "-",
            f"{results[worker.SPEED][0]['images_per_second'][name]:.0f}",
        )
        rows.append(row)
    columns = ("model", "seen prompts", "unseen prompts", "parameters", "training", "images/s")
    print_table(console, columns, rows, title="Images that match their prompt")
