# SPDX-License-Identifier: Apache-2.0
"""The two layouts of [B, C, *positions] that kernels support: contiguous, or channels last."""

from __future__ import annotations

import torch
from torch import Tensor


def channels_last(x: Tensor) -> bool | None:
    """Whether the layout is channels last; None if it is neither of the two."""
    if x.is_contiguous():
        return False
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):  # saves creating a view
        return True
    return True if x.movedim(1, -1).is_contiguous() else None


def laid_out(x: Tensor) -> Tensor:
    """``x`` itself in one of the two layouts, else a contiguous copy."""
    return x if channels_last(x) is not None else x.contiguous()
