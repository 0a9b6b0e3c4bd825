# SPDX-License-Identifier: Apache-2.0
"""Detects models whose parameters are sharded."""

from __future__ import annotations

from torch import nn


def sharded(model: nn.Module) -> str | None:
    """The kind of FSDP (1 or 2) that shards the model or a part of it, in words; None if there is none."""
    for name, module in model.named_modules():
        if hasattr(module, "unshard") or type(module).__name__ == "FullyShardedDataParallel":
            return f"{name or 'the model'} is sharded by {type(module).__name__}"
    return None
