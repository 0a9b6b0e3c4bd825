# SPDX-License-Identifier: Apache-2.0
"""Knowledge distillation of outputs and features (BK-SDM, arXiv 2305.15798; arXiv 2504.02011, eq. for L_out and
L_feat).

    L = w_out |T(x_t, c, t) - S(x_t, c, t)|^2 + w_feat sum_l |f_T^l - f_S^l|^2 + w_task |target - S(x_t, c, t)|^2

Each square is a mean over the elements of its tensor; features are summed over taps.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from fastdistill.diffusion.matching import GAMMA, LossWeighting, match_table, named_weights
from fastdistill.diffusion.prompts import Rows, after_null
from fastdistill.distill.objective import Setting, has_streams
from fastdistill.errors import InputError
from fastdistill.models.adapters import Adapters
from fastdistill.models.fuse.repeated import Repeated
from fastdistill.models.taps import Taps, channels
from fastdistill.ops import Draw, FeatureMatch, Task, feature_match, output_match
from fastdistill.ops.feature_match import Distance, gradient_buffer

Taught = tuple[Tensor, Tensor | None, list[Tensor]]  # output, output for the null prompt, features
_WIDEST = 1e6  # maximum of a spread (the teacher's feature may hardly differ)


@dataclass(frozen=True)
class Weights:
    """Weights of the three losses. A loss with weight 0 is not computed."""

    output: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    feature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    task: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class Knowledge:
    """Compares teacher and student on a draw.

    ``null``: the null prompt's row of each bank, by the shape of a latent. If given, the teacher is called with and
    without the prompt, in one batch of 2 B, and the target is guided (``output_match``) by the ``guidance`` of each
    call: a function of its two outputs (c, u) that returns the weight w of each sample [B] float32. Taps see the half
    with the prompt.
    ``loss_weighting``: a name, or weights [T]. ``timestep_cond``: an example for one sample of the student's additional
    input.

    ``taps``: pairs (teacher module, student module). If their channels differ, a linear adapter projects the student's
    feature. Adapters are trained with the student (``trained``) and are not exported.

    ``metric_names``: the loss, its parts, the distance at each tap as ``feature/<student module>``, and
    ``spread/<student module>``: how much its feature differs between two samples, relative to the teacher
    (``_spread``).

    The hooks of the taps exist from the start until ``close``, and again after ``attach``; they are also removed with
    the last reference to this object.

    Raises:
        InputError: no loss to compute; taps that a model does not have or whose sizes differ; a model that cannot
            process the latents and prompts (tested by one forward of the first sample).
    """

    def __init__(
        self,
        setting: Setting,
        taps: Sequence[tuple[str, str]],
        weights: Weights,
        feature_distance: Distance,
        adapter_seed: int = 0,
        loss_weighting: LossWeighting | Tensor = "uniform",
        min_snr_gamma: float = GAMMA,
        null: Mapping[tuple[int, ...], Rows] | None = None,
        timestep_cond: Tensor | None = None,
    ) -> None:
        if not (weights.output or weights.feature or weights.task):
            raise InputError.of("weights", "at least one loss with a weight above 0", weights)
        if weights.feature and not taps:
            raise InputError.of("taps", "pairs (teacher module, student module) for the feature loss", "none")
        self.teacher, self.student = setting.teacher, setting.student
        self.weights, self.feature_distance = weights, feature_distance
        self.trained: tuple[nn.Module, ...] = ()
        self._zero = torch.zeros((), dtype=torch.float32, device=setting.device)
        coefficients = setting.schedule.coefficients(setting.prediction_type)
        if not isinstance(loss_weighting, Tensor):
            loss_weighting = named_weights(
                coefficients, loss_weighting, min_snr_gamma, "loss_weighting", "min_snr_gamma"
            )
        table = match_table(coefficients, weights=loss_weighting, guidance=0.0 if null is None else 1.0)
        self._table, self._null = table.to(setting.device), null
        self._repeated: Repeated | None = None
        if setting.null_once and null is not None:
            self._repeated = Repeated(self.teacher, setting.micro_batch or setting.batch, setting.device)
        self._channels = setting.latents.shape[1]  # the other channels are a learned variance, which is not compared
        self._branch: torch.cuda.Stream | None = None  # the teacher's stream, in a CUDA graph
        if setting.device.type == "cuda":
            self._branch = torch.cuda.Stream(setting.device)  # type: ignore[no-untyped-call]
        self._grad_scale = setting.grad_scale
        self._held: Taught | None = None  # the stored output of a teacher that runs ahead
        self._gradient: Tensor | None = None  # buffers that every step overwrites
        self._gradients: list[Tensor] | None = None
        self._names = list(zip(*taps, strict=True)) if weights.feature else []
        tapped = self._names[1] if self._names else ()
        by_tap = [f"{kind}/{name}" for kind in ("feature", "spread") for name in tapped]
        self.metric_names = ("loss", "output", "feature", "task", *by_tap)
        #: Names of each pair of taps (teacher's first), and the shapes of their features.
        self.tapped: list[tuple[tuple[str, str], tuple[int, ...], tuple[int, ...]]] = []
        self._taps: tuple[Taps, Taps] | None = None
        self._predict_teacher, self._predict_student = setting.predictors
        with contextlib.ExitStack() as failed:  # undone if something does not fit
            failed.callback(self.close)
            self.attach()
            if weights.output or weights.feature:
                setting.check("teacher")
            setting.check("student", timestep_cond)
            if self._taps:
                theirs, own = ([tuple(f.shape) for f in tapped.features()] for tapped in self._taps)
                self.tapped = list(zip(taps, theirs, own, strict=True))
                signals = setting.latents.ndim == 3
                pairs = [_channels(*each, signals) for each in zip(taps, theirs, own, strict=True)]
                self.adapters: Adapters = Adapters(pairs, seed=adapter_seed).to(
                    setting.device, self._predict_student.dtype
                )
                self.trained = (self.adapters,)
            failed.pop_all()

    def attach(self) -> None:
        """Add the hooks to the tapped modules, if they are not there."""
        if self._repeated is not None:
            self._repeated.attach()
        if self._names and self._taps is None:
            with contextlib.ExitStack() as hooks:
                theirs = hooks.enter_context(Taps(self.teacher, self._names[0]))
                self._taps = theirs, hooks.enter_context(Taps(self.student, self._names[1]))
                self._detach = weakref.finalize(self, hooks.pop_all().close)
                self._detach.atexit = False

    def close(self) -> None:
        """Remove the hooks from the models, and release the buffers."""
        self._gradient = self._gradients = self._held = None
        if self._repeated is not None:
            self._repeated.detach()
        if self._taps is not None:
            self._taps = None
            self._detach()

    def __call__(
        self,
        draw: Draw[Any],
        task: Task | None = None,
        guidance: Callable[[Tensor, Tensor], Tensor] | None = None,
        timestep_cond: Tensor | None = None,
        outputs: Callable[[Tensor | None, Tensor], object] | None = None,
        distances: Callable[[Tensor], object] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss, and the values of ``metric_names`` (unweighted except the first). The task loss needs ``task``;
        with ``null``, the output loss needs ``guidance``. ``outputs`` is called with the outputs of teacher and
        student, ``distances`` with the unweighted mean squared difference between the outputs of each sample, [B]."""
        branch = self._branch if has_streams(draw.x_t) else None
        taught: Taught | tuple[None, None, list[Tensor]] = (None, None, [])
        if self._held is not None:
            taught, branch = self._held, None
        elif self.weights.output or self.weights.feature:
            taught = self._teacher(draw, branch)
        target, unconditional, theirs = taught
        output = self._predict_student(draw.x_t, draw.timestep, draw.prompt, timestep_cond)
        if branch is not None:
            torch.cuda.current_stream(branch.device).wait_stream(branch)
        if outputs is not None:
            outputs(target, output)
        loss, parts = self._zero, {"output": self._zero, "feature": self._zero, "task": self._zero}
        if (target is not None and self.weights.output) or task is not None:
            loss, (parts["output"], parts["task"]), samples = self._match(
                output, target, draw.timestep, task, unconditional, guidance
            )
            if distances is not None:
                distances(samples[:, 0])
        taps: tuple[Tensor, ...] = ()
        if self.weights.feature:
            matched, spread = self._match_features(theirs)
            parts["feature"], taps = matched.loss, (*matched.taps.unbind(), *spread.unbind())
            loss = loss + self.weights.feature * parts["feature"]
        return loss, [loss.detach(), *(part.detach() for part in parts.values()), *taps]

    @property
    def taught(self) -> bool:
        return self._held is not None

    @torch.no_grad()
    def teach(self, draw: Draw[Any]) -> None:
        """Store the teacher's output for the batch of the next call."""
        answer = self._teacher(draw, None)
        if self._held is None:
            self._held = _copies(answer)
        else:
            torch._foreach_copy_(_flat(self._held), _flat(answer))

    def _match(
        self,
        output: Tensor,
        target: Tensor | None,
        timestep: Tensor,
        task: Task | None,
        unconditional: Tensor | None,
        guidance: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        if not self.weights.output:
            target = unconditional = None
        w = None
        if target is not None and unconditional is not None and guidance is not None:
            w = guidance(target, unconditional)
        loss, parts, samples = output_match(
            output,
            target,
            timestep,
            self._table,
            unconditional=unconditional,
            guidance=w,
            task=task,
            channels=self._channels,
            output_weight=self.weights.output,
            task_weight=self.weights.task,
            grad_scale=self._grad_scale,
            grad=self._output_gradient(output),
        )
        return loss, parts.unbind(), samples

    def _output_gradient(self, output: Tensor) -> Tensor | None:
        """The buffer for the gradient of the output, created by the first step. Compiled code gets none: it manages its
        memory itself, and a buffer would trigger a new compilation."""
        if torch.compiler.is_compiling():
            return None
        if self._gradient is None or self._gradient.shape != output.shape:
            self._gradient = torch.empty_like(output, requires_grad=False, memory_format=torch.contiguous_format)
        return self._gradient

    def _feature_gradients(self, own: list[Tensor]) -> list[Tensor] | None:
        """The buffers for the gradients of the features."""
        if torch.compiler.is_compiling():
            return None
        if self._gradients is None or any(
            g.shape != s.shape or g.stride() != s.stride() for g, s in zip(self._gradients, own, strict=True)
        ):
            self._gradients = [gradient_buffer(s, self.feature_distance) for s in own]
        return self._gradients

    @torch.no_grad()
    def _teacher(self, draw: Draw[Any], branch: torch.cuda.Stream | None) -> Taught:
        """Output, output for the null prompt (if needed), and features with the prompt. They are computed on
        ``branch``, if given, in parallel to the student; whoever reads them must wait for it.

        Their memory belongs to that stream. It has no other work in a step, so the memory is valid until the losses
        have read it.
        """
        if branch is not None:
            branch.wait_stream(torch.cuda.current_stream(branch.device))
        with contextlib.nullcontext() if branch is None else torch.cuda.stream(branch):
            if self._null is None:
                output = self._predict_teacher(draw.x_t, draw.timestep, draw.prompt)
                return output, None, self._taps[0].features() if self._taps else []
            both = after_null(draw.prompt, self._null[tuple(draw.x_t.shape[1:])])
            if self._repeated is not None:
                self._repeated.on = True
            try:
                output = self._predict_teacher(torch.cat([draw.x_t] * 2), torch.cat([draw.timestep] * 2), both)
            finally:
                if self._repeated is not None:
                    self._repeated.on = False
            unconditional, output = output.chunk(2)
            features = self._taps[0].features() if self._taps else []
            return output, unconditional, [feature.chunk(2)[1] for feature in features]

    def _match_features(self, theirs: list[Tensor]) -> tuple[FeatureMatch, Tensor]:
        if self._taps is None:
            raise InputError("step: expected one that was prepared, got none since the objective was closed")
        own = self._taps[1].features()
        self._taps[1].check_gradients(own)
        spread = _spread(own, theirs)
        own = self.adapters(own)
        matched = feature_match(
            own,
            theirs,
            distance=self.feature_distance,
            grad_scale=self._grad_scale,
            grads=self._feature_gradients(own),
        )
        return matched, spread


def _flat(answer: Taught) -> list[Tensor]:
    output, unconditional, features = answer
    return [output, *([] if unconditional is None else [unconditional]), *features]


def _copies(answer: Taught) -> Taught:
    output, unconditional, features = answer
    return output.clone(), None if unconditional is None else unconditional.clone(), [f.clone() for f in features]


@torch.no_grad()
def _spread(own: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """[taps] float32: the mean square difference of the student's feature between the first two samples, divided by the
    teacher's; 1 if both are 0. A feature that has collapsed (it is the same for all samples) has 0."""
    norms = []
    for features in (own, theirs):
        one, other = ([pair[i] for pair in map(_two, features)] for i in (0, 1))
        differences = torch._foreach_sub(one, other)
        scale = [tensor.numel() ** -0.5 for tensor in one]
        norms.append(torch._foreach_mul(torch._foreach_norm(differences, 2, dtype=torch.float32), scale))
    ratio = torch.stack(norms[0]) / torch.stack(norms[1])
    return ratio.square().nan_to_num(nan=1.0, posinf=_WIDEST).clamp(max=_WIDEST)


def _two(feature: Tensor) -> tuple[Tensor, Tensor]:
    """The features of two samples; for a batch of one, its feature and the mirror image over the positions."""
    first = feature[0]
    return first, feature[1] if len(feature) > 1 else first.flip(-min(2, first.dim()))


def _channels(names: tuple[str, str], theirs: tuple[int, ...], own: tuple[int, ...], signals: bool) -> tuple[int, int]:
    """Channels of the student's and of the teacher's feature; all other sizes must agree.

    ``signals``: latents are [N, C, L], so a feature with three dimensions may be tokens [B, L, C] or a map [B, C, L].
    """
    axis = 2 if len(own) == 3 else 1
    known = 2 <= len(own) <= 5 and not (signals and len(own) == 3)  # is it known where the channels are?
    others = [shape[:axis] + shape[axis + 1 :] for shape in (own, theirs)]
    if len(own) == len(theirs) >= 2 and (own == theirs or (known and others[0] == others[1])):
        return channels(own), channels(theirs)
    rule = f"the size of the teacher's {names[0]} {theirs}"
    if known:
        rule += ", but for the channels (of vectors [B, C], tokens [B, L, C], maps [B, C, H, W] or [B, C, F, H, W])"
    raise InputError.of(f"student tap {names[1]}", rule, own)
