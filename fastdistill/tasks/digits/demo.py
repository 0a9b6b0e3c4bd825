# SPDX-License-Identifier: Apache-2.0
"""The whole experiment (``fastdistill demo digits``): cache, training of the students, evaluation, report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TextIO

import diffusers
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import fastdistill
from fastdistill.data.fingerprint import plain
from fastdistill.data.latent_cache import generate_latent_cache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.errors import FastdistillError, StorageError
from fastdistill.files import atomic_write, located, locked, make_directory, reason, require_space
from fastdistill.models.specs import student_config
from fastdistill.models.weights import weights_hash
from fastdistill.tasks.digits import data, worker
from fastdistill.tasks.digits.config import STUDENTS, DigitsConfig
from fastdistill.tasks.digits.report import write
from fastdistill.tasks.digits.sampling import sample
from fastdistill.tasks.digits.teacher import load_teacher
from fastdistill.tasks.digits.text_encoder import prompt_bank
from fastdistill.train.config import validated
from fastdistill.train.devices import usable

CACHE_SEED = 0
_SPACE = 200_000_000  # bytes, more than the cache, checkpoints and exports of a run need
_PATIENCE = 20.0  # seconds for a process to write its checkpoint after Ctrl-C


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
        progress = stack.enter_context(_progress(console))
        made_from, prepared = _prepare(config, output, progress)
        results = _workers(config, output, made_from, progress)
    seconds = {"total": time.perf_counter() - start, "cache": prepared}
    path = write(config, output, results, seconds, versions())
    console.print(_summary(results))
    console.print(f"\nReport: [bold]{path}[/bold]", soft_wrap=True)
    return path


def versions() -> dict[str, str]:
    return {
        "fastdistill": fastdistill.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }


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


def _workers(
    config: DigitsConfig, output: Path, made_from: dict[str, str], progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """Results by model name, one entry per seed."""
    jobs = []
    for seed in range(config.seeds):
        for name in STUDENTS:
            jobs.append((f"{name.replace('_', ' ')}" + (f", seed {seed}" if config.seeds > 1 else ""), name, seed))
    jobs.append(("teacher", "teacher", 0))
    stop = threading.Event()
    results: dict[str, list[dict[str, Any]]] = {}
    with ThreadPoolExecutor(config.workers) as pool:
        futures = [pool.submit(_work, config, output, made_from, progress, stop, *job) for job in jobs]
        try:
            pending = set(futures)
            while pending:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise
    for future in futures:
        result = future.result()
        results.setdefault(result["model"], []).append(result)
    return results


def _work(
    config: DigitsConfig,
    output: Path,
    made_from: dict[str, str],
    progress: Progress,
    stop: threading.Event,
    title: str,
    name: str,
    seed: int,
) -> dict[str, Any]:
    """The result of one model: read from its directory, or computed by a worker whose progress is shown."""
    directory = output / "models" / (name if name == "teacher" else f"{name}-{seed}")
    task = progress.add_task(title, total=None)
    if not worker.finished(directory, worker.fingerprint(config, name, seed, **made_from)):
        job = {"model": name, "seed": seed, "config": plain(dataclasses.asdict(config))}
        make_directory(directory)
        atomic_write(directory / "job.json", json.dumps(job).encode())
        _run_worker(directory, stop, title, functools.partial(progress.update, task))
    progress.update(task, description=title, completed=1, total=1)
    result: dict[str, Any] = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    return result


def _run_worker(directory: Path, stop: threading.Event, title: str, show: Callable[..., None]) -> None:
    """Run the job of a directory in a separate process until it ends or ``stop`` is set."""
    command = [sys.executable, "-m", "fastdistill.tasks.digits.worker", str(directory / "job.json")]
    with _opened(directory / "log.txt") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        ended = threading.Event()

        def end() -> None:  # in its own session the process gets no Ctrl-C of the terminal; it is sent from here
            while not ended.wait(0.1):
                if stop.is_set():
                    process.send_signal(signal.SIGINT)
                    if not ended.wait(_PATIENCE):
                        process.kill()  # its last checkpoint is complete
                    return

        threading.Thread(target=end, daemon=True).start()
        assert process.stdout is not None
        error = None
        for line in process.stdout:
            fields = json.loads(line)
            error = fields.get("error", error)
            if "phase" in fields:
                loss = f", loss {fields['loss']:.3f}" if fields.get("loss") else ""
                if loss or fields["phase"] != "training":
                    show(description=f"{title}: {fields['phase']}{loss}")
                show(completed=fields["done"], total=fields["total"])
        code = process.wait()
        ended.set()
    if stop.is_set() or code in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if error is not None:
        raise FastdistillError(f"{title}: {error}")
    if code != 0:
        how = "was killed (out of memory?)" if code == -signal.SIGKILL else f"ended with {code}"
        raise FastdistillError(f"{title}: the process {how}; see {directory / 'log.txt'}")


def _opened(path: Path) -> TextIO:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: could not be written: {reason(error)}") from error


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        yield progress


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
