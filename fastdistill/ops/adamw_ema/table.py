# SPDX-License-Identifier: Apache-2.0
"""All tensors of a call as one table of 64-bit words: ``GradientRow`` and ``AdamWRow`` of ``csrc/adamw_ema/math.h``."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastdistill.ops import _native

CHUNK = 8192  # elements per partial sum and per unit of work
Table = npt.NDArray[np.int64]
_MOST_COPIES = 64
_copying = threading.Lock()  # another thread must not drop a copy that this one is about to use
_copies: OrderedDict[tuple[bytes, torch.device], tuple[Tensor, Tensor]] = OrderedDict()  # on the host, on the device
_captured: dict[tuple[bytes, torch.device], Tensor] = {}  # tables that a CUDA graph reads: kept until the process ends


def gradients(grads: Sequence[Tensor]) -> Table:
    """[N, 4]: number of elements, chunks of all previous gradients, address, dtype."""
    sizes = np.array([g.numel() for g in grads], np.int64)
    chunks = -(-sizes // CHUNK)
    addresses = np.array([g.data_ptr() for g in grads], np.int64)
    dtypes = np.array([_native.DTYPES[g.dtype] for g in grads], np.int64)
    return np.stack([sizes, np.cumsum(chunks) - chunks, addresses, dtypes], 1)


def chunks(table: Table) -> int:
    """Chunks of all gradients of a table."""
    return int(table[-1, 1] - (-table[-1, 0] // CHUNK)) if len(table) else 0


def parameters(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor],
    copies: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Sequence[Tensor],
    group: Sequence[int],
    hyper: Sequence[float],
) -> Table:
    """[N, 16]: the gradient's four words, then addresses (0: none), the copy's dtype and the hyper-parameters."""

    def addresses(tensors: Sequence[Tensor]) -> list[int]:
        return [t.data_ptr() for t in tensors] if tensors else [0] * len(params)

    table = np.empty((len(params), 16), np.int64)
    table[:, :4] = gradients(grads)
    for column, tensors in enumerate((params, exp_avgs, exp_avg_sqs, averages, copies), 4):
        table[:, column] = addresses(tensors)
    table[:, 9] = [_native.DTYPES[c.dtype] for c in copies] if copies else 0
    table[:, 10] = addresses(steps)
    set_groups(table, lr, group, hyper)
    return table


def set_groups(table: Table, lr: Sequence[Tensor], group: Sequence[int], hyper: Sequence[float]) -> None:
    """Write the learning rate and the hyper-parameters of each parameter's group into its row."""
    index = np.array(group, np.int64)
    table[:, 11] = np.array([t.data_ptr() for t in lr], np.int64)[index]
    table[:, 12:] = np.array(hyper, np.float64).reshape(-1, 4)[index].view(np.int64)


def hyper(groups: Sequence[Any]) -> list[float]:
    """Both betas, eps and weight decay of each group."""
    return [float(x) for g in groups for x in (*g.betas, g.eps, g.weight_decay)]


def selected(table: Table, rows: Sequence[int]) -> Table:
    """A table with the given rows only."""
    some = table[list(rows)]
    some[:, 1] = np.cumsum(-(-some[:, 0] // CHUNK)) - -(-some[:, 0] // CHUNK)
    return some


def is_on_device(table: Table, device: torch.device) -> bool:
    """Whether ``on_device`` needs no copy."""
    return (table.tobytes(), device) in _copies


def on_device(table: Table, device: torch.device) -> tuple[Tensor, Tensor]:
    """The table and the row of each chunk, on the device. Copied from pinned memory once for the same addresses, so
    that the host does not wait and a captured graph can read them."""
    key = table.tobytes(), device
    with _copying:
        if key not in _copies:
            owners = np.repeat(np.arange(len(table)), -(-table[:, 0] // CHUNK))
            host = torch.from_numpy(np.concatenate([table.reshape(-1), owners]))
            if device.type == "cuda":
                host = host.pin_memory()
            _copies[key] = host, host.to(device, non_blocking=True)
            if len(_copies) > _MOST_COPIES:
                _copies.popitem(last=False)
        _copies.move_to_end(key)
        words = _copies[key][1]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured[key] = words
    return words[: table.size], words[table.size :]
