# SPDX-License-Identifier: Apache-2.0
"""The exponential moving average of a student's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Ema:
    """A float32 average of a module's parameters that starts from their values.

    The decay at optimizer step k (from 0) is min(decay, (1 + k) / (10 + k)), read from device memory, so that an update
    needs nothing from the host.
    """

    def __init__(self, module: nn.Module, decay: float, steps: int) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self._source = [p for _, p in named]
        self.average = [p.detach().float().clone() for p in self._source]
        k = torch.arange(steps, dtype=torch.float64)
        keep = torch.minimum(torch.tensor(decay, dtype=torch.float64), (1 + k) / (10 + k))
        self._move = (1 - keep).float().to(self.average[0].device)

    @torch.no_grad()
    def update(self, step: Tensor) -> None:
        """average += (1 - decay(step)) (weights - average); ``step`` is [1] int64 on the device."""
        weights = [p.float() for p in self._source]
        change = torch._foreach_sub(weights, self.average)
        torch._foreach_mul_(change, self._move.index_select(0, step).squeeze(0))
        torch._foreach_add_(self.average, change)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.average, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, average in self.state_dict().items():
            average.copy_(state[name])

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the average into a module of the same parameters (a copy of the student, to sample from or export)."""
        parameters = dict(module.named_parameters())
        for name, average in self.state_dict().items():
            parameters[name].copy_(average)
