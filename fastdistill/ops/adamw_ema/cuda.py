# SPDX-License-Identifier: Apache-2.0
"""Norm, AdamW and average in CUDA: ``csrc/adamw_ema/cuda.cu``. It supports the same calls as the C++ kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill.ops import _native
from fastdistill.ops.adamw_ema import cpp, table


def grad_square_sum(grads: Sequence[Tensor], total: Tensor) -> None:
    """One launch per 1000 gradients, and one that adds the sums of chunks in order."""
    launch_square_sum(table.gradients(grads), total)


def launch_square_sum(rows: table.Table, total: Tensor) -> None:
    partials = torch.empty(table.chunks(rows), dtype=torch.float64, device=total.device)
    _native.cuda().grad_square_sum(
        rows.ctypes.data, len(rows), table.CHUNK, partials.data_ptr(), total.data_ptr(), _native.queue(total)
    )


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
    """Two launches per 250 parameters; arguments as in the reference."""
    rows = table.parameters(params, grads, exp_avgs, exp_avg_sqs, averages, copies, steps, lr, group, hyper)
    launch(rows, square_sum, grad_scale, found_inf, ema_weight, skipped, max_norm, ema_warmup, zero_grads)


def launch(
    rows: table.Table, square_sum: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None,
    ema_weight: Tensor | None, skipped: Tensor, max_norm: float, ema_warmup: bool, zero_grads: bool,
) -> None:  # fmt: skip
    cuda = _native.cuda()
    workspace = torch.empty(len(rows), cuda.adamw_ema_workspace(), dtype=torch.float32, device=square_sum.device)
    cuda.adamw_ema(
        rows.ctypes.data, len(rows), table.CHUNK, square_sum.data_ptr(), cpp.address(grad_scale),
        cpp.address(found_inf), cpp.address(ema_weight), skipped.data_ptr(), max_norm, ema_warmup, zero_grads,
        workspace.data_ptr(), _native.queue(square_sum),
    )  # fmt: skip


def refuse(*args: Sequence[Tensor]) -> str | None:
    """Like the C++ kernel; also refuses a call without parameters, which would launch nothing."""
    return cpp.refuse(*args) if args[0] else "there are no parameters"
