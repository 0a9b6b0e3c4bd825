# SPDX-License-Identifier: Apache-2.0
"""The loop around a training step: metrics, checkpoints, exact resume, clean stops."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import math
import numbers
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.data.fingerprint import plain
from fastdistill.errors import FastdistillError, InputError, Stopped, StorageError, described
from fastdistill.files import atomic_write, json_value, locked, make_directory, reason, require_space, sweep
from fastdistill.schemas import BEST
from fastdistill.train import checkpoint, distributed, graph, health
from fastdistill.train.callbacks import Callbacks, Metrics, Progress, Undisturbed
from fastdistill.train.choice import Choice, choose, running
from fastdistill.train.config import TrainConfig
from fastdistill.train.metrics import METRICS, line_of, read_metrics
from fastdistill.train.signals import signals
from fastdistill.train.state import check_storable, state_of
from fastdistill.train.step import TrainStep
from fastdistill.train.trackers import Trackers, check_installed
from fastdistill.train.waits import Waits
from fastdistill.train.writing import Going, Writer

PREVIEWS = "previews"  # folder of a run
SCORES = "scores.json"  # values of keep_best by step


@dataclass(frozen=True)
class FitResult:
    """The result of ``fit``.

    steps: steps done since the start of the run. seconds: training time, summed over all sessions. history: one entry
    per log interval, with means over it and ``skipped``, the number of skipped updates since the start of the run.
    """

    steps: int
    seconds: float
    history: list[Metrics]


def fit(
    step: TrainStep,
    student: nn.Module,
    fingerprint: Mapping[str, Any],
    config: TrainConfig,
    directory: Path | None = None,
    progress: Progress | None = None,
    *,
    callbacks: Callbacks = (),
    preview: Callable[[int], bytes] | None = None,
    teacher: nn.Module | None = None,
    explain: Callable[[], str] | None = None,
    choice: Choice | None = None,
) -> FitResult:
    """Run a step to the last one of its configuration; see ``DistillTrainer.fit``.

    ``preview``: renders the PNG file of ``config.preview`` after so many steps. ``teacher``: restored after callbacks,
    like the student; also used to measure the execution (``choice.choose``). ``explain``: returns the likely cause of
    metrics that are not finite. ``choice``: a choice that was made before, in an earlier session or for this one.
    """
    check_installed(config.trackers)
    graph.check(step, student, config.execution)
    with contextlib.ExitStack() as stack:
        run = _Run(step, student, fingerprint, config, explain)
        run.choice = choice
        stopped = stack.enter_context(signals())  # to the end: torchrun sends one where another rank has failed
        stack.enter_context(distributed.naming_the_silent())
        if directory is not None:
            distributed.first(lambda: _enter(directory, stack))
            run.open(directory)
            run.track(directory)
            stack.callback(run.trackers.close)
        stack.push(run.close)
        stack.callback(step.objective.close)
        done = int(step.counter[1])
        if done == 0 and teacher is not None and (choice is None or choice.execution is None):
            run.choice = choose(step, student, teacher, config, choice)
        step.choice = run.choice
        advance = running(step, student, config, run.choice)
        undisturbed = Undisturbed(step, student, teacher, config.seed)

        def call(functions: list[Progress], metrics: Metrics | None) -> None:
            for function in functions:
                try:
                    with undisturbed(done):
                        values = function(done, metrics)
                except Exception as error:
                    error.add_note(f"fastdistill: raised by a callback after step {done}; {run.keep(done)}")
                    raise
                if isinstance(values, Mapping):
                    run.trackers.scalars(done, values)
                    run.score(done, values)

        always = [] if progress is None else [progress]
        periodic = list(callbacks)
        if preview is not None and config.preview.every is not None:
            show = functools.partial(run.preview, preview)
            periodic.append((config.preview.every, show))
            call([show] if done == 0 else [], None)
        call(always, None)
        stop = 0
        while done < config.steps and not stop:
            with run.waits("data"):
                step.prepare(done)
            advance()
            done += 1
            run.warn()
            metrics = run.log(done) if done % config.log_every == 0 or done == config.steps else None
            if done % config.checkpoint_every == 0 or done == config.steps:
                with run.waits("checkpoint"):
                    run.save(done)
            due = [function for every, function in periodic if done % every == 0 or done == config.steps]
            call(always + due, metrics)
            if metrics is not None or distributed.size() == 1:  # ranks agree where they wait for each other anyway
                stop = distributed.largest(stopped.number, step.counter.device)
        run.finish(done)
        if stop and done < config.steps:
            error = Stopped(f"stopped after step {done} of {config.steps}; {run.saved()}", stop)
            if distributed.rank() == 0:
                print(f"\nfastdistill: {error}", file=sys.stderr, flush=True)
            raise error
        run.check_scores()
        return FitResult(done, run.seconds(), run.history)


def _enter(directory: Path, stack: contextlib.ExitStack) -> None:
    make_directory(directory)
    stack.enter_context(locked(directory))
    for place in (directory, directory / PREVIEWS):
        sweep(place)
    checkpoint.sweep(directory)


class _Run:
    """The part of a run that uses clocks and files."""

    def __init__(
        self,
        step: TrainStep,
        student: nn.Module,
        fingerprint: Mapping[str, Any],
        config: TrainConfig,
        explain: Callable[[], str] | None = None,
    ) -> None:
        self.step, self.student, self.fingerprint, self.config = step, student, fingerprint, config
        self._explain = explain or (lambda: "a lower learning rate or more warm-up usually helps")
        self.history: list[Metrics] = []
        self.directory: Path | None = None
        self.trackers = Trackers((), Path(), {}, 0)
        self._before, self._start = 0.0, time.perf_counter()
        self._logged = self._skipped = 0
        self._saved = 0  # steps done at the last checkpoint that was begun, or read
        self._writer, self.waits = Writer(), Waits(step.counter.device)
        self._group: Any = None  # of the threads that write a sharded student
        self._lines: list[str] = []  # of metrics that could not be written yet
        self._scores: dict[int, float] = {}  # of the checkpoints, by step
        self._told: set[str] = set()
        self.choice: Choice | None = None

    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._start

    def open(self, directory: Path) -> None:
        """Resume the run of this directory, if there is one. First checks that a checkpoint can be written."""
        self.directory = directory
        self._scores = _read_scores(directory / SCORES, self.config.keep_best)
        needed = functools.partial(check_storable, self.step, self.student, self.fingerprint)
        distributed.first(lambda: require_space(directory, needed()))
        if checkpoint.shared(self.student):
            distributed.require_seen(directory)
        saved = checkpoint.latest(directory, self.fingerprint, self.step, self.student)

        def read() -> list[Metrics]:
            path = directory / METRICS
            if saved is None:
                if path.exists():  # of steps that are done again
                    atomic_write(path, b"")
                return []
            history = [m for m in read_metrics(path) if m["step"] <= saved.step]
            atomic_write(path, "".join(map(line_of, history)).encode())
            return history

        self.history = distributed.first(read)
        if saved is None:
            return
        self._before = saved.seconds
        checkpoint.restore(saved, self.step, self.student)
        if self.history:
            self._logged, self._skipped = int(self.history[-1]["step"]), int(self.history[-1]["skipped"])
        self._saved = int(self.step.counter[1])

    def track(self, directory: Path) -> None:
        """Open the trackers, on rank 0."""
        if distributed.rank() == 0 and self.config.trackers:
            settings = {"config": dataclasses.asdict(self.config), "objective": self.fingerprint.get("objective")}
            self.trackers = Trackers(self.config.trackers, directory, plain(settings), self._saved)

    def log(self, done: int) -> Metrics:
        """Means of the metrics since the last line; only here the host waits for the device."""
        totals = distributed.rows(self.step.totals.double()).mean(0)
        read = torch.cat([totals, self.step.optimizer.skipped.double().reshape(1)])
        *sums, skipped = read.tolist()
        self.step.totals.zero_()
        steps = done - self._logged
        updates = steps - (int(skipped) - self._skipped)
        self._logged, self._skipped = done, int(skipped)
        means = [total / max(steps, 1) for total in sums[:-1]] + [sums[-1] / max(updates, 1)]
        metrics: Metrics = {"step": done, **dict(zip(self.step.metric_names, means, strict=True))}
        metrics |= {"skipped": self._skipped, "seconds": self.seconds(), **self.waits.taken()}
        if not all(math.isfinite(value) for value in metrics.values()):
            values = ", ".join(f"{k} {v:g}" for k, v in metrics.items() if not math.isfinite(v))
            raise FastdistillError(
                f"training: expected finite metrics, got {values} by step {done}; the last checkpoint is intact "
                f"({self._explain()})"
            )
        self.history.append(metrics)
        for term, text in health.concerns(self.history).items():
            if term not in self._told and distributed.rank() == 0:
                warnings.warn(f"step {done}: {text}", stacklevel=2)
            self._told.add(term)
        if self.directory is not None:
            path = self.directory / METRICS
            if distributed.rank() == 0:
                self._lines.append(line_of(metrics))
                try:
                    self._write_lines(path)
                except StorageError as error:
                    warnings.warn(f"{error}; training goes on, lines that wait: {len(self._lines)}", stacklevel=2)
            self.trackers.scalars(done, {name: value for name, value in metrics.items() if name != "step"})
        return metrics

    def _write_lines(self, path: Path) -> None:
        """Append the pending lines to a file, either all or none of them."""
        try:
            with open(path, "ab", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                data = "".join(self._lines).encode()
                try:
                    written = file.write(data)
                    if written != len(data):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(end)
                    raise
        except OSError as error:
            raise StorageError(f"{path}: could not be written: {reason(error)}") from error
        self._lines.clear()

    def save(self, done: int) -> None:
        """Start to write a checkpoint, after the previous one is complete."""
        directory = self.directory
        if directory is None:
            return
        self._writer.wait()
        self.warn()
        state = state_of(self.step, self.student)
        choice = None if self.choice is None else dataclasses.asdict(self.choice)
        trained = list(self.step.parameters_by_name)
        head = checkpoint.head(state, done, self.seconds(), self.fingerprint, trained, choice)
        self._saved = done
        first, together = distributed.rank() == 0, checkpoint.shared(self.student)
        if not first and not together:
            return
        group = self._group = self._group or (distributed.beside() if together else None)
        own, parts = checkpoint.cut(state)
        tensors = self._writer.staging.hold(own)

        def write(going: Going) -> None:
            if group is None:
                checkpoint.save(directory, tensors, head, going)
            else:
                checkpoint.save_together(directory, tensors, head | {"parts": parts}, going, group)
            if first:  # the others write again when they have met this rank, which waits for the end of this
                keep = self.config
                checkpoint.prune(directory, keep.keep_checkpoints, keep.keep_every, self._best(directory))

        self._writer.begin(write)

    def warn(self) -> None:
        """Warn if a checkpoint could not be written; the run continues, and can be resumed from the previous one."""
        if (error := self._writer.failure()) is not None:
            found = [] if self.directory is None else list(checkpoint.steps(self.directory))
            last = f"the last one is of step {found[-1]}" if found else "there is none yet"
            warnings.warn(f"checkpoint: {error}; training goes on, {last}", stacklevel=3)

    def score(self, done: int, values: Mapping[str, Any]) -> None:
        """Store the value of ``keep_best`` for the checkpoint of this step, also for later sessions."""
        value = values.get(self.config.keep_best or "")
        if self.directory is None or distributed.rank() or done != self._saved or value is None:
            return
        if not isinstance(value, numbers.Real | Tensor):
            raise InputError.of(f"{self.config.keep_best} of a callback", "a number", described(value))
        self._scores = {step: was for step, was in self._scores.items() if step <= done} | {done: float(value)}
        try:
            scores = {"schema": BEST.version, "scores": {self.config.keep_best: self._scores}}
            atomic_write(self.directory / SCORES, json.dumps(scores).encode())
        except StorageError as error:
            warnings.warn(f"{error}; the value of step {done} is lost with this process", stacklevel=2)

    def _best(self, directory: Path) -> int | None:
        """The step of the best existing checkpoint."""
        sign = 1 if self.config.best == "lowest" else -1
        there = checkpoint.steps(directory)
        scores = {step: sign * v for step, v in dict(self._scores).items() if step in there and not math.isnan(v)}
        return min(scores, key=lambda step: (scores[step], step), default=None)

    def finish(self, done: int) -> None:
        """Write a checkpoint now and wait for it; if it cannot be written, every rank raises the error."""
        if done != self._saved:
            self.save(done)

        def wait() -> None:
            self._writer.wait()
            if (error := self._writer.failure()) is not None:
                raise error
            if self._lines and self.directory is not None:
                self._write_lines(self.directory / METRICS)

        distributed.first(wait)

    def check_scores(self) -> None:
        """Warn at the end of a run if no checkpoint has a value of ``keep_best``."""
        name = self.config.keep_best
        if name is not None and self.directory is not None and not self._scores and distributed.rank() == 0:
            rule = f"a callback that returns a value named {name!r} at the step of a checkpoint, got none"
            warnings.warn(f"keep_best: expected {rule}; no checkpoint is kept as the best", stacklevel=3)

    def close(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End the writing thread: a checkpoint that is being written is completed, except after Ctrl-C."""
        if isinstance(error, KeyboardInterrupt):
            self._writer.cancel()
        self._writer.wait()
        self.warn()
        self._writer.staging.close()
        if self._group is not None:
            torch.distributed.destroy_process_group(self._group)

    def preview(self, make: Callable[[int], bytes], done: int, _: object) -> None:
        """Write ``previews/step-<done>.png``; if the samples do not fit into device memory, warn and continue."""

        def write() -> None:
            assert self.directory is not None
            place = self.directory / PREVIEWS
            try:
                image = make(done)
            except torch.OutOfMemoryError as error:
                warnings.warn(f"preview of step {done}: left out, {error}", stacklevel=2)
                return
            try:
                make_directory(place)
                atomic_write(place / f"step-{done:08d}.png", image)
            except StorageError as error:
                warnings.warn(f"{error}; training goes on without the preview of step {done}", stacklevel=2)
                return
            self.trackers.image(done, place / f"step-{done:08d}.png")

        distributed.first(write)

    def saved(self) -> str:
        return "nothing is saved without a directory" if self.directory is None else f"saved in {self.directory}"

    def keep(self, done: int) -> str:
        """Save before an error ends the run, and report it; not with several ranks: the others may have no error."""
        if distributed.size() > 1:
            return "the last checkpoint is intact"
        self.finish(done)
        return self.saved()


def _read_scores(path: Path, name: str | None) -> dict[int, float]:
    """The values of that name; none if the file does not exist or is not valid."""
    try:
        found = json_value(path.read_bytes())
        if type(found.get("schema")) is int:  # files from before 0.1.0 have only the scores
            BEST.check(found["schema"], path)
            found = found["scores"]
        return {int(step): float(value) for step, value in found.get(name, {}).items()}
    except StorageError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return {}
