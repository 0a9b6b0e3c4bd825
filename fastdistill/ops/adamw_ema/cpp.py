# SPDX-License-Identifier: Apache-2.0
"""Norm, AdamW and average in C++: ``csrc/adamw_ema/cpu.cpp``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill.ops import _native
from fastdistill.ops.adamw_ema import table


def grad_square_sum(grads: Sequence[Tensor], total: Tensor) -> None:
    """One parallel loop over all gradients."""
    launch_square_sum(table.gradients(grads), total)


def launch_square_sum(rows: table.Table, total: Tensor) -> None:
    _native.cpu().grad_square_sum(
        rows.ctypes.data, len(rows), table.CHUNK, table.chunks(rows), total.data_ptr(), torch.get_num_threads()
    )


def refuse_square_sum(grads: Sequence[Tensor], total: Tensor) -> str | None:
    """The kernel needs dense tensors."""
    for i, g in enumerate(grads):
        if not _native.is_dense(g):
            return f"grads[{i}] has gaps or overlaps in memory (strides {g.stride()})"
    return None


def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor],
    copies: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Sequence[Tensor],
    square_sum: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    ema_weight: Tensor | None,
    skipped: Tensor,
    group: Sequence[int],
    hyper: Sequence[float],
    max_norm: float,
    ema_warmup: bool,
    zero_grads: bool,
) -> None:
    """One parallel loop over all parameters; arguments as in the reference."""
    rows = table.parameters(params, grads, exp_avgs, exp_avg_sqs, averages, copies, steps, lr, group, hyper)
    launch(rows, square_sum, grad_scale, found_inf, ema_weight, skipped, max_norm, ema_warmup, zero_grads)


def launch(
    rows: table.Table, square_sum: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None,
    ema_weight: Tensor | None, skipped: Tensor, max_norm: float, ema_warmup: bool, zero_grads: bool,
) -> None:  # fmt: skip
    _native.cpu().adamw_ema(
        rows.ctypes.data, len(rows), table.CHUNK,
        square_sum.data_ptr(), address(grad_scale), address(found_inf), address(ema_weight), skipped.data_ptr(),
        max_norm, ema_warmup, zero_grads, torch.get_num_threads(),
    )  # fmt: skip


def refuse(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor],
    copies: Sequence[Tensor],
    *rest: object,
) -> str | None:
    """The kernel treats memory as flat: a parameter's tensors must be dense and have the same strides."""
    named = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "averages": averages, "copies": copies}
    for i, p in enumerate(params):
        if not _native.is_dense(p):
            return f"params[{i}] has gaps or overlaps in memory (strides {p.stride()})"
        for name, tensors in named.items():
            if tensors and tensors[i].numel() and not _native.same_order(tensors[i], p):
                return f"{name}[{i}] has other strides {tensors[i].stride()} than params[{i}] {p.stride()}"
    return None


def address(tensor: Tensor | None) -> int:
    """The address of the data; 0 for None."""
    return tensor.data_ptr() if tensor is not None else 0
