# SPDX-License-Identifier: Apache-2.0
"""Runs the parts of an experiment in separate processes.

``python -m MODULE``, whose ``main`` is ``serve(run)``, imports the dependencies of the parts, which takes seconds, and
then forks a process for every job file in its input (one JSON string per line). ``python -m MODULE job.json`` does one
job. A part prints its progress as JSON lines and writes ``result.json`` beside the job. It ends after the current step
on Ctrl-C, on SIGTERM, and if the process that reads its progress ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from fastdistill.errors import FastdistillError, StorageError
from fastdistill.files import reason

#: Called by a part with ``phase``, ``done``, ``total`` and optionally ``loss``.
Report = Callable[..., None]
_PATIENCE = 20.0  # seconds for a process to write its checkpoint after Ctrl-C
JOB = "job.json"
_LOG = "log.txt"


@dataclass(frozen=True)
class Job:
    """A part of an experiment: ``title`` for the progress display, its directory, the content of ``job.json`` there,
    and whether the directory has its result already."""

    title: str
    directory: Path
    content: Mapping[str, Any]
    finished: bool


class Processes:
    """Does jobs of a module, up to ``count`` at a time. Leaving ``with`` ends the processes with the imported
    module."""

    def __init__(self, module: str, count: int) -> None:
        self.count = count
        self._module = module
        self._idle: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._idle:
            _end(process)

    def run(self, job: Job, stop: threading.Event, show: Callable[..., None]) -> None:
        """Do a job until it ends or ``stop`` is set. ``show`` gets the fields of its progress.

        Raises:
            FastdistillError: the job failed.
            KeyboardInterrupt: the job was stopped.
        """
        with self._ready(job.directory / _LOG) as process, _stopping(process, stop):
            error, code = None, None
            for fields in _told(process, job):
                error = fields.get("error", error)
                code = fields.get("ended", code)
                if "phase" in fields:
                    loss = f", loss {fields['loss']:.3f}" if fields.get("loss") else ""
                    if loss or fields["phase"] != "training":
                        show(description=f"{job.title}: {fields['phase']}{loss}")
                    show(completed=fields["done"], total=fields["total"])
            if code is None:
                code = process.wait()
            if stop.is_set() or code in (130, -signal.SIGINT):
                raise KeyboardInterrupt
            if error is not None:
                raise FastdistillError(f"{job.title}: {error}")
            if code != 0:
                how = "was killed (out of memory?)" if code == -signal.SIGKILL else f"ended with {code}"
                raise FastdistillError(f"{job.title}: the process {how}; see {job.directory / _LOG}")

    @contextlib.contextmanager
    def _ready(self, log: Path) -> Iterator[subprocess.Popen[str]]:
        """A process for a job. It is reused for the next job, unless the job fails."""
        try:
            with log.open("w", encoding="utf-8") as errors:
                try:
                    process = self._idle.pop()
                except IndexError:
                    process = self._started(errors)
        except OSError as error:
            raise StorageError(f"{log}: could not be written: {reason(error)}") from error
        try:
            yield process
        except BaseException:
            _end(process)
            raise
        self._idle.append(process)

    def _started(self, errors: TextIO) -> subprocess.Popen[str]:
        """Starts it in its own session, so that it does not receive Ctrl-C from the terminal."""
        command, pipe = [sys.executable, "-m", self._module], subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, start_new_session=True)


def _told(process: subprocess.Popen[str], job: Job) -> Iterator[dict[str, Any]]:
    """The messages of a process while it does a job."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # the process has ended
        print(json.dumps(str(job.directory / JOB)), file=process.stdin, flush=True)
    for line in process.stdout:
        fields = json.loads(line)
        yield fields
        if "ended" in fields:
            return


@contextlib.contextmanager
def _stopping(process: subprocess.Popen[str], stop: threading.Event) -> Iterator[None]:
    """Interrupts the process and its forks when ``stop`` is set."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            if stop.is_set():
                _send(process, signal.SIGINT)
                if not over.wait(_PATIENCE):
                    _send(process, signal.SIGKILL)  # the last checkpoint is complete
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _end(process: subprocess.Popen[str]) -> None:
    """Ends it by closing its input; a job in progress ends at its next progress message."""
    assert process.stdin is not None and process.stdout is not None
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        _send(process, signal.SIGKILL)
        process.wait()


def _send(process: subprocess.Popen[str], number: int) -> None:
    """Sends a signal to the process and its forks, which have their own session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def serve(run: Callable[[Path, Report], None], remedy: str) -> int:
    """The ``main`` of a module: do the job on the command line, or those in the input, by ``run(job file, report)``.
    Returns the exit status.

    remedy: advice for the case that memory is not enough.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also if the parent runs in the background of a shell
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if len(sys.argv) > 1:
        return _do(Path(sys.argv[1]), run, remedy)
    for line in sys.stdin:
        job = Path(json.loads(line))
        child = os.fork()
        if child == 0:
            with (job.parent / _LOG).open("a", encoding="utf-8") as errors:
                os.dup2(errors.fileno(), sys.stderr.fileno())
            return _do(job, run, remedy)
        _tell(ended=_status(child))
    return 0


def _status(child: int) -> int:
    """The exit status of a process, after it has ended; an interrupt of this process interrupts it too."""
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _do(job: Path, run: Callable[[Path, Report], None], remedy: str) -> int:
    try:
        run(job, _tell)
    except FastdistillError as error:
        _tell(error=str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)):
            raise
        _tell(error=f"not enough memory: {remedy}")
        return 2
    return 0


def _tell(**fields: Any) -> None:
    try:
        print(json.dumps(fields), flush=True)
    except BrokenPipeError:  # no reader any more: stop as for Ctrl-C
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        os.kill(os.getpid(), signal.SIGTERM)
