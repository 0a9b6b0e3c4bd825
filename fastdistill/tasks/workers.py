# SPDX-License-Identifier: Apache-2.0
"""Functions shared by experiments: their directory, the results of their parts, and information for their reports."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import platform
import shlex
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import fastdistill
from fastdistill import schemas
from fastdistill.errors import StorageError
from fastdistill.files import atomic_write, located, locked, make_directory, require_space
from fastdistill.tasks.processes import JOB, Job, Processes, Report
from fastdistill.train.devices import usable

_SPACE = 200_000_000  # bytes; enough for the data, checkpoints and exports of an experiment
#: Options that stand for other options.
_SIZES = ("quick", "full")


def bars(console: Console) -> Progress:
    """Progress of parts, with the remaining time."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, refresh_per_second=2)


def versions() -> dict[str, str]:
    return {
        "fastdistill": fastdistill.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }


def images_per_second(
    contestants: Mapping[str, Callable[[], object]], images: int, report: Report, turns: int = 2
) -> dict[str, float]:
    """Images per second of calls that sample ``images`` images each, in turns in this process: best of ``turns``."""
    best = dict.fromkeys(contestants, math.inf)
    for turn in range(turns):
        for place, (name, call) in enumerate(contestants.items()):
            report(phase="speed", done=turn * len(contestants) + place, total=turns * len(contestants))
            start = time.perf_counter()
            call()  # its images are on the CPU, so it has finished
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: images / seconds for name, seconds in best.items()}


@contextlib.contextmanager
def experiment(config: Any) -> Iterator[tuple[Path, Callable[[], float]]]:
    """The directory of an experiment, locked against other processes, and a function for the seconds since its start.

    ``config`` has ``output``, ``device`` and ``threads``.
    """
    usable(config.device)
    torch.set_num_threads(config.threads)
    output = located(config.output, "output")
    make_directory(output)
    require_space(output, _SPACE)
    with locked(output), timed(output / "seconds.json") as spent:
        yield output, spent


@contextlib.contextmanager
def timed(file: Path) -> Iterator[Callable[[], float]]:
    """A function that returns the seconds since the experiment began, in total over all its calls; the file stores
    them."""
    start, before = time.perf_counter(), 0.0
    with contextlib.suppress(OSError, ValueError, TypeError):
        before = float(json.loads(file.read_text(encoding="utf-8")))

    def spent() -> float:
        return before + time.perf_counter() - start

    try:
        yield spent
    finally:
        atomic_write(file, json.dumps(spent()).encode())


def device(name: str, threads: int, processes: int) -> str:
    """The device of an experiment, for its report."""
    return name if name != "cpu" else f"{platform.machine()} CPU, {processes} processes of {threads} thread(s)"


def backend(found: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The kernels that each op used, over all results (from their ``backend``, see ``ops.used``)."""
    used: dict[str, set[str]] = {}
    for result in found:
        for op, kernels in result["backend"].items():
            used.setdefault(op, set()).update(kernels)
    return {op: ", ".join(sorted(kernels)) for op, kernels in sorted(used.items())}


def command(name: str, config: Any, default: Any) -> str:
    """The shortest command that gives this configuration; fields without effect on the results are left out.
    ``default``: the configuration with only the ``quick`` and ``full`` of this one."""
    words = ["fastdistill", name]
    words += [f"--{name}" for name in _SIZES if getattr(config, name, False)]
    for option, value, switch in _changed(config, default):
        if switch:
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            values = value if isinstance(value, tuple | list) else (value,)
            words += [f"--{option}", *(shlex.quote(str(one)) for one in values)]
    return " ".join(words)


def _changed(config: Any, default: Any, within: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Options, their values, and whether they are switches without a value."""
    for field in dataclasses.fields(config):
        name, value, usual = field.name, getattr(config, field.name), getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            yield from _changed(value, usual, f"{within}{name}.")
        elif name not in ("output", *_SIZES, "workers", "threads", "device") and value != usual:
            yield within + name.replace("_", "-"), value, field.type in ("bool", bool)


def results(jobs: Sequence[Job], processes: Processes, progress: Progress) -> list[dict[str, Any]]:
    """The result of each job, in order; unfinished jobs are done first.

    Raises:
        FastdistillError: a part failed; the others are stopped, and finished results are kept.
        KeyboardInterrupt: after Ctrl-C, when every process has written its checkpoint.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(processes.count) as pool:
        futures = [pool.submit(_result, job, processes, progress, stop) for job in jobs]
        try:
            pending = set(futures)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise
    return [future.result() for future in futures]


def keep_result(directory: Path, result: Mapping[str, Any]) -> None:
    """Write the result of a part."""
    content = {"schema": schemas.RESULT.version, **result}
    atomic_write(directory / "result.json", json.dumps(content, indent=1).encode())


def result_in(directory: Path, fingerprint: str) -> dict[str, Any] | None:
    """The result in a directory, if there is one with this fingerprint; a damaged one does not count.

    Raises:
        StorageError: it is from a newer fastdistill.
    """
    file = directory / "result.json"
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(result, dict):
            return None
        schemas.RESULT.check(result.pop("schema", 1), file)
    except StorageError:
        raise
    except (OSError, ValueError):
        return None
    return result if result.get("fingerprint") == fingerprint else None


def _result(job: Job, processes: Processes, progress: Progress, stop: threading.Event) -> dict[str, Any]:
    """Read from the job's directory, or computed by a process whose progress is shown."""
    task = progress.add_task(job.title, total=None)
    if not job.finished:
        make_directory(job.directory)
        atomic_write(job.directory / JOB, json.dumps(job.content).encode())
        processes.run(job, stop, functools.partial(progress.update, task))
    progress.update(task, description=job.title, completed=1, total=1)
    result: dict[str, Any] = json.loads((job.directory / "result.json").read_text(encoding="utf-8"))
    result.pop("schema", None)
    return result
