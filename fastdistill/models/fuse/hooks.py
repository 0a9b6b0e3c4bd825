# SPDX-License-Identifier: Apache-2.0
"""A fused forward computes what some submodules would, without calling them: not where somebody listens there."""

from __future__ import annotations

from torch import nn


def listened(*modules: nn.Module | None) -> bool:
    """Whether a hook of one of these modules would be left out."""
    for m in modules:
        if m is not None and (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks):
            return True
    return False
