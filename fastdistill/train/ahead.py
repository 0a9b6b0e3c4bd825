# SPDX-License-Identifier: Apache-2.0
"""The teacher one step ahead: it depends on the counter alone, so its answer for the next step may be found beside the
backward and the update of this one, which it fills where their kernels are small."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdistill.distill.objective import has_streams
from fastdistill.errors import InputError


class TeacherAhead:
    """Every step has the answer that the one before has left (``TrainConfig.teacher_ahead``); the first of a run, and
    one that follows no other, asks for its own. The bits are those of a teacher that is asked in its step.

    Side by side on streams in a CUDA graph; elsewhere one after the other, which gains nothing.

    Raises:
        InputError: an objective that cannot, with its reason.
    """

    def __init__(self, objective: Any, counter: Tensor, parts: int) -> None:
        begin = getattr(objective, "begin_ahead", None)
        reason = "the batch comes in parts (config.micro_batch)" if parts > 1 else None
        if reason is None:
            reason = f"{type(objective).__name__} does not offer it" if begin is None else begin()
        if reason is not None:
            raise InputError.of("config.teacher_ahead", "false", f"true, and {reason}")
        self._objective, self._counter = objective, counter
        self._one = torch.tensor([0, 1], device=counter.device)
        self._coming = torch.empty_like(counter)
        self._branch: torch.cuda.Stream | None = None
        if counter.is_cuda:
            self._branch = torch.cuda.Stream(counter.device)
        self._beside: torch.cuda.Stream | None = None  # what is under way
        self._teach: Callable[[Tensor], None] = objective.teach
        self._held = -1  # the step whose answer is held
        self._due: int | None = None  # the step that was prepared

    def compile(self, backend: str) -> None:
        self._teach = torch.compile(self._objective.teach, dynamic=False, backend=backend)

    def prepare(self, step: int) -> None:
        """Before step number ``step``, outside of what a graph captures."""
        self._due = step
        self._ready()

    def begin(self) -> None:
        """Before what a step executes; while it is captured nothing is."""
        if not _captures(self._counter):
            self._ready()

    def _ready(self) -> None:
        """Ask for the answer of this step where another one's is held: at the start, after a step that failed."""
        if self._objective.taught and self._due in (None, self._held):
            return
        self._teach(self._counter)
        self._held = 0 if self._due is None else self._due

    def ask(self) -> None:
        """Once the losses have read the answer that is held: ask for the next step's, beside what follows."""
        torch.add(self._counter, self._one, out=self._coming)
        self._beside = self._branch if has_streams(self._counter) else None
        if self._beside is not None:
            self._beside.wait_stream(torch.cuda.current_stream(self._beside.device))
        with contextlib.nullcontext() if self._beside is None else torch.cuda.stream(self._beside):
            self._teach(self._coming)
        if not _captures(self._counter):
            self._held += 1

    def join(self) -> None:
        """At the end of a step."""
        if self._beside is not None:
            torch.cuda.current_stream(self._beside.device).wait_stream(self._beside)
        if not _captures(self._counter):
            self._due = None

    def replayed(self) -> None:
        """After a graph has executed a step."""
        self._held, self._due = self._held + 1, None


def _captures(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
