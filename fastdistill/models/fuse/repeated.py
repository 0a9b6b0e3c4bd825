# SPDX-License-Identifier: Apache-2.0
"""Projects the keys and values of a prompt once if the first half of a batch shares it.

In a guided teacher's batch, half of the samples have the null prompt. Fused attention then projects its tokens for one
sample, and ``cross_attention`` reads them for all these samples (``rows``): nothing is copied or kept.
"""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

_NAME = "_fastdistill_repeated"


class Repeated:
    """While ``on`` is True, the first ``count`` of the 2 ``count`` samples in each call of the model must have the same
    prompt. ``attach`` registers this object with the model's attentions, ``detach`` removes it.

    An attribute and not a context manager, because torch 2.11 cannot compile ``with`` of an object's attribute."""

    def __init__(self, model: nn.Module, count: int, device: torch.device) -> None:
        self._attentions = [module for module in model.modules() if isinstance(module, Attention)]
        #: For each sample, its row in the projections: row 0 for all first samples, then one row per sample.
        self.rows = torch.cat([torch.zeros(count, dtype=torch.int64), torch.arange(1, count + 1)]).to(device)
        self.first, self.on = count - 1, False

    def attach(self) -> None:
        for module in self._attentions:
            module.__dict__[_NAME] = self

    def detach(self) -> None:
        for module in self._attentions:
            module.__dict__.pop(_NAME, None)


def distinct(attn: Attention, context: Tensor) -> tuple[Tensor, Tensor | None]:
    """The distinct prompts, and for each sample its row in them; unless ``Repeated`` is on, all prompts and None."""
    found: Repeated | None = attn.__dict__.get(_NAME)
    if found is None or not found.on or len(context) != len(found.rows):
        return context, None
    return context[found.first :], found.rows
