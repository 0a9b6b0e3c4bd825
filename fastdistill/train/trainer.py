# SPDX-License-Identifier: Apache-2.0
"""The trainer: a thin loop around ``TrainStep`` that logs, checkpoints, resumes and stops cleanly."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.data.files import atomic_write, locked, make_directory, reason, sweep
from fastdistill.data.fingerprint import sha256_of_json, sha256_of_tensors
from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.diffusion.schedule import NoiseSchedule, PredictionType
from fastdistill.distill.objective import Objective, Setting
from fastdistill.errors import FastdistillError, InputError, StorageError
from fastdistill.models.students import check_parameters
from fastdistill.train import checkpoint
from fastdistill.train.config import TrainConfig, validated
from fastdistill.train.step import TrainStep

Metrics = dict[str, float]


@dataclass(frozen=True)
class FitResult:
    """``history``: one entry a log interval, means over it. ``seconds``: training time over all sittings."""

    steps: int
    seconds: float
    history: list[Metrics]


class DistillTrainer:
    """Distil a teacher into a student.

    Args:
        teacher: any diffusers model, or a module of its call shape ``model(x_t, t, encoder_hidden_states=prompt)``.
            It is frozen, kept out of the optimizer and run in its own dtype.
        student: the same; trained in place.
        schedule: a ``NoiseSchedule`` or a diffusers scheduler.
        latents: the cache. prompts: the bank that its rows point into, the null prompt last.
        objective: such as ``RandomConditioning``.
        config: see ``TrainConfig``.
        device: where to train (None: where the student is).
        prediction_type: what both models put out (None: what a diffusers scheduler says, else epsilon).

    Raises:
        InputError: whatever does not fit together, before anything is launched or written.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        schedule: NoiseSchedule | Any,
        latents: LatentCache,
        prompts: PromptBank,
        objective: Objective,
        config: TrainConfig,
        *,
        device: torch.device | str | None = None,
        prediction_type: PredictionType | None = None,
    ) -> None:
        self.config = validated(config, "config")
        if not isinstance(schedule, NoiseSchedule):
            prediction_type = prediction_type or schedule.config.get("prediction_type")
            schedule = NoiseSchedule.from_diffusers(schedule)
        self.device = torch.device(device) if device is not None else next(student.parameters()).device
        _check_models(teacher, student, latents, prompts)
        self.teacher = teacher.to(self.device).eval().requires_grad_(False)
        self.student = student.to(self.device).train()
        setting = Setting(
            teacher=self.teacher,
            student=self.student,
            schedule=schedule,
            latents=latents.latents.to(self.device),
            latent_prompts=latents.prompt_index.to(self.device),
            prompts=prompts.embeddings.to(self.device),
            batch=config.batch,
            prediction_type=prediction_type or "epsilon",
        )
        self._fingerprint = _fingerprint(setting, latents, prompts, objective, config)
        self.step = TrainStep(objective.bind(setting), self.student, config, self.device)

    def fit(
        self, directory: str | Path | None = None, *, progress: Callable[[int, Metrics | None], object] | None = None
    ) -> FitResult:
        """Train to the last step of the configuration.

        With a directory, checkpoints and ``metrics.jsonl`` go there, and a run found in it is gone on with: the result
        is the same to the last bit as without the interruption. Ctrl-C ends the step under way, writes a checkpoint
        and raises KeyboardInterrupt.

        Args:
            directory: where the run lives; one process at a time.
            progress: called after every step with the steps done and, at log intervals, the metrics.

        Raises:
            StorageError: the directory cannot be written, or holds a run of other settings or a damaged checkpoint.
            FastdistillError: the loss is not finite.
        """
        with contextlib.ExitStack() as stack:
            run = _Run(self.step, self.student, self._fingerprint, self.config)
            if directory is not None:
                path = Path(directory)
                make_directory(path)
                stack.enter_context(locked(path))
                sweep(path)
                run.open(path)
            stopped = stack.enter_context(_signals())
            done = int(self.step.counter[1])
            if progress is not None:
                progress(done, None)
            while done < self.config.steps and not stopped.is_set():
                self.step()
                done += 1
                metrics = run.log(done) if done % self.config.log_every == 0 or done == self.config.steps else None
                if done % self.config.checkpoint_every == 0 or done == self.config.steps:
                    run.save(done)
                if progress is not None:
                    progress(done, metrics)
            if stopped.is_set() and done < self.config.steps:
                run.save(done)
                raise KeyboardInterrupt(f"stopped after step {done} of {self.config.steps}")
            return FitResult(done, run.seconds(), run.history)

    def ema_student(self) -> nn.Module:
        """A copy of the student with the averaged weights, in eval mode: what one samples from and exports."""
        model = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.step.ema.copy_to(model)
        return model


class _Run:
    """The side of a run that touches clocks and files."""

    def __init__(self, step: TrainStep, student: nn.Module, fingerprint: dict[str, Any], config: TrainConfig) -> None:
        self.step, self.student, self.fingerprint, self.config = step, student, fingerprint, config
        self.history: list[Metrics] = []
        self.directory: Path | None = None
        self._before, self._start = 0.0, time.perf_counter()
        self._logged = 0

    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._start

    def open(self, directory: Path) -> None:
        """Go on with the run of this directory, if it holds one."""
        self.directory = directory
        found = checkpoint.latest(directory, self.fingerprint)
        if found is None:
            return
        checkpoint.restore(found.tensors, self.step, self.student)
        self._before = found.seconds
        self.history = [m for m in read_metrics(directory / "metrics.jsonl") if m["step"] <= found.step]
        self._logged = int(self.history[-1]["step"]) if self.history else 0
        atomic_write(directory / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in self.history).encode())

    def log(self, done: int) -> Metrics:
        """Means of the metrics since the last line: the one place where the device is waited for."""
        means = (self.step.totals / max(done - self._logged, 1)).tolist()
        self.step.totals.zero_()
        self._logged = done
        metrics = {"step": done, **dict(zip(self.step.metric_names, means, strict=True)), "seconds": self.seconds()}
        if not all(math.isfinite(value) for value in metrics.values()):
            values = ", ".join(f"{k} {v:g}" for k, v in metrics.items() if not math.isfinite(v))
            raise FastdistillError(
                f"training: expected finite metrics, got {values} by step {done}; the last checkpoint is intact "
                "(a lower learning rate or more warm-up usually helps)"
            )
        self.history.append(metrics)
        if self.directory is not None:
            path = self.directory / "metrics.jsonl"
            try:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(metrics) + "\n")
            except OSError as error:
                raise StorageError(f"{path}: could not be written: {reason(error)}") from error
        return metrics

    def save(self, done: int) -> None:
        if self.directory is not None:
            state = checkpoint.state_of(self.step, self.student)
            checkpoint.save(self.directory, state, done, self.seconds(), self.fingerprint)
            checkpoint.prune(self.directory, self.config.keep_checkpoints)


def read_metrics(path: Path) -> list[Metrics]:
    """The lines of a ``metrics.jsonl``; a last line cut short by a kill is left out."""
    metrics = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            metrics.append(json.loads(line))
    return metrics


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, so that a step is never cut in half; a second one interrupts at once."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: object) -> None:
        stopped.set()
        signal.signal(number, signal.default_int_handler)

    try:
        for number in before:
            signal.signal(number, stop)
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_models(teacher: nn.Module, student: nn.Module, latents: LatentCache, prompts: PromptBank) -> None:
    check_parameters(teacher, student)
    latents.check_prompts(len(prompts))
    for name, model in {"teacher": teacher, "student": student}.items():
        config = getattr(model, "config", {})
        channels, width = config.get("in_channels"), config.get("cross_attention_dim")
        if channels is not None and channels != latents.latents.shape[1]:
            raise InputError.of("latents", f"{channels} channels (in_channels of the {name})", latents.latents.shape[1])
        if isinstance(width, int):
            prompts.check_width(width)


def _fingerprint(
    setting: Setting, latents: LatentCache, prompts: PromptBank, objective: Objective, config: TrainConfig
) -> dict[str, Any]:
    """What must be the same for a run to be gone on with."""
    free = {"log_every", "checkpoint_every", "keep_checkpoints"}
    if config.lr_schedule == "constant":
        free.add("steps")  # a constant rate can simply go on
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
    data = {"latents": latents.latents, "prompt_index": latents.prompt_index}
    shapes: dict[str, Tensor] = dict(setting.student.named_parameters())
    return {
        "config": settings,
        "objective": objective.describe(),
        "teacher": sha256_of_tensors(setting.teacher.state_dict()),
        "student": sha256_of_json({name: list(p.shape) for name, p in shapes.items()}),
        "latents": sha256_of_json(dict(latents.fingerprint)) if latents.fingerprint else sha256_of_tensors(data),
        "prompts": prompts.sha256,
        "schedule": setting.schedule.to_config(),
        "prediction_type": setting.prediction_type,
    }
