# SPDX-License-Identifier: Apache-2.0
"""Arguments of the losses."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor

from fastdistill.ops import Task, feature_match, output_match, philox
from fastdistill.ops.noise_gather import RANDOM
from tests.fuzz.calls import Call, rounded
from tests.fuzz.tensors import FLOATS, Spec, limited, plain, sizes, small_sizes, spec

DISTANCES = ("mse", "normalized_mse", "huber", "cosine")
NUMBERS = st.sampled_from((1.0, 0.5, 1e-6, 2, 0.0))


def feature_match_call(draw: Any) -> Call:
    taps, distance = draw(st.sampled_from((1, 1, 2, 3))), draw(st.sampled_from(DISTANCES))
    student, teacher = [], []
    for _ in range(taps):
        shape = limited((draw(small_sizes), *draw(st.lists(sizes, max_size=3))))
        student.append(spec(draw, shape))
        teacher.append(plain(spec(draw, shape, student[-1].dtype if draw(st.booleans()) else None, center=0.5)))
    arguments: dict[str, Any] = {
        "student": student,
        "teacher": teacher,
        "distance": distance,
        "eps": draw(st.sampled_from((1e-6, 1e-3))),
        "delta": draw(st.sampled_from((1.0, 0.75))),
    }
    kind = draw(st.integers(0, 2))
    if kind:
        numbers = [0.5 + i for i in range(taps)]
        arguments["weights"] = plain(spec(draw, (taps,), torch.float32, center=1.0)) if kind == 1 else numbers
    if draw(st.booleans()):
        arguments["grad_scale"] = Spec((), torch.float32, scale=0.0, center=8.0)
    written: set[str] = set()
    if draw(st.integers(0, 3)) == 3:
        arguments["overwrite_teacher"] = True
        written = {"teacher"}  # only if the op accepts the call

    def function(grad_scale: Any = None, **given: Any) -> tuple[Tensor, ...]:
        found = feature_match(grad_scale=grad_scale, **given)
        return found.loss, found.taps

    def truth(
        student: Any, teacher: Any, distance: Any, eps: Any, delta: Any, weights: Any = None, **_: Any
    ) -> tuple[Tensor, ...]:
        wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in (*student, *teacher)]
        each = torch.stack([
            rounded(_distance(s, t, distance, eps, delta))
            for s, t in zip(wide[: len(student)], wide[len(student) :], strict=True)
        ])  # fmt: skip
        factors = torch.ones(len(student)) if weights is None else torch.as_tensor(weights, dtype=torch.float32)
        return (factors.to(each.dtype) * each).sum(), each.detach()

    return Call("feature_match", function, arguments, truth, written=frozenset(written), hidden=bool(written))


def _distance(s: Tensor, t: Tensor, distance: str, eps: float, delta: float) -> Tensor:
    if s.numel() == 0:
        return (s * 0).sum()
    if distance == "cosine":
        s, t = s.flatten(1), t.flatten(1)
        norms = rounded(s.norm(dim=1)).clamp(min=eps) * rounded(t.norm(dim=1)).clamp(min=eps)
        return (1 - rounded(rounded(s * t).sum(1) / norms)).mean()
    d = rounded(s - t)
    if distance == "huber":
        return rounded(torch.nn.functional.huber_loss(d, torch.zeros_like(d), delta=delta), d.numel())
    value = rounded(rounded(d.square()).mean(), d.numel())
    return value if distance == "mse" else value / rounded(t.square().mean() + eps, t.numel())


def output_match_call(draw: Any) -> Call:
    batch, channels, size = draw(small_sizes), draw(st.sampled_from((1, 2, 3, 4))), draw(st.lists(sizes, max_size=2))
    size = limited((*size, 32))[:-1]
    steps, rows = draw(st.sampled_from((1, 5))), draw(st.sampled_from((1, 4)))
    mixed = draw(st.booleans())
    dtype = draw(st.sampled_from(FLOATS))

    def of(count: int, twice: bool = False) -> Spec:
        return spec(draw, (count, channels * (1 + twice), *size), None if mixed else dtype)

    teacher, task = draw(st.booleans()), draw(st.booleans())
    arguments: dict[str, Any] = {
        "student": of(batch, draw(st.booleans())),
        "teacher": None,
        "timestep": Spec((batch,), torch.int64, below=steps + (draw(st.integers(0, 15)) == 15)),
        "table": plain(spec(draw, (steps, 5), torch.float32, values="normal")),
        "distance": draw(st.sampled_from(("mse", "huber"))),
        "channels": draw(st.sampled_from((None, channels))),
        "output_weight": draw(NUMBERS),
        "task_weight": draw(NUMBERS),
        "delta": draw(st.sampled_from((1.0, 0.7))),
        "parts": None,
    }
    if teacher or not task:
        arguments["teacher"] = plain(of(batch, draw(st.booleans())))
        if draw(st.booleans()):
            arguments["unconditional"] = arguments["teacher"]
            if draw(st.booleans()):
                arguments["guidance"] = plain(spec(draw, (batch,), torch.float32))
        if draw(st.booleans()):
            arguments["x_t"] = plain(of(batch))
    if draw(st.booleans()):
        arguments["weights"] = plain(spec(draw, (batch,), torch.float32))
    if draw(st.booleans()):
        arguments["grad_scale"] = Spec((), torch.float32, scale=0.0, center=8.0)
    if task:
        arguments["parts"] = [
            plain(of(rows)), Spec((batch,), torch.int64, below=rows), Spec((batch,), torch.int64, below=3),
            plain(spec(draw, (steps, 4), torch.float32, values="normal")), Spec((2,), torch.int64, below=2**40),
            draw(st.sampled_from((0, 5, 2**32 - 4))),
        ]  # fmt: skip

    def function(student: Any, teacher: Any, timestep: Any, table: Any, parts: Any, **given: Any) -> tuple[Tensor, ...]:
        given["task"] = Task(*parts) if isinstance(parts, list) and len(parts) in (5, 6) else parts
        return tuple(output_match(student, teacher, timestep, table, **given))

    return Call("output_match", function, arguments, _output_truth)


def _output_truth(
    student: Tensor, teacher: Any, timestep: Tensor, table: Tensor, parts: Any, distance: str, output_weight: float,
    task_weight: float, delta: float, channels: int | None, unconditional: Any = None, guidance: Any = None,
    x_t: Any = None, weights: Any = None, grad_scale: Any = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    wide = torch.promote_types(student.dtype, torch.float32)
    if channels is None:
        beside = teacher if parts is None else parts[0]
        channels = min(student.shape[1], (beside if x_t is None else x_t).shape[1])
    axes = tuple(range(1, student.dim()))

    def rows(values: Tensor) -> Tensor:
        return values.to(wide).view(-1, *[1] * (student.dim() - 1))

    def distances(target: Tensor) -> Tensor:
        d = rounded(student[:, :channels].to(wide) - target)
        if distance == "huber":
            each = torch.nn.functional.huber_loss(d, torch.zeros_like(d), delta=delta, reduction="none")
        else:
            each = d.square()
        return rounded(each.mean(axes), d[0].numel()) if d.numel() else each.sum(axes)

    guide, from_x_t, from_teacher, *weight = (column for column in table[timestep].to(wide).unbind(1))
    zero = torch.zeros(len(student), dtype=wide)
    found = [zero, zero]
    if teacher is not None:
        target = teacher[:, :channels].to(wide)
        if unconditional is not None:
            w = guide if guidance is None else guide * guidance.to(wide)
            target = rounded(target + rows(w) * (target - unconditional[:, :channels].to(wide)))
        target = rows(from_teacher) * target + (0 if x_t is None else rows(from_x_t) * x_t.to(wide))
        found[0] = distances(rounded(target))
    own = torch.ones_like(zero) if weights is None else weights.to(wide)
    scaled = [weight[0] * own, weight[1] * own]
    if parts is not None:
        latents, index, choice, coefficients, counter, first = parts
        z = philox.normal(counter[0], counter[1], first + torch.arange(len(student)), latents.shape[1:]).to(wide)
        c = coefficients.to(wide)[timestep]
        found[1] = distances(rounded(rows(c[:, 2]) * latents[index].to(wide) + rows(c[:, 3]) * rounded(z)))
        scaled[1] = scaled[1] * (choice != RANDOM)
    count = max(len(student), 1)
    both = [rounded(s * f).sum() / count for s, f in zip(scaled, found, strict=True)]
    loss = output_weight * both[0] + task_weight * both[1]
    return loss, torch.stack(both).detach(), torch.stack(found, 1).detach()
