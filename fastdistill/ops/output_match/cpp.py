# SPDX-License-Identifier: Apache-2.0
"""Output matching in C++: ``csrc/output_match/cpu.cpp``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill.ops import _native
from fastdistill.ops.output_match import reference

_NOTHING = 0, 0, 0


def output_match(*arguments: Any) -> None:
    """One parallel loop over chunks of samples; arguments as in the reference.

    Raises:
        InputError: a timestep or latent index is out of range.
    """
    unknown = _native.cpu().output_match(*addresses(*arguments), torch.get_num_threads())
    if unknown >= 0:
        reference.refuse(unknown, arguments[3], arguments[4], arguments[8], arguments[9])


def addresses(
    student: Tensor,
    teacher: Tensor,
    unconditional: Tensor,
    timestep: Tensor,
    table: Tensor,
    guidance: Tensor,
    weights: Tensor,
    x_t: Tensor,
    latents: Tensor,
    latent_index: Tensor,
    choice: Tensor,
    coefficients: Tensor,
    counter: Tensor,
    first_sample: int,
    channels: int,
    output_weight: float,
    task_weight: float,
    grad_scale: Tensor,
    huber: bool,
    delta: float,
    loss: Tensor,
    parts: Tensor,
    samples: Tensor,
    grad: Tensor,
) -> tuple[Any, ...]:
    """The arguments of both extensions, in their order; the address of a tensor without elements is 0."""
    shape = student.shape
    matched = channels * (student.numel() // max(shape[0] * shape[1], 1))
    rows = [
        (t.data_ptr(), _native.DTYPES[t.dtype], n // t.shape[0]) if (n := t.numel()) else _NOTHING
        for t in (student, teacher, unconditional, x_t, latents)
    ]
    return (
        *rows, timestep.data_ptr(), table.data_ptr(), guidance.data_ptr(), weights.data_ptr(),
        latent_index.data_ptr(), choice.data_ptr(), coefficients.data_ptr(), counter.data_ptr(), shape[0], matched,
        table.shape[0], latents.shape[0], first_sample, output_weight, task_weight, grad_scale.data_ptr(), huber, delta,
        loss.data_ptr(), parts.data_ptr(), samples.data_ptr(), grad.data_ptr(),
    )  # fmt: skip


def refuse(*arguments: Any) -> str | None:
    """Every tensor must be contiguous, because rows are read and written as flat memory."""
    for tensor in arguments:
        if isinstance(tensor, Tensor) and not tensor.is_contiguous():
            return f"a tensor is not contiguous (shape {tuple(tensor.shape)}, strides {tensor.stride()})"
    return None
