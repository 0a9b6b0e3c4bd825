# SPDX-License-Identifier: Apache-2.0
"""The whole experiment (``fastdistill demo digits``): cache, training of the students, evaluation, report."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fastdistill.data.fingerprint import plain
from fastdistill.data.latent_cache import generate_latent_cache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.errors import FastdistillError
from fastdistill.files import located, locked, make_directory, require_space
from fastdistill.models.specs import student_config
from fastdistill.models.weights import weights_hash
from fastdistill.tasks import workers
from fastdistill.tasks.digits import data, worker
from fastdistill.tasks.digits.config import STUDENTS, DigitsConfig
from fastdistill.tasks.digits.report import write
from fastdistill.tasks.digits.sampling import sample
from fastdistill.tasks.digits.teacher import load_teacher
from fastdistill.tasks.digits.text_encoder import prompt_bank
from fastdistill.tasks.workers import Job
from fastdistill.train.config import validated
from fastdistill.train.devices import usable

CACHE_SEED = 0
_SPACE = 200_000_000  # bytes, more than the cache, checkpoints and exports of a run need


def run(config: DigitsConfig, console: Console | None = None) -> Path:
    """Run the experiment, or continue an interrupted one. Returns the path of ``report.html``.

    Raises:
        FastdistillError: something cannot be read, written or computed; finished parts are kept.
        KeyboardInterrupt: after Ctrl-C, when every process has written its checkpoint.
    """
    config = validated(config, "digits").resolved()
    usable(config.device)
    console = console or Console()
    torch.set_num_threads(config.threads)
    output = located(config.output, "output")
    make_directory(output)
    require_space(output, _SPACE)
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(output))
        progress = stack.enter_context(workers.bars(console))
        made_from, prepared = _prepare(config, output, progress)
        results = _models(config, output, made_from, progress)
    seconds = {"total": time.perf_counter() - start, "cache": prepared}
    path = write(config, output, results, seconds, workers.versions())
    console.print(_summary(results))
    console.print(f"\nReport: [bold]{path}[/bold]", soft_wrap=True)
    return path


def _prepare(config: DigitsConfig, output: Path, progress: Progress) -> tuple[dict[str, str], float]:
    """Write the prompt bank and the latent cache. Returns the checksums of teacher and prompts, and the seconds spent
    on the cache in this call."""
    bank, teacher = prompt_bank(), load_teacher().to(config.device)
    student_config(teacher.config, config.spec())  # raises before anything is written if it cannot be built
    if not (output / "prompts" / "manifest.json").exists():
        bank.save(output / "prompts")
    elif PromptBank.load(output / "prompts").identity != bank.identity:
        raise FastdistillError(f"{output / 'prompts'}: holds other prompts; use another directory or delete it")
    bank = bank.to(config.device)
    made_from = {"teacher": weights_hash(teacher), "prompts": bank.identity}
    task = progress.add_task("teacher: cache of seen prompts", total=config.cache_images)

    def generate(rows: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return sample(teacher, bank, prompt, rows, CACHE_SEED, config.sampling)

    start = time.perf_counter()
    generate_latent_cache(
        output / "cache",
        generate,
        torch.tensor(data.SEEN).repeat(-(-config.cache_images // len(data.SEEN)))[: config.cache_images],
        data.SHAPE,
        torch.float32,
        {
            **made_from,
            "sampling": config.sampling.describe(),
            "seed": CACHE_SEED,
        },
        rows_per_shard=256,
        progress=lambda done, total: progress.update(task, completed=done),
    )
    return made_from, time.perf_counter() - start


def _models(
    config: DigitsConfig, output: Path, made_from: dict[str, str], progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """Results by model name, one entry per seed."""
    jobs = []
    for seed in range(config.seeds):
        for name in STUDENTS:
            title = name.replace("_", " ") + (f", seed {seed}" if config.seeds > 1 else "")
            jobs.append(_job(config, output, made_from, title, name, seed))
    jobs.append(_job(config, output, made_from, "teacher", "teacher", 0))
    by_model: dict[str, list[dict[str, Any]]] = {}
    for result in workers.results(jobs, config.workers, progress):
        by_model.setdefault(result["model"], []).append(result)
    return by_model


def _job(config: DigitsConfig, output: Path, made_from: dict[str, str], title: str, name: str, seed: int) -> Job:
    directory = output / "models" / (name if name == "teacher" else f"{name}-{seed}")
    content = {"model": name, "seed": seed, "config": plain(dataclasses.asdict(config))}
    finished = worker.finished(directory, worker.fingerprint(config, name, seed, **made_from))
    return Job(title, worker.MODULE, directory, content, finished)


def _summary(results: dict[str, list[dict[str, Any]]]) -> Table:
    """The table that is printed at the end."""
    table = Table(title="Images that match their prompt")
    for column in ("model", "seen prompts", "unseen prompts", "parameters", "training", "images/s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in ("teacher", *STUDENTS):
        runs = results[name]
        shares = [
            sum(r["counts"][kind]["right"] for r in runs) / sum(r["counts"][kind]["n"] for r in runs)
            for kind in ("seen", "unseen")
        ]
        seconds = sum(r.get("seconds", 0.0) for r in runs) / len(runs)
        table.add_row(
            name.replace("_", " "),
            *(f"{share:.1%}" for share in shares),
            f"{runs[0]['parameters']:,}",
            f"{seconds:.0f} s" if seconds else "-",
            f"{sum(r['images_per_second'] for r in runs) / len(runs):.0f}",
        )
    return table
