# SPDX-License-Identifier: Apache-2.0
"""Which models have given their parameters away."""

from __future__ import annotations

from torch import nn


def sharded(model: nn.Module) -> str | None:
    """What shards the model, or a part of it, by FSDP (1 or 2), in words; None if nothing does."""
    for name, module in model.named_modules():
        if hasattr(module, "unshard") or type(module).__name__ == "FullyShardedDataParallel":
            return f"{name or 'the model'} is sharded by {type(module).__name__}"
    return None
