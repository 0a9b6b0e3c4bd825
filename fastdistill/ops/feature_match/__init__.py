# SPDX-License-Identifier: Apache-2.0
"""The feature loss of all taps of a step in one launch, with its gradient in the same pass.

    loss = sum_l weight_l * distance(student_l, teacher_l)

Random Conditioning (arXiv 2504.02011) and BK-SDM (arXiv 2305.15798) use the plain mean square with all weights 1.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistill.errors import InputError, described
from fastdistill.ops import _check, _native
from fastdistill.ops._backward import apply, hand_on, keep, on_cpu, one, wanted, with_its_kernel
from fastdistill.ops._dispatch import Kernel, Kind, later, register
from fastdistill.ops.feature_match import cpp, cuda, reference
from fastdistill.ops.feature_match.reference import DISTANCES
from fastdistill.ops.feature_match.reference import Distance as Distance

_feature_match = register(
    "feature_match",
    "(Tensor[] student, Tensor[] teacher, Tensor weights, Tensor grad_scale, int distance, float parameter,"
    " Tensor(a!) loss, Tensor(b!) taps, Tensor(c!)[] grads)",
    summary="sum_l weight_l * distance(student_l, teacher_l) of all taps, loss and gradient in one launch",
    reference=reference.feature_match,
    kernels=[
        Kernel("cuda", "cuda", cuda.feature_match, _native.cuda_reason, cpp.refuse),
        Kernel("triton", "cuda", later(f"{__name__}.triton", "feature_match"), _native.triton_reason, cpp.refuse),
        Kernel("cpp", "cpu", cpp.feature_match, _native.cpu_reason, cpp.refuse),
    ],
)
register(
    "scale_gradients",
    "(Tensor(a!)[] grads, Tensor factor)",
    summary="gradients times a device scalar, in place; no work when it is 1",
    reference=reference.scale_gradients,
    kernels=[
        Kernel("cuda", "cuda", cuda.scale_gradients, _native.cuda_reason, cpp.refuse_scale),
        Kernel(
            "triton", "cuda", later(f"{__name__}.triton", "scale_gradients"), _native.triton_reason, cpp.refuse_scale
        ),
        Kernel("cpp", "cpu", cpp.scale_gradients, _native.cpu_reason, cpp.refuse_scale),
    ],
)

TAPS = "a list of tensors, one a tap"


class FeatureMatch(NamedTuple):
    """``loss``: 0-dim float32, differentiable with respect to the student. ``taps``: [L] float32, the unweighted loss
    of each tap, for logging."""

    loss: Tensor
    taps: Tensor


def feature_match(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    weights: Sequence[float] | Tensor | None = None,
    distance: Distance = "mse",
    grad_scale: Tensor | None = None,
    eps: float = 1e-6,
    delta: float = 1.0,
    grads: Sequence[Tensor] | None = None,
    overwrite_teacher: bool = False,
) -> FeatureMatch:
    """Compute the distance of a student's features from those of a frozen teacher, for all taps at once.

    Args:
        student: L tensors of any shape (cosine: two dimensions or more), float32, bfloat16 or float16, any dense
            layout.
        teacher: L tensors of the same shapes on the same device, without gradient; dtypes may differ from the
            student's.
        weights: L floats, or a float32 tensor [L] on the device (None: all 1; pass a tensor inside a CUDA graph).
        distance: ``"mse"``, mean((s - t)^2); ``"normalized_mse"``, the same divided by mean(t^2) + eps, so that no tap
            dominates the sum; ``"huber"``, (s - t)^2 / 2 up to a difference of delta and linear beyond
            (``torch.nn.functional.huber_loss``); or ``"cosine"``, the mean over samples (the first dimension) of
            1 - s.t / (max(|s|, eps) max(|t|, eps)), ``torch.nn.functional.cosine_similarity`` with all of a sample's
            features as one vector. To compare tokens one by one, make them samples: ``tokens.flatten(0, 1)``.
        eps: > 0 for cosine. If the norm of a student's sample is below eps, its gradient is -t / (eps max(|t|, eps)),
            which follows from the formula (torch's own has another term); it is 0 if the teacher is 0.
        delta: > 0, for huber.
        grad_scale: 0-dim float32 tensor on the device: the loss scale by which ``loss`` will be multiplied before
            ``backward``. The gradient is stored already multiplied by it, so that float16 gradients do not underflow.
            None: 1.
        grads: L buffers like ``student`` for the gradient, so that a training step can reuse them. ``backward`` passes
            them to autograd; do not write to them before. ``gradient_buffer`` creates one. None: new buffers.
        overwrite_teacher: write the gradient over the teacher's features, which are lost after the call; this saves as
            much memory as the taps need. Each teacher feature must be dense (cosine: sample after sample), have the
            student's dtype and strides, and share its memory with no other tap.

    Returns:
        ``FeatureMatch(loss, taps)``; accumulated in float32, the same bits in every run and for any number of threads.

    Raises:
        InputError: mismatched counts, shapes, devices or dtypes, or a teacher that requires gradient.
    """
    student, teacher = (_check.listed(t, name, TAPS) for t, name in ((student, "student"), (teacher, "teacher")))
    factors = weights if isinstance(weights, Tensor) else None
    buffers = None if grads is None else _check.listed(grads, "grads", "a list of buffers, one a tap")
    kind = _check.once(
        _checked,
        (factors, grad_scale, *student, *teacher, *(buffers or ())),
        (len(student), len(teacher), None if buffers is None else len(buffers), distance, eps, delta),
    )
    for i, t in enumerate(teacher):
        if t.requires_grad:
            rule = "a tensor without gradient (run the teacher under no_grad)"
            raise InputError.of(f"teacher[{i}]", rule, "requires_grad=True")
    _check.flag(overwrite_teacher, "overwrite_teacher")
    _check.constants(weights=weights, grad_scale=grad_scale, grads=buffers, eps=eps, delta=delta)
    device = student[0].device
    if weights is None:
        count = len(student)
        factors = _ones(count) if on_cpu(kind) else torch.ones(count, dtype=torch.float32, device=device)
    elif factors is None:
        listed, rule = isinstance(weights, Iterable), f"a list of {len(student)} floats, one a tap"
        _check.require(listed, "weights", rule, described(weights))
        try:
            factors = torch.tensor(list(weights), dtype=torch.float32, device=device)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise InputError.of("weights", rule, described(weights)) from None
        _check.shape(factors, "weights", (len(student),), f"one weight a tap ({len(student)},)")
    else:
        factors = factors.contiguous()  # strides are not checked again after a kernel was chosen
    parameter = delta if distance == "huber" else eps
    if wanted(student):
        if overwrite_teacher:
            _check.require(buffers is None, "grads", "None beside overwrite_teacher", f"{len(student)} buffers")
            _check_overwritten(student, teacher, distance)
            buffers = [t.detach() for t in teacher]
        options = len(student), buffers, factors, grad_scale, distance, parameter
        return FeatureMatch(*apply(kind, _FeatureMatch, options, *student, *teacher))
    dense = [_dense(s.detach(), distance) for s in student]
    return FeatureMatch(*_launch(kind, dense, teacher, factors, grad_scale, distance, parameter, []))


@functools.cache
def _ones(count: int) -> Tensor:
    """Default weights on the CPU; never written to."""
    return torch.ones(count, dtype=torch.float32, device="cpu")


def gradient_buffer(student: Tensor, distance: Distance = "mse") -> Tensor:
    """An uninitialized buffer for ``grads``. Its strides are those of the student if it is dense (cosine: sample after
    sample), else those of the student's dense copy."""
    layout = torch.preserve_format if _is_flat(student, distance) else torch.contiguous_format
    return torch.empty_like(student, memory_format=layout, requires_grad=False)


def _checked(tensors: tuple[Any, ...], values: tuple[int, int, int | None, str, float, float]) -> None:
    require = _check.require
    taps, others, buffers, distance, eps, delta = values
    weights, grad_scale, *features = tensors
    student, teacher, grads = features[:taps], features[taps : taps + others], features[taps + others :]
    require(taps > 0, "student", "at least one tap", "none")
    require(others == taps, "teacher", f"as many taps as student ({taps})", others)
    _check.one_of(distance, "distance", list(DISTANCES))
    _check.positive(delta, "delta")
    require(_check.single(eps, "eps") > 0 or distance != "cosine", "eps", "a number > 0", eps)
    device = student[0].device
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        require(s.dim() > 1 or distance != "cosine", f"student[{i}]", "samples of features, [B, ...]", tuple(s.shape))
        _check.dtype(s, f"student[{i}]", *_check.FLOATS)
        _check.dtype(t, f"teacher[{i}]", *_check.FLOATS)
        require(t.shape == s.shape, f"teacher[{i}]", f"the shape of student[{i}] {tuple(s.shape)}", tuple(t.shape))
        _check.device(s, f"student[{i}]", device, "student[0]")
        _check.device(t, f"teacher[{i}]", device, "student[0]")
    if buffers is not None:
        require(buffers == taps, "grads", f"as many buffers as student ({taps})", buffers)
        for i, (g, s) in enumerate(zip(grads, student, strict=True)):
            fits = (g.shape, g.dtype, g.device) == (s.shape, s.dtype, s.device)
            rule = f"a buffer like student[{i}] {tuple(s.shape)} {s.dtype}"
            require(fits, f"grads[{i}]", rule, f"{tuple(g.shape)} {g.dtype}")
    if weights is not None:
        _check.shape(weights, "weights", (taps,), f"one weight a tap ({taps},)")
        _check.dtype(weights, "weights", torch.float32)
        _check.device(weights, "weights", device, "student[0]")
    if grad_scale is not None:
        _check.tensors(grad_scale=grad_scale)
        _check.shape(grad_scale, "grad_scale", (), "a 0-dim tensor")
        _check.dtype(grad_scale, "grad_scale", torch.float32)
        _check.device(grad_scale, "grad_scale", device, "student[0]")


def _check_overwritten(student: list[Tensor], teacher: list[Tensor], distance: str) -> None:
    """A gradient may overwrite a teacher's feature only if no other data is lost."""
    seen: dict[int, str] = {}
    for i, s in enumerate(student):
        seen[s.untyped_storage()._cdata] = f"student[{i}]"
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        name = f"teacher[{i}]"
        _check.require(t.dtype == s.dtype, name, f"the dtype of student[{i}] ({s.dtype}) to be overwritten", t.dtype)
        same = t.stride() == s.stride() and _native.is_dense(t) and _is_flat(t, distance)
        order = "sample after sample, " if distance == "cosine" else ""
        rule = f"dense, {order}with the strides of student[{i}] {s.stride()}, to be overwritten"
        _check.require(same, name, rule, t.stride())
        storage = t.untyped_storage()._cdata
        _check.require(storage not in seen, name, "memory of its own to be overwritten", f"that of {seen.get(storage)}")
        seen[storage] = name


def _is_flat(tensor: Tensor, distance: str) -> bool:
    """Whether the memory order of a dense tensor suits the distance: cosine needs sample after sample."""
    return distance != "cosine" or cpp.is_by_sample(tensor)


def _dense(tensor: Tensor, distance: str) -> Tensor:
    """The tensor itself if its memory has no gaps and no overlap (in any order of the dimensions, but see
    ``_is_flat``), else a dense copy."""
    if not _is_flat(tensor, distance):
        return tensor.contiguous()
    if tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return tensor
    twin = torch.empty_like(tensor, device="meta")  # has the same strides only if the tensor is dense
    return tensor if twin.stride() == tensor.stride() else _laid_out_like(twin, tensor)


def _laid_out_like(layout: Tensor, tensor: Tensor) -> Tensor:
    """A copy of ``tensor`` with the strides of ``layout``."""
    return torch.empty_strided(layout.shape, layout.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _launch(
    kind: Kind | None,
    student: list[Tensor],
    teacher: list[Tensor],
    weights: Tensor,
    grad_scale: Tensor | None,
    distance: str,
    parameter: float,
    grads: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Copy each tap's teacher to the dense layout of the student, so that kernels see flat memory, and run the op."""
    teacher = [t if t.stride() == s.stride() else _laid_out_like(s, t) for s, t in zip(student, teacher, strict=True)]
    loss, taps = weights.new_empty(()), weights.new_empty(len(student))
    if grad_scale is None:
        grad_scale = one(kind, weights.device)
    _feature_match(kind, student, teacher, weights, grad_scale, DISTANCES[distance], parameter, loss, taps, grads)
    return loss, taps


_Options = tuple[int, list[Tensor] | None, Tensor, Tensor | None, str, float]


class _FeatureMatch(torch.autograd.Function):
    """The forward computes the gradient; the backward multiplies it by the incoming gradient of the loss."""

    @staticmethod
    def forward(ctx: Any, kind: Kind | None, options: _Options, *features: Tensor) -> tuple[Tensor, Tensor]:
        count, grads, weights, grad_scale, distance, parameter = options
        student, teacher = list(features[:count]), list(features[count:])
        student = [_dense(s.detach(), distance) for s in student]
        if grads is None:
            grads = [torch.empty_like(s) for s in student]
        else:
            for i, (g, s) in enumerate(zip(grads, student, strict=True)):
                if g.stride() != s.stride():
                    raise InputError.of(f"grads[{i}]", f"the strides of student[{i}] {s.stride()}", g.stride())
        loss, taps = _launch(kind, student, teacher, weights, grad_scale, distance, parameter, grads)
        keep(ctx, kind, grads, grad_scale)
        ctx.count = count
        ctx.mark_non_differentiable(taps)
        return loss, taps

    @staticmethod
    @with_its_kernel
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Any, ...]:
        grads = hand_on("feature_match", ctx, grad_loss)
        return None, None, *grads, *[None] * ctx.count
