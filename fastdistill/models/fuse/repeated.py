# SPDX-License-Identifier: Apache-2.0
"""A prompt that the first half of a batch shares: its keys and values are projected once.

In a guided teacher's batch half of the samples have the null prompt. Fused attention to a prompt then projects its
tokens for one sample, and ``cross_attention`` reads them for all of these (``rows``): nothing is copied or kept.
"""

from __future__ import annotations

from types import TracebackType

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

_NAME = "_fastdistill_repeated"


class Repeated:
    """Inside of ``with``, the first ``count`` of 2 ``count`` samples that the model is called with have the same
    prompt. ``attach`` tells its attentions, ``detach`` ends that."""

    def __init__(self, model: nn.Module, count: int, device: torch.device) -> None:
        self._attentions = [module for module in model.modules() if isinstance(module, Attention)]
        #: Row of each sample in the projections of the last of the first samples' prompts and all others.
        self.rows = torch.cat([torch.zeros(count, dtype=torch.int64), torch.arange(1, count + 1)]).to(device)
        self.first, self.on = count - 1, False

    def attach(self) -> None:
        for module in self._attentions:
            module.__dict__[_NAME] = self

    def detach(self) -> None:
        for module in self._attentions:
            module.__dict__.pop(_NAME, None)

    def __enter__(self) -> None:
        self.on = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.on = False


def distinct(attn: Attention, context: Tensor) -> tuple[Tensor, Tensor | None]:
    """The prompts that differ, and for each sample which of them it has; all of them and None where nothing is
    known."""
    found: Repeated | None = attn.__dict__.get(_NAME)
    if found is None or not found.on or len(context) != len(found.rows):
        return context, None
    return context[found.first :], found.rows
