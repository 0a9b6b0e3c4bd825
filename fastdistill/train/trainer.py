# SPDX-License-Identifier: Apache-2.0
"""The trainer: a thin loop around ``TrainStep`` that logs, checkpoints, resumes and stops cleanly."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.data.fingerprint import sha256_of_json, sha256_of_tensors
from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.data.staged import Rows
from fastdistill.data.stored import StoredRows
from fastdistill.diffusion.schedule import NoiseSchedule, PredictionType
from fastdistill.distill.objective import Objective, Setting
from fastdistill.errors import InputError
from fastdistill.models.fuse import fuse
from fastdistill.models.sharding import sharded
from fastdistill.models.students import Student
from fastdistill.models.weights import plain_tensors
from fastdistill.train import arguments, devices, distributed
from fastdistill.train.config import TrainConfig
from fastdistill.train.loop import FitResult, Progress, fit
from fastdistill.train.scaling import LossScale
from fastdistill.train.step import TrainStep


class DistillTrainer:
    """Distil a teacher into a student.

    In a process group of torch's (``torchrun``), every rank builds the same trainer and calls the same methods: the
    ranks share each batch and average its gradients, rank 0 writes. The run is that of one process, but for the order
    in which the gradients are summed.

    Args:
        teacher: any diffusers model, or a module of its call shape ``model(x_t, t, encoder_hidden_states=prompt)``.
            It is frozen, kept out of the optimizer and run in the dtype in which it computes: it may be quantized, or
            stored in float8 by diffusers' layerwise casting.
        student: the same, or what ``make_student`` returns; trained in place. Parts that diffusers keeps in float32
            stay in it, whatever ``config.precision`` says.
        schedule: a ``NoiseSchedule`` or a diffusers scheduler.
        latents: the cache. prompts: the bank that its rows point into, the null prompt last. Either may be on the disk
            (``open`` in place of ``load``); a thread then reads the rows of the coming steps.
        objective: such as ``RandomConditioning``.
        config: a ``TrainConfig``, or a mapping of its fields.
        device: where to train (None: where the student is).
        prediction_type: what both models put out (None: what a diffusers scheduler says, else epsilon).
        shard: called with the student once it is cast, fused and tapped, to ``fully_shard`` it over the ranks (None:
            each holds all of it).

    Raises:
        InputError: whatever does not fit together, before anything is launched or written.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module | Student,
        schedule: NoiseSchedule | Any,
        latents: LatentCache,
        prompts: PromptBank,
        objective: Objective,
        config: TrainConfig | Mapping[str, Any],
        *,
        device: torch.device | str | None = None,
        prediction_type: PredictionType | None = None,
        shard: Callable[[nn.Module], object] | None = None,
    ) -> None:
        config = self.config = arguments.config(config)
        teacher, student = arguments.model(teacher, "teacher"), arguments.model(student, "student")
        arguments.check_data(latents, prompts)
        arguments.check_functions(objective, shard)
        schedule, prediction_type = arguments.schedule(schedule, prediction_type)
        self.device = arguments.device(device, student)
        first_sample, batch = distributed.part(config.batch, self.device)
        arguments.check_models(teacher, student)
        dtype = arguments.dtype(student, self.device, config.precision)
        self.teacher = devices.moved(teacher, self.device, "teacher").eval()
        for parameter in teacher.parameters():  # not the module's requires_grad_, which some quantized ones forbid
            parameter.requires_grad_(False)
        devices.cast(student, self.device, dtype)
        self.student = student.train()
        if self.config.fuse:
            fuse(self.teacher)
            fuse(self.student)
        low = any(p.dtype == torch.float16 for p in self.student.parameters() if p.requires_grad)
        scaling = LossScale(self.device) if low else None
        setting = self._setting = Setting(
            teacher=self.teacher,
            student=self.student,
            schedule=schedule,
            latents=_placed(latents.latents, self.device, config),
            latent_prompts=latents.prompt_index.to(self.device),
            prompts=_placed(prompts.embeddings, self.device, config),
            batch=batch,
            prediction_type=prediction_type,
            ahead=config.ahead,
            grad_scale=scaling.value if scaling else None,
            first_sample=first_sample,
            global_batch=config.batch,
        )
        self._fingerprint = _fingerprint(setting, latents, prompts, objective, config)
        each = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("ahead", "banks", "keep_checkpoints")}
        distributed.check_same(self._fingerprint | {"config": each, "shard": "none" if shard is None else "given"})
        bound = objective.bind(setting)
        if shard is not None:
            distributed.shard(self.student, bound, shard)
        self.step = TrainStep(bound, self.student, config, self.device, scaling)

    def fit(self, directory: str | Path | None = None, *, progress: Progress | None = None) -> FitResult:
        """Train to the last step of the configuration.

        With a directory, checkpoints and ``metrics.jsonl`` go there, and a run found in it is gone on with: the result
        is the same to the last bit as without the interruption. Ctrl-C ends the step under way (on several ranks, the
        log interval), writes a checkpoint and raises KeyboardInterrupt.

        Args:
            directory: where the run lives; one process at a time.
            progress: called after every step with the steps done and, at log intervals, the metrics.

        Raises:
            StorageError: the directory cannot be written, or holds a run of other settings or a damaged checkpoint.
            FastdistillError: the loss is not finite.
            InputError: a directory that is no path, progress that is no function; an objective of your own that calls
                a model with inputs of another dtype.
        """
        arguments.check_directory(directory)
        if progress is not None:
            arguments.check_function(progress, "progress")
        try:
            return fit(self.step, self.student, self._fingerprint, self.config, directory, progress)
        except RuntimeError as error:
            if (explained := self._setting.explained(error)) is not None:
                raise explained from error
            raise

    def ema_student(self, to: nn.Module | None = None) -> nn.Module:
        """A copy of the student with the averaged weights, float32 and in eval mode: what one samples from and exports.

        ``to``: a model of the student's kind to make it of, as a sharded one has no copy; every rank then has to ask.
        """
        if to is None:
            if where := sharded(self.student):
                raise InputError.of("to", "a model of the student's kind to write into", f"none, and {where}")
            to = copy.deepcopy(self.student)
        model = arguments.model(to, "to").to(self.device).float().eval().requires_grad_(False)
        with torch.no_grad():
            for own, theirs in zip(self.student.buffers(), model.buffers(), strict=True):
                theirs.copy_(own)
        self.step.optimizer.copy_average(self.student, model)
        return model


def _placed(bank: Rows, device: torch.device, config: TrainConfig) -> Rows:
    """A bank where the configuration has it; on the disk it stays there."""
    if isinstance(bank, StoredRows):
        return bank
    pinned = config.banks == "pinned" and device.type == "cuda"
    return bank.cpu().pin_memory() if pinned else bank.to(device)


def _fingerprint(
    setting: Setting, latents: LatentCache, prompts: PromptBank, objective: Objective, config: TrainConfig
) -> dict[str, Any]:
    """What must be the same for a run to be gone on with."""
    free = {"ahead", "banks", "checkpoint_every", "execution", "keep_checkpoints", "log_every"}
    if config.lr_schedule == "constant":
        free.add("steps")  # a constant rate can simply go on
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
    shapes: dict[str, Tensor] = dict(setting.student.named_parameters())
    return {
        "config": settings,
        "objective": objective.describe(),
        "teacher": sha256_of_tensors(plain_tensors(setting.teacher.state_dict())),
        "student": sha256_of_json({name: list(p.shape) for name, p in shapes.items()}),
        "latents": latents.identity,
        "prompts": prompts.identity,
        "schedule": setting.schedule.to_config(),
        "prediction_type": setting.prediction_type,
    }
