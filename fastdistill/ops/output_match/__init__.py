# SPDX-License-Identifier: Apache-2.0
"""Loss and gradient of a student's output in one pass; the targets are never written to memory.

    target_b = from_x_t x_t + from_teacher (c + w (c - u))        c, u: the teacher with and without the prompt
    task_b   = target_signal x + target_noise eps                 eps recomputed from the draw's counter
    loss     = output_weight mean_b(weight_b |s - target_b|^2) + task_weight mean_b(weight_b |s - task_b|^2)

Output and task loss of BK-SDM (arXiv 2305.15798) and Random Conditioning (arXiv 2504.02011); with a guidance weight w,
the target of guidance distillation (Meng et al., arXiv 2210.03142, eq. 1 in the form s_c + w (s_c - s_u)).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistill.errors import InputError
from fastdistill.ops import _check, _native
from fastdistill.ops._backward import apply, hand_on, keep, on_cpu, one, wanted, with_its_kernel
from fastdistill.ops._dispatch import Kernel, Kind, later, register
from fastdistill.ops.noise_gather import Draw
from fastdistill.ops.output_match import cpp, cuda, reference

_output_match = register(
    "output_match",
    "(Tensor student, Tensor teacher, Tensor unconditional, Tensor timestep, Tensor table, Tensor guidance,"
    " Tensor weights, Tensor x_t, Tensor latents, Tensor latent_index, Tensor choice, Tensor coefficients,"
    " Tensor counter, int first_sample, int channels, float output_weight, float task_weight, Tensor grad_scale,"
    " bool huber, float delta, Tensor(a!) loss, Tensor(b!) parts, Tensor(c!) samples, Tensor(d!) grad)",
    summary="a student's output against a guided teacher's and the draw's own target, loss and gradient in one pass",
    reference=reference.output_match,
    kernels=[
        Kernel("cuda", "cuda", cuda.output_match, _native.cuda_reason, cpp.refuse),
        Kernel("triton", "cuda", later(f"{__name__}.triton", "output_match"), _native.triton_reason, cpp.refuse),
        Kernel("cpp", "cpu", cpp.output_match, _native.cpu_reason, cpp.refuse),
    ],
)


class Task(NamedTuple):
    """The arguments of ``noise_gather`` from which the target of a draw can be recomputed."""

    latents: Tensor  # [N, C, *S]: the cache
    latent_index: Tensor  # [B] int64
    choice: Tensor  # [B] int64: samples with a RANDOM prompt have no task loss
    coefficients: Tensor  # [T, 4] float32
    counter: Tensor  # [2] int64: seed and step, as they were at the draw
    first_sample: int = 0

    @classmethod
    def of(cls, draw: Draw[Any], latents: Tensor, coefficients: Tensor, counter: Tensor, first_sample: int = 0) -> Task:
        """The task of a draw that ``noise_gather`` computed from these arguments."""
        return cls(latents, draw.latent_index, draw.choice, coefficients, counter, first_sample)


class OutputMatch(NamedTuple):
    """``loss``: 0-dim float32, differentiable with respect to the student. ``parts``: [2] float32, output and task,
    weighted by sample but not by ``output_weight`` and ``task_weight``. ``samples``: [B, 2] float32, each sample's two
    distances, unweighted."""

    loss: Tensor
    parts: Tensor
    samples: Tensor


def output_match(
    student: Tensor,
    teacher: Tensor | None,
    timestep: Tensor,
    table: Tensor,
    *,
    unconditional: Tensor | None = None,
    guidance: Tensor | None = None,
    weights: Tensor | None = None,
    x_t: Tensor | None = None,
    task: Task | None = None,
    channels: int | None = None,
    output_weight: float = 1.0,
    task_weight: float = 1.0,
    distance: str = "mse",
    delta: float = 1.0,
    grad_scale: Tensor | None = None,
    grad: Tensor | None = None,
) -> OutputMatch:
    """Compute the distance of a student's output from its teacher's and, with a task, from the draw's own target.

    Args:
        student: [B, C, *S], or [B, 2 C, *S] for a model that also learns its variance: the variance channels are
            ignored, with gradient 0. Like teacher, unconditional, x_t and task.latents: float32, bfloat16 or float16.
        teacher: [B, C or 2 C, *S] without gradient, or None for the task loss only.
        timestep: [B] int64.
        table: [T, 5] float32 from ``diffusion.matching.match_table``: guidance weight, factors of x_t and of the
            teacher's prediction that convert it to the student's, weight of the output loss, weight of the task loss.
        unconditional: the teacher's output for the null prompt, of the teacher's shape and dtype; None: no guidance.
        guidance: [B] float32, multiplied with the table's guidance weight; requires unconditional. None: 1.
        weights: [B] float32, multiplied with the table's loss weights; None: 1.
        x_t: [B, C, *S], required if the prediction types of teacher and student differ (``match_table(teacher=...)``).
        task: from ``Task.of``, to recompute the draw's own target; None: no task loss.
        channels: C. None: from x_t, from the task, or from the other model if only one learns its variance; otherwise
            all channels of the student.
        distance: ``"mse"``, or ``"huber"``: d^2 / 2 up to a difference of delta and linear beyond.
        grad_scale: 0-dim float32 tensor on the device: the loss scale by which ``loss`` will be multiplied before
            ``backward``; the gradient is stored multiplied by it, so that float16 does not underflow. None: 1.
        grad: a contiguous buffer like ``student`` for the gradient. ``backward`` passes it to autograd; do not write to
            it before. None: a new buffer.

    Returns:
        ``OutputMatch``; accumulated in float32, the same bits in every run. Tensors that are not contiguous are copied.

    Raises:
        InputError: mismatched shapes, devices or dtypes, a teacher that requires gradient, or (on a CPU) a timestep or
            latent index out of range. On a GPU these are not checked, and the loss is NaN.
    """
    own: tuple[Any, ...] = (None,) * 5
    if task is not None:
        _check.require(isinstance(task, Task), "task", "a Task", type(task).__name__)
        own = task[:5]
    first_sample = 0 if task is None else task.first_sample
    kind = _check.once(
        _checked,
        (student, timestep, table, grad_scale, teacher, unconditional, guidance, weights, x_t, grad, *own),
        (channels, first_sample, distance, delta),
    )
    if grad is not None and not grad.is_contiguous():
        raise InputError.of("grad", _like(student), f"{tuple(grad.shape)} {grad.dtype} {grad.stride()}")
    for name, tensor in (("teacher", teacher), ("unconditional", unconditional)):
        if tensor is not None and tensor.requires_grad:
            rule = "a tensor without gradient (run the teacher under no_grad)"
            raise InputError.of(name, rule, "requires_grad=True")
    _check.constants(
        table=table, guidance=guidance, weights=weights, x_t=x_t, task=own, grad_scale=grad_scale, grad=grad,
        output_weight=output_weight, task_weight=task_weight, delta=delta,
    )  # fmt: skip
    floats, ints = _nothing() if on_cpu(kind) else (table.new_empty(0), timestep.new_empty(0))
    given = (teacher, unconditional, timestep, table, guidance, weights, x_t)
    arguments = (
        *[floats if t is None else t.contiguous() for t in given],
        *([t.contiguous() for t in own] if task else (floats, ints, ints, floats, ints)),
        first_sample, _channels(student, teacher, x_t, task, channels), _check.single(output_weight, "output_weight"),
        _check.single(task_weight, "task_weight"),
    )  # fmt: skip
    options = grad_scale, distance == "huber", float(delta)
    if wanted((student,)):
        return OutputMatch(*apply(kind, _OutputMatch, student, grad, arguments, options))
    with torch.no_grad():
        return OutputMatch(*_launch(kind, student, arguments, options, floats))


@functools.cache
def _nothing() -> tuple[Tensor, Tensor]:
    """On the CPU, placeholders for float and integer tensors that are not given."""
    return torch.empty(0, device="cpu"), torch.empty(0, dtype=torch.int64, device="cpu")


def _channels(
    student: Tensor, teacher: Tensor | None, x_t: Tensor | None, task: Task | None, channels: int | None
) -> int:
    if channels is not None:
        return channels
    if x_t is not None:
        return x_t.size(1)
    if task is not None:
        return task.latents.size(1)
    assert teacher is not None
    return min(student.size(1), teacher.size(1))


_Options = tuple[Tensor | None, bool, float]


def _launch(
    kind: Kind | None, student: Tensor, arguments: tuple[Any, ...], options: _Options, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    table, (grad_scale, *rest) = arguments[3], options
    loss, parts, samples = table.new_empty(()), table.new_empty(2), table.new_empty((student.shape[0], 2))
    if grad_scale is None:
        grad_scale = one(kind, student.device)
    _output_match(kind, student.contiguous(), *arguments, grad_scale, *rest, loss, parts, samples, grad)
    return loss, parts, samples


class _OutputMatch(torch.autograd.Function):
    """The forward computes the gradient; the backward multiplies it by the incoming gradient of the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        kind: Kind | None,
        student: Tensor,
        grad: Tensor | None,
        arguments: tuple[Any, ...],
        options: _Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if grad is None:
            grad = torch.empty_like(student, memory_format=torch.contiguous_format)
        loss, parts, samples = _launch(kind, student, arguments, options, grad)
        keep(ctx, kind, [grad], options[0])
        ctx.mark_non_differentiable(parts, samples)
        return loss, parts, samples

    @staticmethod
    @with_its_kernel
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Any, ...]:
        return None, *hand_on("output_match", ctx, grad_loss), None, None, None


_NAMES = (
    "student timestep table grad_scale teacher unconditional guidance weights x_t grad"
    " task.latents task.latent_index task.choice task.coefficients task.counter"
).split()


def _like(student: Tensor) -> str:
    return f"a contiguous buffer like student {tuple(student.shape)} {student.dtype}"


def _checked(tensors: tuple[Tensor | None, ...], values: tuple[int | None, int, str, float]) -> None:
    channels, first_sample, distance, delta = values
    _check.integers(**{"task.first_sample": first_sample} | ({} if channels is None else {"channels": channels}))
    _check.one_of(distance, "distance", ("mse", "huber"))
    _check.positive(delta, "delta")
    given = {name: t for name, t in zip(_NAMES, tensors, strict=True) if t is not None}
    _check.require("teacher" in given or "task.counter" in given, "teacher", "an output, or a task beside it", None)
    _check.tensors(**dict(zip(_NAMES[:3], tensors[:3], strict=True)) | given)
    student, table = given["student"], given["table"]
    if "guidance" in given:
        rule = "None without unconditional"
        _check.require("unconditional" in given, "guidance", rule, f"a tensor {tuple(given['guidance'].shape)}")
    for name, tensor in given.items():
        _check.device(tensor, name, student.device, "student")
    _check.require(student.dim() >= 2, "student", "[B, C, ...]", tuple(student.shape))
    for name in ("student", "teacher", "unconditional", "x_t", "task.latents"):
        if name in given:
            _check.dtype(given[name], name, *_check.FLOATS)
    batch, size = len(student), student.shape[2:]
    _check.require(table.dim() == 2 and table.size(1) == 5 and len(table) >= 1, "table", "[T, 5]", tuple(table.shape))
    if "grad_scale" in given:
        _check.shape(given["grad_scale"], "grad_scale", (), "a 0-dim tensor")
    for name in ("table", "grad_scale", "guidance", "weights", "task.coefficients"):
        if name in given:
            _check.dtype(given[name], name, torch.float32)
    for name in ("timestep", "task.latent_index", "task.choice", "task.counter"):
        if name in given:
            _check.dtype(given[name], name, torch.int64)
    for name in ("timestep", "guidance", "weights", "task.latent_index", "task.choice"):
        if name in given:
            _check.shape(given[name], name, (batch,), f"one number a sample ({batch},)")
    source = "channels"
    for name in ("x_t", "task.latents", "teacher"):
        if channels is None and name in given and given[name].dim() >= 2:
            channels, source = given[name].size(1), name
            if name == "teacher":
                channels, source = min(channels, student.size(1)), "student or teacher"
    assert channels is not None
    twice = f"the {channels} channels of {source} or, with a learned variance, twice as many"
    fits = student.size(1) == channels or student.size(1) == 2 * channels  # `in` does not work for symbolic sizes
    _check.require(fits, "student", twice, tuple(student.shape))
    _check_rows(given, batch, channels, size, twice)
    if "task.counter" in given:
        _check.shape(given["task.counter"], "task.counter", (2,), "(seed, step), shape (2,)")
        rule = f"one row of 4 a timestep of table ({len(table)}, 4)"
        _check.shape(given["task.coefficients"], "task.coefficients", (len(table), 4), rule)
        rule = f"at least 0, at most 2**32 less the batch ({batch})"
        _check.require(0 <= first_sample <= 2**32 - batch, "task.first_sample", rule, first_sample)
    if "grad" in given:
        grad = given["grad"]
        fits = (grad.shape, grad.dtype) == (student.shape, student.dtype)
        _check.require(fits, "grad", _like(student), f"{tuple(grad.shape)} {grad.dtype} {grad.stride()}")


def _check_rows(given: dict[str, Tensor], batch: int, channels: int, size: torch.Size, twice: str) -> None:
    student = given["student"]
    if "teacher" in given:
        teacher = given["teacher"]
        rule = f"{student.dim()} dimensions, {batch} samples of size {tuple(size)}"
        fits = teacher.dim() == student.dim() and len(teacher) == batch and teacher.shape[2:] == size
        _check.require(fits, "teacher", rule, tuple(teacher.shape))
        fits = teacher.size(1) == channels or teacher.size(1) == 2 * channels
        _check.require(fits, "teacher", twice, tuple(teacher.shape))
    if "unconditional" in given:
        _check.require("teacher" in given, "unconditional", "None without teacher", tuple(given["unconditional"].shape))
        shape, dtype = given["teacher"].shape, given["teacher"].dtype
        _check.shape(given["unconditional"], "unconditional", tuple(shape), f"the shape of teacher {tuple(shape)}")
        _check.dtype(given["unconditional"], "unconditional", dtype)
    if "x_t" in given:
        _check.shape(given["x_t"], "x_t", (batch, channels, *size), f"shape {(batch, channels, *size)}")
    if "task.latents" in given:
        rule, latents = f"[N, {', '.join(f'{n}' for n in (channels, *size))}] with N > 0", given["task.latents"]
        _check.shape(latents, "task.latents", (None, channels, *size), rule)
        _check.require(len(latents) > 0, "task.latents", rule, tuple(latents.shape))
