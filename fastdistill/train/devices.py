# SPDX-License-Identifier: Apache-2.0
"""The device of a run: check it, move and cast the models, and change models temporarily."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fastdistill.errors import InputError, described, quoted
from fastdistill.models.calling import kept_in_float32

Change = Callable[[nn.Module], Callable[[], None]]
_held: weakref.WeakKeyDictionary[nn.Module, dict[Change, tuple[Callable[[], None], int]]] = weakref.WeakKeyDictionary()


def usable(device: Any, argument: str = "device") -> torch.device:
    """The device, after a test that torch can compute on it.

    Raises:
        InputError: it is not a device, or this installation or machine cannot compute on it.
    """
    try:
        found = torch.device(device)
        torch.empty(1, device=found).cpu()
    except (TypeError, RuntimeError, AssertionError, NotImplementedError) as error:  # an AssertionError without CUDA
        rule = "a device that torch can use here, such as 'cpu'"
        raise InputError.of(argument, rule, f"{described(device)} ({quoted(error)})") from error
    return found


def moved(model: nn.Module, device: torch.device, argument: str) -> nn.Module:
    """Moves a model to a device without a change of dtypes. If it is already there, an error is ignored, because some
    quantized models forbid ``to``.

    Raises:
        InputError: the model cannot be moved.
    """
    try:
        model.to(device)
    except Exception as error:
        tensors = itertools.chain(model.parameters(), model.buffers())
        if any(t.device.type != device.type or device.index not in (None, t.device.index) for t in tensors):
            raise InputError.of(argument, f"a model that can be moved to {device}", quoted(error)) from error
    return model


def cast(model: nn.Module, device: torch.device, dtype: torch.dtype | None, shared: Mapping[int, torch.Tensor]) -> None:
    """Move a model and cast its weights (None: keep their dtypes), except the weights that diffusers keeps in float32
    and the weights that it shares with a model on the device (``models.weights.shared``); these stay shared.

    This does not use diffusers' ``to``, because that would cast these weights too.
    """
    kept = kept_in_float32(model)
    model.zero_grad(set_to_none=True)  # gradients from before this run

    def place(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in shared:
            return shared[id(tensor)].detach()
        fixed = id(tensor) in kept or not tensor.is_floating_point()
        return tensor.to(device, None if fixed else dtype)

    model._apply(place)


def held(model: nn.Module, change: Change) -> Callable[[], None]:
    """Change a model, unless another trainer has already made this change. Returns a function that releases it; the
    last release, in any order, undoes the change."""
    of_model = _held.setdefault(model, {})
    undo = of_model[change][0] if change in of_model else change(model)
    of_model[change] = undo, of_model.get(change, (undo, 0))[1] + 1

    def let_go() -> None:
        count = of_model[change][1] - 1
        if count:
            of_model[change] = undo, count
        else:
            del of_model[change]
            undo()

    return let_go


def checkpointed(student: nn.Module) -> Callable[[], None]:
    """Enable diffusers' gradient checkpointing; returns a function that undoes this.

    Raises:
        InputError: the student does not support it.
    """
    try:
        was = bool(student.is_gradient_checkpointing)
        student.enable_gradient_checkpointing()  # type: ignore[operator]
    except (AttributeError, ValueError) as error:
        rule = "a diffusers model that can be checkpointed (config.gradient_checkpointing)"
        raise InputError.of("student", rule, type(student).__name__) from error
    own = weakref.ref(student)

    def undo() -> None:
        if not was and (model := own()) is not None:
            model.disable_gradient_checkpointing()  # type: ignore[operator]

    return undo


def given_back(trainable: list[tuple[nn.Parameter, bool]], modes: list[tuple[nn.Module, bool]]) -> None:
    """Restore ``requires_grad`` and the training modes of the teacher."""
    for parameter, before in trainable:
        if before:
            parameter.requires_grad_(True)
    for module, training in modes:
        module.training = training
