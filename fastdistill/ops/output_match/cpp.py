# SPDX-License-Identifier: Apache-2.0
"""Output matching in C++: ``csrc/output_match/cpu.cpp``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill.errors import InputError
from fastdistill.ops import _native


def output_match(*arguments: Any) -> None:
    """One parallel loop over chunks of samples; arguments as the reference's.

    Raises:
        InputError: a timestep or latent that its table does not have.
    """
    unknown = _native.cpu().output_match(*addresses(*arguments), torch.get_num_threads())
    if unknown >= 0:
        timestep, table, latents, latent_index = arguments[3], arguments[4], arguments[8], arguments[9]
        if not 0 <= int(timestep[unknown]) < len(table):
            name, rows, value = f"timestep[{unknown}]", f"a row of table, 0 to {len(table) - 1}", timestep[unknown]
        else:
            name, rows = f"task.latent_index[{unknown}]", f"a row of task.latents, 0 to {len(latents) - 1}"
            value = latent_index[unknown]
        raise InputError.of(name, rows, int(value))


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
    """What both extensions take, in their order; the address of a tensor of no elements is 0."""

    def address(tensor: Tensor) -> int:
        return tensor.data_ptr() if tensor.numel() else 0

    def rows(tensor: Tensor) -> tuple[int, int, int]:
        return address(tensor), _native.DTYPES[tensor.dtype], tensor.numel() // max(len(tensor), 1)

    batch = len(student)
    matched = channels * (student.numel() // max(batch * student.size(1), 1))
    return (
        rows(student), rows(teacher), rows(unconditional), rows(x_t), rows(latents), timestep.data_ptr(),
        table.data_ptr(), address(guidance), address(weights), address(latent_index), address(choice),
        address(coefficients), address(counter), batch, matched, len(table), len(latents), first_sample, output_weight,
        task_weight, grad_scale.data_ptr(), huber, delta, loss.data_ptr(), parts.data_ptr(), address(samples),
        address(grad),
    )  # fmt: skip


def refuse(*arguments: Any) -> str | None:
    """Rows are read and written as flat memory: every tensor must be contiguous."""
    for tensor in arguments:
        if isinstance(tensor, Tensor) and not tensor.is_contiguous():
            return f"a tensor is not contiguous (shape {tuple(tensor.shape)}, strides {tensor.stride()})"
    return None
