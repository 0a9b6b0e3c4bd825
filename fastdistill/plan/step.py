# SPDX-License-Identifier: Apache-2.0
"""A training step without memory: the trainer's own step, traced on the meta device."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastdistill.diffusion.schedule import PredictionType, Schedule
from fastdistill.distill.objective import Objective, Setting
from fastdistill.models import families, float8
from fastdistill.models.calling import Call
from fastdistill.models.fuse import fuse
from fastdistill.models.students import Student
from fastdistill.plan.trace import Trace, attention_as, phases
from fastdistill.train import arguments, devices
from fastdistill.train.config import TrainConfig
from fastdistill.train.scaling import LossScale
from fastdistill.train.step import TrainStep

META = torch.device("meta")


#: Settings on which a trace depends.
_KINDS = "precision", "fuse", "gradient_checkpointing", "teacher_ahead", "teacher_fp8", "teacher_null_once"
#: Numbers of samples for a trace; one that divides no size of a weight is used.
_UNITS = (61, 59, 53, 47, 43, 41, 37, 31)


@dataclass(frozen=True)
class Traced:
    """A trace, the numbers of parameters of teacher and student (and of the trained ones), the bytes of the weights in
    the student's largest block, and the number that the samples of a part must be a multiple of."""

    trace: Trace
    parameters: dict[str, int]
    block: int
    multiple: int


@dataclass(frozen=True)
class Job:
    """The models and data of a training, by their sizes.

    teacher: creates the teacher on the meta device. student: creates the student from it. latents: [N, *S] and prompts
    [M + 1, ...] by name, on the meta device. device: the type of device to plan for. encoders: bytes of the text
    encoders used during training. stored: whether latents and prompts stay on disk.
    """

    teacher: Callable[[], nn.Module]
    student: Callable[[nn.Module], Student]
    objective: Callable[[Student], Objective]
    schedule: Schedule
    latents: Tensor
    prompts: Mapping[str, Tensor]
    prediction_type: PredictionType
    config: TrainConfig
    teacher_dtype: torch.dtype = torch.bfloat16
    call: Call | None = None
    device: str = "cuda"
    encoders: int = 0
    stored: bool = False
    known: dict[Any, Traced] = field(default_factory=dict, compare=False, repr=False)

    def traced(self, accumulated: bool) -> Traced:
        """A step without memory, with one part, or with two whose gradients are accumulated. This takes seconds; the
        result is kept by the job and by jobs that ``dataclasses.replace`` creates from it."""
        config = self.config
        kind = tuple(getattr(config, name) for name in _KINDS)
        key = accumulated, self.device, self.teacher_dtype, *kind
        if key not in self.known:
            self.known[key] = self._traced(1 + accumulated)
        return self.known[key]

    def _traced(self, parts: int) -> Traced:
        teacher = self.teacher()
        made = self.student(teacher)
        devices.cast(teacher, META, self.teacher_dtype, {})
        if any(not p.requires_grad for p in made.model.parameters()):  # adapters on the teacher's weights
            made = self.student(teacher)
        models = {"teacher": teacher, "student": made.model}
        counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
        counts["trained"] = sum(p.numel() for p in made.model.parameters() if p.requires_grad)
        weights = [p.numel() for model in models.values() for p in model.parameters()]
        unit = next((unit for unit in _UNITS if all(size % unit for size in weights)), _UNITS[0])
        rolling = getattr(self.objective(made), "rolling", None)
        unit *= (multiple := (rolling and rolling.every) or 1)
        with attention_as(self.device), _step(self, teacher, made, unit, parts) as (step, setting):
            step.optimizer.allocate()
            found = trace(step, setting, unit, parts)
            return Traced(found, counts, _largest_block(made.model), multiple)


def _largest_block(model: nn.Module) -> int:
    """Bytes of the weights in the largest element of the module's lists of modules; of all weights without such
    lists."""
    lists = [module for module in model.children() if isinstance(module, nn.ModuleList)]
    blocks = [block for each in lists for block in each] or [model]
    return max(sum(p.nbytes for p in block.parameters()) for block in blocks)


def trace(step: TrainStep, setting: Setting, unit: int = 0, parts: int = 1) -> Trace:
    """The trace of the next step on any device; its optimizer must already have its state."""
    found = Trace(unit, parts)
    step.prepare(1)  # a teacher that runs ahead has computed its output
    hold(found, step, setting)
    objective: Any = step.objective
    draw = objective.draw

    def drawn(counter: Tensor) -> Any:
        found.enter("draw")
        result = draw(counter)
        found.enter("step")
        return result

    hooks = phases(found, setting.teacher, setting.student)
    for parameter in step.parameters:
        hook: Any = parameter.register_post_accumulate_grad_hook
        hooks.append(hook(lambda p: found.hold("gradients", [p.grad])))
    collecting = gc.isenabled()
    gc.disable()  # so that memory is freed only by the step itself
    objective.draw = drawn
    try:
        with found:
            step()
        found.hold("buffers", _buffers(step))
        found.end()
    finally:
        del objective.draw
        for handle in hooks:
            handle.remove()
        if collecting:
            gc.enable()
    return found


def hold(found: Trace, step: TrainStep, setting: Setting) -> None:
    """Label the tensors that a step keeps for the next one."""
    teacher, student = setting.teacher, setting.student
    kept: list[tuple[str, list[Tensor]]] = [("student", _tensors(student)), ("teacher", _tensors(teacher))]
    for kind, label in {"master": "masters", "exp_avg": "moments", "exp_avg_sq": "moments", "ema": "averages"}.items():
        kept.append((label, [state[kind] for state in step.optimizer.state.values() if kind in state]))
    adapters = [t for module in step.objective.trained for t in _tensors(module)]
    own = [step.optimizer.state[p] for p in adapters if p in step.optimizer.state]
    kept.append(("adapters", adapters + [t for state in own for t in state.values()]))
    banks = [setting.latents, setting.latent_prompts, *_leaves(setting.prompts)]
    kept.append(("banks", [bank for bank in banks if isinstance(bank, Tensor)]))
    objective: Any = step.objective
    draws = objective._batches, getattr(objective, "_coming", None)
    kept.append(("draw", _leaves([batches.out for batches in draws if batches is not None])))
    kept.append(("buffers", _buffers(step)))
    for label, tensors in kept:
        found.hold(label, tensors)


def _buffers(step: TrainStep) -> list[Tensor]:
    """Buffers that are created once and kept: gradients of the losses, outputs of a teacher that runs ahead, and the
    tensors of the step itself."""
    knowledge = getattr(step.objective, "_knowledge", None)
    own = [getattr(knowledge, name, None) for name in ("_gradient", "_gradients", "_held")]
    kinds = (getattr(step.objective, kind, {}) for kind in ("state", "common", "sums"))
    kept = [value for kind in kinds for value in kind.values()]
    return _leaves([*own, *kept, step.counter, step.totals, step._rates, step._averages])


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _leaves(tree: Any) -> list[Tensor]:
    leaves = tree_leaves(dict(tree) if isinstance(tree, Mapping) else tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def _step(
    job: Job, teacher: nn.Module, made: Student, micro_batch: int, parts: int
) -> Iterator[tuple[TrainStep, Setting]]:
    """The step that a ``DistillTrainer`` creates, with models on the meta device."""
    student = made.model
    taken = {p.untyped_storage()._cdata: p for p in teacher.parameters()}
    common = {id(p): taken[key] for p in student.parameters() if (key := p.untyped_storage()._cdata) in taken}
    batch = micro_batch * parts
    steps = min(job.config.steps, 2)
    config = dataclasses.replace(
        job.config, batch=batch, micro_batch=micro_batch, steps=steps, execution="eager",
        teacher_ahead=job.config.teacher_ahead and parts == 1,
    )  # fmt: skip
    dtype = arguments.dtype(student, torch.device(job.device), config.precision, common)
    with contextlib.ExitStack() as undo:
        teacher.eval().requires_grad_(False)
        devices.cast(student, META, dtype, common | {id(b): b for b in teacher.buffers()})
        if config.gradient_checkpointing:
            undo.callback(devices.held(student, devices.checkpointed))
        student.train()
        if config.fused(job.device):
            fuse(teacher)
            fuse(student)
        if config.teacher_fp8:
            undo.callback(float8.quantize(teacher, student))
        low = any(p.dtype == torch.float16 for p in student.parameters() if p.requires_grad)
        scaling = LossScale(META) if low else None
        setting = Setting(
            teacher=teacher,
            student=student,
            schedule=job.schedule,
            latents=job.latents,
            latent_prompts=torch.empty(len(job.latents), dtype=torch.int64, device=META),
            prompts=dict(job.prompts),
            batch=batch,
            prediction_type=job.prediction_type,
            ahead=config.ahead,
            grad_scale=scaling.value if scaling else None,
            global_batch=batch,
            micro_batch=micro_batch,
            call=job.call,
            null_once=config.teacher_null_once,
        )
        bound = job.objective(made).bind(setting)
        undo.callback(bound.close)
        step = TrainStep(bound, student, config, META, scaling)
        for model in (teacher, student):
            if family := families.find(model):
                undo.callback(devices.held(model, family.prepare))
        yield step, setting
