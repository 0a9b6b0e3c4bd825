# SPDX-License-Identifier: Apache-2.0
"""The models of a run: teacher and student at its start, and the student of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.data.fingerprint import listed
from fastdistill.errors import InputError, StorageError
from fastdistill.models import Adapters, Student
from fastdistill.models.peft import left_out
from fastdistill.runs.opened import Run
from fastdistill.train import checkpoint


def teacher_and_student(run: Run) -> tuple[Any, Student]:
    """The teacher in its dtype and the student in float32, on the run's device.

    The student's weights come from the folder's weights, before the teacher is cast; a student with adapters on the
    teacher shares the teacher's weights.
    """
    settings, dtype = run.config.student, run.teacher_dtype
    if settings.lora.rank is not None or dtype == torch.float32:
        teacher = run.pipeline.model(device=run.config.device, dtype=dtype)
        return teacher, run.student(teacher, seed=run.config.seed)
    student = run.student(run.pipeline.model(), seed=run.config.seed)
    return run.pipeline.model(device=run.config.device, dtype=dtype), student


def require_checkpoint(run: Run, step: int | None = None) -> None:
    """StorageError if the run has no checkpoint, InputError if it has none of this step."""
    found = checkpoint.steps(run.directory)
    if not found:
        raise StorageError(f"{run.directory}: expected a checkpoint of the run (fastdistill distill), got none")
    if step is not None and step not in found:
        raise InputError.of("step", f"a checkpoint of {run.directory}: {', '.join(map(str, found))}", step)


def checkpoint_of(run: Run, step: int | None = None) -> tuple[Path, checkpoint.Checkpoint, dict[str, Any]]:
    """The newest complete checkpoint of a run, or that of a step: its file, the checkpoint, the fingerprint of its run.

    Raises:
        StorageError: there is none, or it is damaged.
        InputError: there is none of this step.
    """
    require_checkpoint(run, step)
    if step is not None:
        path = checkpoint.steps(run.directory)[step]
        return path, *checkpoint.read(path)
    found = checkpoint.newest(run.directory)
    assert found is not None
    return found


def trained_student(run: Run, *, step: int | None = None, averaged: bool = True) -> Any:
    """The student of a checkpoint, float32 and in eval mode on the run's device. Only the checkpoint is needed, and for
    adapters the teacher's weights below them.

    Args:
        step: of the checkpoint; None: the newest. averaged: the averaged weights; False: the weights of that step.

    Raises:
        StorageError: no checkpoint, a damaged one, or one of another student.
        InputError: no checkpoint of this step.
    """
    path, saved, _ = checkpoint_of(run, step)
    return student_in(run, path, saved, averaged)


def student_in(run: Run, path: Path, saved: checkpoint.Checkpoint, averaged: bool) -> Any:
    """Like ``trained_student``, for a checkpoint that was read from ``path``."""
    adapted = run.config.student.lora.rank is not None
    model: Any = run.student(run.pipeline.model(device="cpu" if adapted else "meta")).model
    if not adapted:  # with the buffers that are not stored
        with torch.random.fork_rng(devices=[]):
            model = type(model).from_config(dict(model.config))
    places = _places(model, saved.outline, "student", averaged)
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out(model)}
    if wrong := _unlike(own, places, saved):
        rule = f"the student of the run file ({run.student_spec})"
        raise StorageError(f"{path}: expected {rule}, got another one (in {listed(sorted(wrong), 3)})")
    _load(model, places, saved)
    return model.to(run.config.device).float().eval().requires_grad_(False)


def adapters_in(run: Run, path: Path, saved: checkpoint.Checkpoint, channels: Sequence[tuple[int, int]]) -> Adapters:
    """The averaged adapters of a checkpoint that was read from ``path``, for features with these (student channels,
    teacher channels), float32 on the run's device.

    Raises:
        StorageError: the run has no adapters with these channels.
    """
    adapters = Adapters(channels)
    places = _places(adapters, saved.outline, "trained.0", averaged=True)
    if _unlike(adapters.state_dict(), places, saved):
        raise StorageError(f"{path}: expected adapters of the student's features, got others or none")
    _load(adapters, places, saved)
    return adapters.to(run.config.device).float().eval().requires_grad_(False)


def _places(model: nn.Module, outline: Mapping[str, Any], kind: str, averaged: bool) -> dict[str, str]:
    """For the weights and buffers of a trained module (``student``, ``trained.0``): name in its ``state_dict`` -> name
    in a checkpoint."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}  # the first name of tied weights
    found: dict[str, str] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        trained = f"optimizer.{kind}.{names.get(id(tensor))}"
        values = ("ema", "master") if averaged else ("master",)
        places = [*(f"{trained}.{value}" for value in values), f"{kind}.{key}"]
        if (place := next((place for place in places if place in outline), None)) is not None:
            found[key] = place
    extra = {name.removeprefix(f"{kind}.") for name in outline if name.startswith(f"{kind}.")} - found.keys()
    return found | {name: f"{kind}.{name}" for name in extra}


def _unlike(own: Mapping[str, Any], places: Mapping[str, str], saved: checkpoint.Checkpoint) -> list[str]:
    """Names that only the module or only the checkpoint has, or that have different shapes."""
    theirs = {name: saved.outline[place] for name, place in places.items()}
    return [name for name in own.keys() | theirs.keys() if _shape(own.get(name)) != _shape(theirs.get(name))]


def _load(model: nn.Module, places: Mapping[str, str], saved: checkpoint.Checkpoint) -> None:
    """Fill the module tensor by tensor; a tensor that is in several files needs additional memory."""
    own, others = model.state_dict(), {}
    for name, place in places.items():
        value = saved.state[place]
        if isinstance(value, Tensor) and not name.endswith("_extra_state"):
            own[name].copy_(value)
        else:
            others[name] = value
    model.load_state_dict(others, strict=False)


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value)
