# SPDX-License-Identifier: Apache-2.0
"""Feature matching in CUDA: ``csrc/feature_match/cuda.cu``. It supports the same calls as the C++ kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill.ops import _native
from fastdistill.ops.feature_match.cpp import samples


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
    """Two launches per 16 taps (three for normalized_mse with a gradient, four for cosine); arguments as in
    the reference."""
    sizes, rows = [s.numel() for s in student], samples(student, distance)
    cuda = _native.cuda()
    workspace = torch.empty(cuda.feature_match_workspace(sizes, rows), dtype=torch.float64, device=loss.device)
    cuda.feature_match(
        [s.data_ptr() for s in student],
        [t.data_ptr() for t in teacher],
        [g.data_ptr() for g in grads],
        sizes,
        rows,
        [_native.DTYPES[s.dtype] for s in student],
        [_native.DTYPES[t.dtype] for t in teacher],
        weights.data_ptr(), grad_scale.data_ptr(), distance, parameter, loss.data_ptr(), taps.data_ptr(),
        workspace.data_ptr(), _native.queue(loss),
    )  # fmt: skip


def scale_gradients(grads: Sequence[Tensor], factor: Tensor) -> None:
    """In place, one launch per 16 gradients; does nothing if the factor is 1."""
    _native.cuda().scale_gradients(
        [g.data_ptr() for g in grads],
        [g.numel() for g in grads],
        [_native.DTYPES[g.dtype] for g in grads],
        factor.data_ptr(),
        _native.queue(factor),
    )
