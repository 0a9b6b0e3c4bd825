# SPDX-License-Identifier: Apache-2.0
"""What a configuration changes in how the frozen teacher computes: linear layers in float8 (``teacher_fp8``), and how
far its target moves by that; the null prompt projected once (``teacher_null_once``)."""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from fastdistill.data.encoded import rows_of
from fastdistill.data.staged import Batches
from fastdistill.diffusion.prompts import after_null
from fastdistill.distill.objective import Objective, Setting
from fastdistill.errors import InputError
from fastdistill.models import families, float8
from fastdistill.models.calling import trial
from fastdistill.models.fuse.form import is_fused
from fastdistill.ops import Draw
from fastdistill.ops.noise_gather.banks import listed
from fastdistill.train import distributed
from fastdistill.train.config import TrainConfig

logger = logging.getLogger(__name__)
SAMPLES = 8  # of a measurement
_OWN_KEY = 0x464C4F4154  # of its draws, which are no steps of a run


def check_float8(teacher: nn.Module, config: TrainConfig, device: torch.device) -> None:
    """InputError where this configuration has a teacher in float8 and cannot."""
    if not config.teacher_fp8:
        return
    if (reason := float8.refuse(device)) is not None:
        raise InputError.of("config.teacher_fp8", "false", f"true, and {reason}")
    if config.precision == "measured":
        rule = "false with precision 'measured', which makes the trainer anew from the teacher"
        raise InputError.of("config.teacher_fp8", rule, True)
    if any(isinstance(module, float8.Float8Linear) for module in teacher.modules()):
        raise InputError.of("teacher", "one whose layers are not in float8 already", "such a one")
    float8.layers_of(teacher)


def check_others(teacher: nn.Module, config: TrainConfig, others: Iterable[Any]) -> None:
    """InputError where a teacher would be in float8 for one of two open trainers alone. ``others``: open trainers."""

    def has_it() -> bool:
        here = [other for other in others if families.unwrapped(other.teacher) is families.unwrapped(teacher)]
        return any(config.teacher_fp8 or other.config.teacher_fp8 for other in here)

    if has_it():
        gc.collect()  # those that nobody can close any more
        if has_it():
            rule = "one that no other trainer has, if it is in float8 for one of them (close that one first)"
            raise InputError.of("teacher", rule, "such a one")


def check_null_once(bound: object, teacher: nn.Module, config: TrainConfig, device: torch.device) -> None:
    """InputError where this configuration projects the null prompt once, and there is none or no way to."""
    if not config.teacher_null_once:
        return
    reason = None
    if not getattr(bound, "guided", False):
        reason = "the objective asks for no answers to the null prompt beside others (GuidanceDistillation does)"
    elif not config.fused(device.type):
        reason = "the models are not fused (fuse)"
    elif not any(isinstance(m, Attention) and m.is_cross_attention and is_fused(m) for m in teacher.modules()):
        reason = f"{type(families.unwrapped(teacher)).__name__} has no fused attention to the prompt alone"
    if reason is not None:
        raise InputError.of("config.teacher_null_once", "false", f"true, and {reason}")


def in_float8(setting: Setting, objective: Objective) -> tuple[Callable[[], None], str]:
    """Put the teacher's linear layers in float8. Returns what undoes it, and a line on how far the target moves.

    Raises:
        InputError: the student has modules of the teacher.
    """
    batch = _samples(setting, objective)
    before = _target(*batch)
    undo = float8.quantize(setting.teacher, setting.student)
    try:
        changed = _target(*batch) - before
        moved = math.sqrt(float(changed.square().mean()) / max(float(before.square().mean()), 1e-300))
        count = sum(isinstance(module, float8.Float8Linear) for module in setting.teacher.modules())
        line = (
            f"fp8 teacher: target changes by {100 * moved:.3g} % (relative RMS, measured on {len(before)} samples;"
            f" {count} linear layers in float8{', emulated on a CPU' if setting.device.type == 'cpu' else ''})"
        )
        if distributed.rank() == 0:
            logger.info(line)
    except BaseException:
        undo()
        raise
    return undo, line


def _samples(setting: Setting, objective: Objective) -> tuple[Setting, Draw[Any], Any, Any]:
    """The setting as the objective has it, a draw for which it depends on nothing else, and of a guided target the
    weights and the null prompt's rows."""
    guiding, weights = getattr(objective, "guiding", None), None
    if guiding is not None:
        setting, weights = guiding(setting)
    whole = dataclasses.replace(
        setting, batch=SAMPLES, global_batch=None, first_sample=0, micro_batch=None, others=(), trajectory=None, ahead=1
    )
    coefficients = setting.schedule.coefficients(setting.prediction_type)
    if setting.trajectory is not None:  # states as they are stored
        coefficients = torch.zeros_like(coefficients)
        coefficients[:, 0] = 1
    never = torch.zeros(len(coefficients), dtype=torch.int64)
    batches = whole.batches(never, coefficients, null_probability=0.0, with_replacement=True)
    assert isinstance(batches, Batches)
    batches.prepare(_OWN_KEY, 0)
    draw = batches(torch.tensor([_OWN_KEY, 0], device=setting.device))
    batches.close()
    if setting.trajectory is not None:
        draw = draw.replaced(timestep=setting.trajectory.step.index_select(0, draw.latent_index))
    null = None
    if weights is not None:
        row = len(listed(setting.prompts)[0]) - 1
        null = rows_of(setting.prompts, slice(row, row + 1), setting.device)
    return setting, draw, weights, null


@torch.no_grad()
def _target(setting: Setting, draw: Draw[Any], weights: Any, null: Any) -> Tensor:
    """What the student would learn from, float64; not more samples at once than a step has."""
    each = min(SAMPLES, setting.micro_batch or setting.batch)
    with trial(setting.teacher):
        parts = [draw.part(first, min(first + each, SAMPLES)) for first in range(0, SAMPLES, each)]
        return torch.cat([_of_part(setting, part, weights, null) for part in parts])


def _of_part(setting: Setting, draw: Draw[Any], weights: Any, null: Any) -> Tensor:
    x_t, timestep, channels = draw.x_t, draw.timestep, draw.x_t.shape[1]
    if weights is None:
        return setting.predict(setting.teacher, x_t, timestep, draw.prompt)[:, :channels].double()
    both = after_null(draw.prompt, null)
    output = setting.predict(setting.teacher, torch.cat([x_t] * 2), torch.cat([timestep] * 2), both)
    unconditional, conditional = (half[:, :channels].double() for half in output.chunk(2))
    w = weights(conditional, unconditional, timestep, torch.ones_like(timestep, dtype=torch.float32))
    target: Tensor = conditional + w.double().reshape(-1, *[1] * (x_t.ndim - 1)) * (conditional - unconditional)
    return target
