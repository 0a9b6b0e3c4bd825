# SPDX-License-Identifier: Apache-2.0
"""Feature matching in C++: ``csrc/feature_match/cpu.cpp``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill.ops import _native
from fastdistill.ops.feature_match.reference import COSINE


def feature_match(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weights: Tensor,
    grad_scale: Tensor,
    distance: int,
    parameter: float,
    loss: Tensor,
    taps: Tensor,
    grads: Sequence[Tensor],
) -> None:
    """One parallel loop over all taps; arguments as in the reference."""
    _native.cpu().feature_match(
        [s.data_ptr() for s in student],
        [t.data_ptr() for t in teacher],
        [g.data_ptr() for g in grads],
        [s.numel() for s in student],
        samples(student, distance),
        [_native.DTYPES[s.dtype] for s in student],
        [_native.DTYPES[t.dtype] for t in teacher],
        weights.data_ptr(), grad_scale.data_ptr(), distance, parameter, loss.data_ptr(), taps.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip


def samples(student: Sequence[Tensor], distance: int) -> list[int]:
    """The number of samples of each tap, for distances per sample (cosine)."""
    return [max(1, s.size(0)) for s in student] if distance == COSINE else []


def is_by_sample(tensor: Tensor) -> bool:
    """Whether a dense tensor's samples (its first dimension) follow each other in memory."""
    return tensor.size(0) < 2 or tensor.stride(0) * tensor.size(0) == tensor.numel() or tensor.numel() == 0


def refuse(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weights: Tensor,
    grad_scale: Tensor,
    distance: int,
    parameter: float,
    loss: Tensor,
    taps: Tensor,
    grads: Sequence[Tensor],
) -> str | None:
    """The kernel treats memory as flat: the tensors of a tap must be dense and have the same strides."""
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        if s.stride() != t.stride() or (grads and grads[i].stride() != s.stride()):
            return f"student[{i}], teacher[{i}] and its gradient have different strides"
        if not _native.is_dense(s):
            return f"student[{i}] has gaps or overlaps in memory (strides {s.stride()})"
        if distance == COSINE and not is_by_sample(s):
            return f"the samples of student[{i}] are not each a block of memory (strides {s.stride()})"
    if not (weights.is_contiguous() and taps.is_contiguous()):
        return "weights and taps must be contiguous"
    return None


def scale_gradients(grads: Sequence[Tensor], factor: Tensor) -> None:
    """In place; does nothing if the factor is 1."""
    _native.cpu().scale_gradients(
        [g.data_ptr() for g in grads],
        [g.numel() for g in grads],
        [_native.DTYPES[g.dtype] for g in grads],
        factor.data_ptr(),
        torch.get_num_threads(),
    )


def refuse_scale(grads: Sequence[Tensor], factor: Tensor) -> str | None:
    """The kernel needs dense tensors."""
    for i, g in enumerate(grads):
        if not _native.is_dense(g):
            return f"grads[{i}] has gaps or overlaps in memory (strides {g.stride()})"
    return None
