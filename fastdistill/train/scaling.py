# SPDX-License-Identifier: Apache-2.0
"""The loss scale of float16 training, kept and changed on the device (Micikevicius et al. 2018, arXiv 1710.03740)."""

from __future__ import annotations

import torch
from torch import Tensor

FIRST, LARGEST, PATIENCE = 2.0**16, 2.0**24, 2000  # torch.amp.GradScaler's, and an upper limit


class LossScale:
    """Doubles after 2000 steps with finite gradients and halves after one without, which the optimizer skips.

    ``value`` is 0-dim float32, ``good`` 0-dim int64, the steps since it last changed; both on the device. It needs no
    synchronization and, unlike ``torch.amp.GradScaler``, no pass over the gradients, whose norm is computed anyway.
    """

    def __init__(self, device: torch.device) -> None:
        self.value = torch.tensor(FIRST, dtype=torch.float32, device=device)
        self.good = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, square_sum: Tensor) -> None:
        """After a step whose gradients have this sum of squares."""
        finite = square_sum.isfinite()
        self.good.add_(1).mul_(finite)
        doubled = self.good >= PATIENCE
        self.value.mul_(torch.where(finite, 1.0 + doubled, 0.5)).clamp_(1.0, LARGEST)
        self.good.mul_(~doubled)
