# SPDX-License-Identifier: Apache-2.0
"""Knowledge distillation of outputs and features (BK-SDM, arXiv 2305.15798; arXiv 2504.02011, eq. for L_out and
L_feat).

    L = w_out |T(x_t, c, t) - S(x_t, c, t)|^2 + w_feat sum_l |f_T^l - f_S^l|^2 + w_task |target - S(x_t, c, t)|^2

Each square is a mean over the elements of its tensor; features are summed over taps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdistill.diffusion.matching import match_table
from fastdistill.distill.objective import Setting, cast_inputs, has_streams, predict
from fastdistill.errors import InputError
from fastdistill.models.adapters import Adapters
from fastdistill.models.taps import Taps, channels
from fastdistill.ops import Draw, Task, feature_match, output_match
from fastdistill.ops.feature_match import Distance, gradient_buffer


@dataclass(frozen=True)
class Weights:
    """Weights of the three losses; 0 leaves one out, and with it what only it needs."""

    output: float = 1.0
    feature: float = 1.0
    task: float = 0.0


class Knowledge:
    """Teacher and student side by side on one draw.

    ``taps`` pairs (teacher module, student module). Where their channels differ, a 1x1 adapter projects the student's
    feature; adapters are trained with the student (``trained``) and belong to no export.
    """

    metric_names = ("loss", "output", "feature", "task")

    def __init__(
        self,
        setting: Setting,
        taps: Sequence[tuple[str, str]],
        weights: Weights,
        feature_distance: Distance,
        adapter_seed: int = 0,
    ) -> None:
        if not (weights.output or weights.feature or weights.task):
            raise InputError.of("weights", "at least one loss with a weight above 0", weights)
        if weights.feature and not taps:
            raise InputError.of("taps", "pairs (teacher module, student module) for the feature loss", "none")
        self.teacher, self.student = setting.teacher, setting.student
        self.weights, self.feature_distance = weights, feature_distance
        self.trained: tuple[nn.Module, ...] = ()
        self._zero = torch.zeros((), dtype=torch.float32, device=setting.device)
        self._table = match_table(setting.schedule.coefficients(setting.prediction_type)).to(setting.device)
        self._channels = setting.latents.shape[1]  # a learned variance beside them is left alone
        self._branch: torch.cuda.Stream | None = None  # the teacher's, in a CUDA graph
        if setting.device.type == "cuda":
            self._branch = torch.cuda.Stream(setting.device)  # type: ignore[no-untyped-call]
        self._grad_scale = setting.grad_scale
        self._gradient: Tensor | None = None  # buffers that every step writes into
        self._gradients: list[Tensor] | None = None
        self._taps: tuple[Taps, Taps] | None = None
        self._checked = False
        if weights.feature:
            self._taps = Taps(self.teacher, [t for t, _ in taps]), Taps(self.student, [s for _, s in taps])
            self.adapters = self._make_adapters(setting, taps, adapter_seed)
            self.trained = (self.adapters,)

    def _make_adapters(self, setting: Setting, taps: Sequence[tuple[str, str]], seed: int) -> Adapters:
        assert self._taps is not None
        shapes = []
        for model, tapped in zip((self.teacher, self.student), self._taps, strict=True):
            x, prompt = cast_inputs(model, setting.latents[:1], setting.prompts[:1])
            time = torch.zeros(1, dtype=torch.int64)
            shapes.append(tapped.shapes(x, time, encoder_hidden_states=prompt))
        for (teacher_name, student_name), theirs, own in zip(taps, *shapes, strict=True):
            fits = len(theirs) == len(own) and theirs[2:] == own[2:] if len(own) == 4 else len(theirs) == len(own)
            if not fits:
                rule = f"the size of the teacher's {teacher_name} {theirs}"
                raise InputError.of(f"student tap {student_name}", rule, own)
        pairs = [(channels(own), channels(theirs)) for theirs, own in zip(*shapes, strict=True)]
        return Adapters(pairs, seed=seed).to(setting.device, next(self.student.parameters()).dtype)

    def __call__(self, draw: Draw[Tensor], task: Task | None = None) -> tuple[Tensor, list[Tensor]]:
        """The loss and its parts ``metric_names`` (unweighted, but the first); the task loss needs ``task``."""
        branch = self._branch if has_streams(draw.x_t) else None
        target, theirs = self._teacher(draw, branch) if self.weights.output or self.weights.feature else (None, [])
        x_t, prompt = cast_inputs(self.student, draw.x_t, draw.prompt)
        output = predict(self.student, x_t, draw.timestep, prompt)
        if branch is not None:
            torch.cuda.current_stream(branch.device).wait_stream(branch)
        loss, parts = self._zero, {"output": self._zero, "feature": self._zero, "task": self._zero}
        if (target is not None and self.weights.output) or task is not None:
            if self._gradient is None or self._gradient.shape != output.shape:
                self._gradient = torch.empty_like(output, requires_grad=False, memory_format=torch.contiguous_format)
            loss, (parts["output"], parts["task"]) = self._match(output, target, draw.timestep, task)
        if self.weights.feature:
            parts["feature"] = self._feature_loss(theirs)
            loss = loss + self.weights.feature * parts["feature"]
        return loss, [loss.detach(), *(part.detach() for part in parts.values())]

    def _match(
        self, output: Tensor, target: Tensor | None, timestep: Tensor, task: Task | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss, parts, _ = output_match(
            output,
            target if self.weights.output else None,
            timestep,
            self._table,
            task=task,
            channels=self._channels,
            output_weight=self.weights.output,
            task_weight=self.weights.task,
            grad_scale=self._grad_scale,
            grad=self._gradient,
        )
        return loss, parts.unbind()

    @torch.no_grad()
    def _teacher(self, draw: Draw[Tensor], branch: torch.cuda.Stream | None) -> tuple[Tensor, list[Tensor]]:
        """Output and features, on a stream beside the student's where there is one: whoever reads them waits for it.

        Their memory is that stream's, which does nothing else in a step, so it lasts until the losses have read it.
        """
        if branch is not None:
            branch.wait_stream(torch.cuda.current_stream(branch.device))
        with contextlib.nullcontext() if branch is None else torch.cuda.stream(branch):
            x_t, prompt = cast_inputs(self.teacher, draw.x_t, draw.prompt)
            output = predict(self.teacher, x_t, draw.timestep, prompt)
            return output, self._taps[0].features() if self._taps else []

    def _feature_loss(self, theirs: list[Tensor]) -> Tensor:
        assert self._taps is not None
        own = self._taps[1].features()
        if not self._checked:
            self._taps[1].check_gradients(own)
            self._checked = True
        own = self.adapters(own)
        if self._gradients is None or any(
            g.shape != s.shape or g.stride() != s.stride() for g, s in zip(self._gradients, own, strict=True)
        ):
            self._gradients = [gradient_buffer(s, self.feature_distance) for s in own]
        return feature_match(
            own, theirs, distance=self.feature_distance, grad_scale=self._grad_scale, grads=self._gradients
        ).loss
