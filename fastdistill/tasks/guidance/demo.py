# SPDX-License-Identifier: Apache-2.0
"""The whole experiment (``fastdistill demo guidance``): teachers, exact worlds, students, report."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

from fastdistill.data.fingerprint import plain
from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Guidance
from fastdistill.errors import InputError, called
from fastdistill.models.weights import weights_hash
from fastdistill.tables import print_table
from fastdistill.tasks import workers
from fastdistill.tasks.digits import teacher as digits
from fastdistill.tasks.digits.sampling import SCHEDULE
from fastdistill.tasks.digits.text_encoder import prompt_bank
from fastdistill.tasks.guidance import worker
from fastdistill.tasks.guidance.demo_config import DemoConfig
from fastdistill.tasks.guidance.report import Results, write
from fastdistill.tasks.guidance.students import students
from fastdistill.tasks.processes import Job, Processes
from fastdistill.tasks.shades import teacher as shades
from fastdistill.train.arguments import check_idle
from fastdistill.train.config import validated
from fastdistill.train.devices import usable
from fastdistill.train.graph import check_device


def run(config: DemoConfig, console: Console | None = None) -> Path:
    """Run the experiment, or continue an interrupted one. Returns the path of ``report.html``.

    Raises:
        InputError: a schedule that does not fit the grid, or constants without 0; nothing is written.
        FastdistillError: something cannot be read, written or computed; finished parts are kept.
        KeyboardInterrupt: after Ctrl-C, when every process has written its checkpoint.
    """
    config = validated(config, "demo guidance").resolved()
    _check(config)
    console = console or Console()
    results: Results = {}
    with workers.experiment(config) as (output, spent):
        with workers.bars(console) as progress, Processes(worker.MODULE, config.workers) as processes:
            *jobs, speed = _jobs(config, output)
            found = workers.results(jobs, processes, progress)
            found += workers.results([speed], processes, progress)  # while nothing else runs
        for result in found:
            results.setdefault(result["part"], []).append(result)
        report, path = write(config, output, results, spent)
    _summarize(console, report)
    console.print(report["finding"], soft_wrap=True)
    console.print(f"\nReport: [bold]{path}[/bold]", soft_wrap=True)
    return path


def _check(config: DemoConfig) -> None:
    check_device(config.train.execution, usable(config.device))
    check_idle(config.train, ("teacher_fp8",), "as the teachers are U-Nets")
    with called("grid"):
        grid = Grid.parse(config.grid, SCHEDULE)
    if 0 not in config.constants:
        raise InputError.of("constants", "weights among which is 0", config.constants)
    for name, schedules in (("windows", config.windows), ("student", (config.student,))):
        for schedule in schedules:
            with called(name):
                Guidance.parse(schedule).weights(grid)


def _jobs(config: DemoConfig, output: Path) -> list[Job]:
    """The longest jobs first; the speed measurement last."""
    made_from = {
        "shades": weights_hash(shades.load_teacher()),
        "digits": weights_hash(digits.load_teacher()),
        "prompts": prompt_bank().identity,
    }
    content = plain(dataclasses.asdict(config))

    def job(part: str, seed: int, title: str) -> Job:
        wanted = worker.fingerprint(config, part, seed, made_from)
        directory = output / "parts" / (f"{part}-{seed}" if part in students(config) else part)
        described = {"part": part, "seed": seed, "config": content, "fingerprint": wanted}
        return Job(title, directory, described, worker.finished(directory, wanted))

    jobs = [
        job(name, seed, f"student {name}".replace("_", " ") + (f", seed {seed}" if config.seeds > 1 else ""))
        for seed in range(config.seeds)
        for name in students(config)
    ]
    teachers = [job(task, 0, f"teacher of the {task}") for task in worker.TEACHERS]
    return [*teachers[:1], *jobs, *teachers[1:], job("worlds", 0, "exact worlds"), job("speed", 0, "speed")]


def _summarize(console: Console, report: dict[str, Any]) -> None:
    """Print the table at the end."""
    task = report["models"]["shades"]
    back = {given["schedule"]: given["value"] for given in task["recovered"] if given["at"] == "separation"}
    columns = ("guidance", "right", "separation", "variance", "given back", "evaluations", "images/s")
    named = [(row["schedule"], row) for row in task["rows"]]
    named += [(f"student {name}".replace("_", " "), row) for name, row in report["students"].items()]
    rows = [
        (
            name,
            f"{row['right']:.1%}",
            f"{row['separation']:.3f}",
            f"{row['variance_ratio']:.3f}",
            "" if (value := back.get(name)) is None else f"{value:.0%}",
            str(row["evaluations_per_image"]),
            f"{row['images_per_second']:.1f}",
        )
        for name, row in named
    ]
    title = "Shades: right images, separation of the classes, variance within them"
    print_table(console, columns, rows, title=title)
