# SPDX-License-Identifier: Apache-2.0
"""The trainer: a thin loop around ``TrainStep`` that logs, checkpoints, resumes and stops cleanly."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from fastdistill.data.fingerprint import differences, listed
from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.diffusion.schedule import PredictionType, Schedule
from fastdistill.distill.objective import Objective, Setting
from fastdistill.errors import InputError, quoted
from fastdistill.files import located
from fastdistill.models import families, peft
from fastdistill.models.calling import Call
from fastdistill.models.fuse import fuse, products
from fastdistill.models.fuse.packed import pack
from fastdistill.models.sharding import sharded
from fastdistill.models.students import Student
from fastdistill.models.weights import shared, storage
from fastdistill.train import arguments, checkpoint, devices, distributed
from fastdistill.train.callbacks import Callbacks, Progress
from fastdistill.train.choice import LEAST, Bench, Choice, faster_precision, has_bfloat16, open_in, put
from fastdistill.train.config import TrainConfig
from fastdistill.train.loop import FitResult, fit
from fastdistill.train.optimizer import by_name, named_tensors
from fastdistill.train.scaling import LossScale
from fastdistill.train.sources import banks_of, check_sources, explain, fingerprint, placed
from fastdistill.train.step import TrainStep
from fastdistill.train.teacher import check_float8, check_null_once, check_others, in_float8

_open: weakref.WeakSet[DistillTrainer] = weakref.WeakSet()


class DistillTrainer:
    """Distil a teacher into a student.

    In a process group of torch (``torchrun``), every rank builds the same trainer and calls the same methods. The ranks
    share each batch and average its gradients. Rank 0 writes; of a sharded student's checkpoints each rank writes its
    part. The run is that of one process, except for the order in which gradients are summed, and for random numbers
    that the student draws itself (dropout, stochastic depth): these depend on seed, step and the rank's first sample,
    and so on how the batch is split.

    A trainer has hooks on the modules that it taps, and keeps the teacher frozen in eval mode, with
    ``config.teacher_fp8`` in float8. ``close``, or leaving a ``with`` statement, ends all that; the end of ``fit`` also
    removes the hooks. ``about_teacher`` has lines on what changes the teacher's numbers.

    Args:
        teacher: a diffusers model of a family (``fastdistill.models.families``), or any module of the call shape
            ``model(x_t, t, encoder_hidden_states=prompt)``, or ``model(x_t, t, **banks)`` with several banks. It is
            frozen, kept out of the optimizer and run in the dtype in which it computes: it may be quantized, or stored
            in float8 by diffusers' layerwise casting.
        student: the same, or what ``make_student`` returns; trained in place. Parts that diffusers keeps in float32
            stay in it, whatever ``config.precision`` says.
        schedule: a ``NoiseSchedule``, a ``FlowSchedule`` or a diffusers scheduler (``schedule_of``).
        latents: the cache, or a list of caches with latents of several shapes. Then every step draws from one of them;
            a cache with more latents is drawn more often.
        prompts: the bank that the latents point into, with the null prompt last. With several caches it may be a list
            with the bank of each (because SDXL reads the size, for example). Latents and prompts may be on the disk
            (``open`` in place of ``load``), and prompts may be encoded on demand (``PromptBank.on_demand``); a thread
            then reads or encodes the rows of the next steps.
        objective: such as ``RandomConditioning``.
        config: a ``TrainConfig``, or a mapping of its fields.
        device: where to train (None: where the student is).
        prediction_type: what both models predict (None: what a diffusers scheduler says; without one epsilon, or
            flow_prediction for flow matching).
        call: ``call(model, x_t, timestep, rows)`` returns the output of teacher or student, if they are not called as
            in their family; ``rows`` are the rows of the banks by name.
        decode: latents [B, *S] float32 on the device -> images [B, 1 or 3, H, W] in [0, 1], for previews
            (``config.preview``): such as the VAE's decoder. None: latents with 1 or 3 channels are images in [-1, 1];
            of others the first three channels are shown, within the range of the teacher's.
        preview_prompts: a bank for ``config.preview.prompts`` alone, whose texts need not be in the pool (None:
            ``prompts``).
        shard: called with the student after it is cast, fused and tapped, to ``fully_shard`` it over the ranks (None:
            each rank holds all of it).

    Raises:
        InputError: arguments that do not match, before anything is launched or written.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module | Student,
        schedule: Schedule | Any,
        latents: LatentCache | Sequence[LatentCache],
        prompts: PromptBank | Sequence[PromptBank],
        objective: Objective,
        config: TrainConfig | Mapping[str, Any],
        *,
        device: torch.device | str | None = None,
        prediction_type: PredictionType | None = None,
        call: Call | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        preview_prompts: PromptBank | None = None,
        shard: Callable[[nn.Module], object] | None = None,
    ) -> None:
        config = self.config = arguments.config(config)
        teacher, student = arguments.model(teacher, "teacher"), arguments.model(student, "student")
        sources = arguments.sources(latents, prompts)
        pool = sources[0][1]
        shown = pool if preview_prompts is None else arguments.preview_prompts(preview_prompts, pool)
        arguments.check_functions(objective, shard=shard, call=call, decode=decode)
        if shard is not None:
            distributed.require_group("shard")
        again: dict[str, Any] = {"schedule": schedule, "latents": latents, "prompts": prompts, "objective": objective}
        again |= {"device": device, "prediction_type": prediction_type, "call": call, "decode": decode}
        again |= {"preview_prompts": preview_prompts, "shard": shard}
        self._given = again if config.precision == "measured" else None  # to be made anew in the faster one
        scheduler = None if isinstance(schedule, Schedule) else schedule
        schedule, prediction_type = arguments.schedule(schedule, prediction_type, teacher, sources)
        self.device = arguments.device(device, student)
        first_sample, batch = distributed.part(config.batch, self.device)
        arguments.check_models(teacher, student)
        check_others(teacher, config, _open)
        check_float8(teacher, config, self.device)
        common = shared(student, teacher)
        dtype = arguments.dtype(student, self.device, config.precision, common)
        adapters = peft.identity(student, teacher)
        was = [(p, p.requires_grad) for p in teacher.parameters()], [(m, m.training) for m in teacher.modules()]
        with _computing(), contextlib.ExitStack() as undo:  # by close, or where something does not fit
            undo.callback(devices.given_back, *was)
            self.teacher = devices.moved(teacher, self.device, "teacher")
            self._freeze()
            devices.cast(student, self.device, dtype, common | {id(b): b for b in self.teacher.buffers()})
            if config.gradient_checkpointing:
                undo.callback(devices.held(student, devices.checkpointed))
            self.student = student.train()
            if self.config.fused(self.device.type):
                fuse(self.teacher)
                fuse(self.student)
            if self.device.type in products.PLACES and not common and not config.teacher_fp8:  # of a fused teacher
                undo.callback(devices.held(self.teacher, pack))
            low = any(p.dtype == torch.float16 for p in self.student.parameters() if p.requires_grad)
            scaling = LossScale(self.device) if low else None
            first, *others = placed(sources, self.device, config)
            setting = self._setting = Setting(
                teacher=self.teacher,
                student=self.student,
                schedule=schedule,
                **vars(first),
                batch=batch,
                prediction_type=prediction_type,
                ahead=config.ahead,
                grad_scale=scaling.value if scaling else None,
                first_sample=first_sample,
                global_batch=config.batch,
                call=call,
                micro_batch=config.micro_batch,
                others=tuple(others),
                null_once=config.teacher_null_once,
            )
            self._fingerprint = fingerprint(setting, sources, objective, config)
            if adapters:
                self._fingerprint["adapters"] = adapters
            if call is not None:
                self._fingerprint["call"] = "a function"
            for cache, bank in sources:
                check_sources(cache, bank, self.teacher, self._fingerprint["teacher"]["weights"])
            own = ("ahead", "banks", "keep_checkpoints", "keep_every", "keep_best", "best")
            each = {k: v for k, v in dataclasses.asdict(config).items() if k not in own}
            layout = {name: [list(p.shape), p.requires_grad] for name, p in self.student.named_parameters()}
            given = {"config": each, "shard": "none" if shard is None else "given", "student": layout}
            distributed.check_same(self._fingerprint | given)
            self.about_teacher: list[str] = []
            if config.teacher_fp8:
                as_it_was, line = in_float8(setting, objective)
                undo.callback(as_it_was)
                self.about_teacher.append(line)
            bound = objective.bind(setting)
            undo.callback(bound.close)
            check_null_once(bound, self.teacher, config, self.device)
            if shard is not None:
                distributed.shard(self.student, bound, shard)
            self.step = TrainStep(bound, self.student, config, self.device, scaling, shapes=len(sources))
            undo.callback(self.step.close)
            for model in (teacher, student):
                if family := families.find(model):
                    undo.callback(devices.held(model, family.prepare))
            self._previews = None
            if config.preview.every is not None:
                from fastdistill.evaluate.previews import previews_of  # loads what draws figures

                guided = bool(getattr(bound, "guided", False))
                self._previews = previews_of(setting, config.preview, shown, scheduler, decode, guided)
            self._layout = arguments.layout(self.student)
            self._closed = self._fitting = False
            self._undo = undo.pop_all()
        _open.add(self)

    def fit(
        self,
        directory: str | Path | None = None,
        *,
        progress: Progress | None = None,
        callbacks: Callbacks = (),
    ) -> FitResult:
        """Train to the last step of the configuration.

        With a directory, checkpoints and ``metrics.jsonl`` go there, and a run that is there is continued: the result
        has the same bits as without the interruption. A thread writes the checkpoints while the training goes on. If
        one cannot be written, that is a warning; for the last one it is an error. The run may be continued on another
        machine, in another precision (the float32 masters carry over) and by another number of ranks. With other data,
        settings or frozen parameters it is refused. On a CPU a new run may measure first how to run its steps; a
        continued one runs them as before (docs/cpu.md).

        After Ctrl-C or SIGTERM the current step ends (on several ranks, the log interval) and a checkpoint is written.
        Then a line is printed to stderr and ``Stopped`` is raised. A script that does not catch it ends there without a
        traceback, with exit status 130 or 143.

        Args:
            directory: of the run; one process at a time may use it. With a sharded student all ranks have to see it.
            progress: called at the start and after every step, with the steps done and, at log intervals, the metrics
                (else None).
            callbacks: pairs (every, function) of such functions, called after every so many steps and after the last.
                They may evaluate the models without changing the run: afterwards training modes, ``requires_grad``,
                gradients, grad mode and generators are restored. Their own random numbers depend on (seed, steps
                done). Every rank calls them; while one evaluates, the others wait in the next step, but no longer than
                the process group's timeout.

        Raises:
            InputError: a directory that is no path, progress or callbacks that are no functions; a trainer that is
                closed; a call under autocast; a student whose weights were cast, frozen or renamed since the trainer
                was made, or with state that no checkpoint can hold; an objective of your own that calls a model
                with inputs of another dtype.
            StorageError: the directory has no room for a checkpoint, is not seen by all ranks of a sharded student, or
                holds a run of other settings or no checkpoint that is whole; the last checkpoint or the metrics could
                not be written.
            FastdistillError: the loss is not finite; the message names the likely cause.
            Stopped: a KeyboardInterrupt, on Ctrl-C or SIGTERM.
            Exception: what a callback raises, with a note on where it did, after a checkpoint (of one process; several
                ranks go on from their last).
        """
        directory = None if directory is None else located(directory, "directory")
        if progress is not None:
            arguments.check_function(progress, "progress")
        arguments.check_callbacks(callbacks)
        previews = self._previews
        for name, wanted in {"preview.every": previews is not None, "trackers": self.config.trackers}.items():
            if directory is None and wanted:
                raise InputError.of("directory", f"one for config.{name}", None)
        if self._closed:
            raise InputError.of("trainer", "one that is open", "a closed one")
        self._check_idle()
        arguments.check_surroundings(self.device)
        if changed := differences(self._layout, arguments.layout(self.student)):
            raise InputError.of("student", "weights as when the trainer was made", listed(changed, 3))
        distributed.check_same({"directory": "none" if directory is None else "given"})
        choice = self._chosen(directory)
        self._freeze()
        if not self.student.training:
            self.student.train()
        self._fitting = True
        try:
            with _computing():
                return fit(
                    self.step,
                    self.student,
                    self._fingerprint,
                    self.config,
                    directory,
                    progress,
                    callbacks=callbacks,
                    preview=None if previews is None else lambda done: previews(self.ema_student(), done),
                    teacher=self.teacher,
                    explain=lambda: explain(banks_of(self._setting), self.teacher, self.student),
                    choice=choice,
                )
        except RuntimeError as error:
            if (explained := self._setting.explained(error)) is not None:
                raise explained from error
            raise
        finally:
            self._fitting = False

    def _chosen(self, directory: Path | None) -> Choice | None:
        """Apply the choice of an earlier session of the run; measure the precision if the configuration requires it."""
        config, on_cpu = self.config, self.device.type == "cpu"
        if not on_cpu or not (config.execution == "auto" or config.fuse == "auto" or self._given is not None):
            return None
        choice = None if directory is None else Choice.of(checkpoint.chosen(directory))
        if choice is None and int(self.step.counter[1]):  # an earlier call has begun the run, and all is in place
            return self.step.choice
        if self._given is not None:
            precision = self._faster_precision() if choice is None else choice.precision
            if precision == "bfloat16":
                given, self._given = self._given, None
                self.close()
                low = dataclasses.replace(config, precision=precision)
                DistillTrainer.__init__(self, self.teacher, self.student, config=low, **given)
            choice = dataclasses.replace(choice or Choice(), precision=precision)
        if choice is not None:
            put(open_in(choice, config), self.step, self.student, self.teacher)
        return choice

    def _faster_precision(self) -> Literal["float32", "bfloat16"] | None:
        """The precision in which a step of the student is faster; None if there is no choice."""
        trained = {p.dtype for p in self.student.parameters() if p.requires_grad}
        fixed = self._given is None or self._given["shard"] is not None or shared(self.student, self.teacher)
        if fixed or trained != {torch.float32} or self.config.steps < LEAST:
            return None
        if not distributed.first(lambda: has_bfloat16(self.device)):  # for all ranks, whatever their processors
            return None
        assert self._given is not None
        low = dataclasses.replace(self.config, precision="bfloat16", execution="eager")
        try:
            copied = copy.deepcopy(self.student)
        except Exception:  # for example a module with attributes that cannot be copied
            return None
        with DistillTrainer(self.teacher, copied, config=low, **self._given) as other, _computing():
            own, lower = (Bench(each.step, each.student, each.teacher, self.config) for each in (self, other))
            return faster_precision(own, lower, self.config)

    def close(self) -> None:
        """Remove the trainer's hooks from the models, end its threads, and restore ``requires_grad`` and the training
        modes of the teacher. ``ema_student`` still works, ``fit`` does not."""
        if self._closed:
            return
        self._check_idle()
        self._closed = True
        _open.discard(self)
        with _computing():  # restored weights would otherwise be tensors that no other training can use
            self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_idle(self) -> None:
        if self._fitting:
            raise InputError.of("trainer", "one that is not training", "one inside of its own fit")

    def _freeze(self) -> None:
        self.teacher.eval()
        for parameter in self.teacher.parameters():  # not the module's requires_grad_, which some quantized ones forbid
            if parameter.requires_grad:
                parameter.requires_grad_(False)

    def ema_student(self, to: nn.Module | None = None) -> nn.Module:
        """A copy of the student with the averaged weights, float32 and in eval mode, to sample from and to export.

        Args:
            to: a model like the student to write the weights into, for a student that cannot be copied, such as a
                sharded one; every rank then has to call this.

        Raises:
            InputError: ``to`` has other parameters or buffers than the student (by name and shape) or shares some with
                the student or the teacher, or there is none and the student cannot be copied.
        """
        if to is None:
            rule = "a model of the student's kind to write into"
            if where := sharded(self.student):
                raise InputError.of("to", rule, f"none, and {where}")
            try:
                to = copy.deepcopy(self.student)
            except Exception as error:
                got = f"none, and the student cannot be copied ({quoted(error)})"
                raise InputError.of("to", rule, got) from error
        to = arguments.model(to, "to")
        taken = {storage(t) for model in (self.student, self.teacher) for t in named_tensors(model).values()}
        if names := [name for name, t in named_tensors(to).items() if storage(t) in taken]:
            raise InputError.of("to", "a model of its own", f"one that shares {listed(names)} with student or teacher")
        by_name(named_tensors(self.student), named_tensors(to), "to")
        model = to.to(self.device).float().eval().requires_grad_(False)
        buffers = dict(self.student.named_buffers(remove_duplicate=False))
        with torch.no_grad():
            for name, theirs in model.named_buffers(remove_duplicate=False):
                theirs.copy_(buffers[name])
        self.step.optimizer.copy_average(self.student, model)
        return model

    def save_adapters(self, directory: str | Path, *, adapter: str | None = None, averaged: bool = True) -> None:
        """Write the weights of a student's adapter, without the weights below it, in PEFT's format, float32.

        For a diffusers model with plain LoRA this is ``pytorch_lora_weights.safetensors``, for ``load_lora_weights`` of
        a pipeline and ``load_lora_adapter`` of a model. For others it is ``adapter_config.json`` and
        ``adapter_model.safetensors``, for ``PeftModel.from_pretrained``. Files with these names are replaced. Every
        rank has to call this; rank 0 writes.

        Args:
            directory: made if it does not exist.
            adapter: the name of the adapter (None: the one that is trained).
            averaged: the averages of the weights; False: the weights of the last step.

        Raises:
            InputError: a directory that is no path; a student without adapters, with several, or with other trained
                weights beside them.
            StorageError: the directory cannot be written.
        """
        directory = located(directory, "directory")
        name = peft.chosen(self.student, adapter)
        values = self.step.optimizer.weights(self.student, averaged)
        found = checkpoint.whole(peft.exported(self.student, values, name))
        found = {key: t.float().contiguous() if t.is_floating_point() else t for key, t in found.items()}
        distributed.first(lambda: peft.write(self.student, found, name, directory))


@contextlib.contextmanager
def _computing() -> Iterator[None]:
    """Enable gradients, also inside ``torch.no_grad`` and ``torch.inference_mode``."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
