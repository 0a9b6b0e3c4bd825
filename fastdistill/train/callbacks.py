# SPDX-License-Identifier: Apache-2.0
"""Functions of the user that a run calls between steps, and the protection of the run from their side effects."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from fastdistill.models.taps import release
from fastdistill.train.randomness import seeded
from fastdistill.train.step import TrainStep

Metrics = dict[str, float]
Progress = Callable[[int, Metrics | None], object]
Callbacks = Sequence[tuple[int, Progress]]


class Undisturbed:
    """``with undisturbed(done):`` around a function that is called after ``done`` steps, whatever it does there.

    Afterwards these are as before: the generators of Python, NumPy and torch (the CPU's and the device's), the grad
    mode, torch's default dtype and device, and of teacher, student and adapters the training modes, ``requires_grad``
    and the gradients; what it ran leaves no features in taps. Inside, the generators are seeded by (seed, done), so
    that a continued run draws the same there.
    """

    def __init__(self, step: TrainStep, student: nn.Module, teacher: nn.Module | None, seed: int) -> None:
        self._models = [student, *([] if teacher is None else [teacher])]
        models = [*self._models, *step.objective.trained]
        self._modes = [(module, module.training) for model in models for module in model.modules()]
        self._parameters = [(p, p.requires_grad) for model in models for p in model.parameters()]
        self._seed, self._device = seed, step.counter.device

    @contextlib.contextmanager
    def __call__(self, done: int) -> Iterator[None]:
        gradients = [parameter.grad for parameter, _ in self._parameters]
        with seeded(self._seed, done, device=self._device), _torch_modes():
            try:
                yield
            finally:
                for model in self._models:
                    release(model)
                for module, training in self._modes:
                    if module.training != training:
                        module.training = training
                for (parameter, trained), gradient in zip(self._parameters, gradients, strict=True):
                    if parameter.requires_grad != trained:
                        parameter.requires_grad_(trained)
                    if parameter.grad is not gradient:
                        parameter.grad = gradient


@contextlib.contextmanager
def _torch_modes() -> Iterator[None]:
    grad, dtype, device = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)
