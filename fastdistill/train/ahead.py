# SPDX-License-Identifier: Apache-2.0
"""Runs the teacher one step ahead. Its output for the next step depends only on the counter, so it can be computed
during the backward and the update of the current step, when small kernels leave the GPU partly idle."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdistill.distill.objective import has_streams
from fastdistill.errors import InputError


class TeacherAhead:
    """Each step uses the output that the previous step computed (``TrainConfig.teacher_ahead``); the first step of a
    run, or one without a direct predecessor, computes its own. The bits are the same as without this class, except
    in a compiled step: the teacher is compiled separately there and rounds differently.

    In a CUDA graph both run in parallel on two streams; elsewhere one after the other, which gains nothing.

    Raises:
        InputError: the objective does not support this; the message gives the reason.
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
        self._beside: torch.cuda.Stream | None = None  # stream of the running forward
        self._teach: Callable[[Tensor], None] = objective.teach
        self._held = -1  # the step to which the stored output belongs
        self._due: int | None = None  # the step that was prepared

    def compile(self, backend: str) -> None:
        self._teach = torch.compile(self._objective.teach, dynamic=False, backend=backend)

    def prepare(self, step: int) -> None:
        """Call before step number ``step``, outside of a captured graph."""
        self._due = step
        self._ready()

    def begin(self) -> None:
        """Call at the start of a step; does nothing during the capture of a graph."""
        if not _captures(self._counter):
            self._ready()

    def _ready(self) -> None:
        """Compute this step's output if the stored one belongs to another: at the start, or after a failed step."""
        if self._objective.taught and self._due in (None, self._held):
            return
        self._teach(self._counter)
        self._held = 0 if self._due is None else self._due

    def ask(self) -> None:
        """Call after the losses have read the stored output: start the next step's forward, in parallel to the rest."""
        torch.add(self._counter, self._one, out=self._coming)
        self._beside = self._branch if has_streams(self._counter) else None
        if self._beside is not None:
            self._beside.wait_stream(torch.cuda.current_stream(self._beside.device))
        with contextlib.nullcontext() if self._beside is None else torch.cuda.stream(self._beside):
            self._teach(self._coming)
        if not _captures(self._counter):
            self._held += 1

    def join(self) -> None:
        """Call at the end of a step: wait for the forward."""
        if self._beside is not None:
            torch.cuda.current_stream(self._beside.device).wait_stream(self._beside)
        if not _captures(self._counter):
            self._due = None

    def replayed(self) -> None:
        """Call after a graph has executed a step."""
        self._held, self._due = self._held + 1, None


def _captures(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
