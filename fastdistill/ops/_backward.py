# SPDX-License-Identifier: Apache-2.0
"""The backward of losses whose forward has made the gradient already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def wanted(tensors: Sequence[Tensor]) -> bool:
    """Whether a call is to be differentiated. In forward mode too, which torch then refuses: the tangent would be 0."""
    return torch.is_grad_enabled() and (any(t.requires_grad for t in tensors) or forward_ad._current_level >= 0)


def keep(ctx: Any, grads: list[Tensor], grad_scale: Tensor) -> None:
    """What ``hand_on`` needs; the buffers count as written to now, as torch counts its in-place operations."""
    ctx.grads, ctx.grad_scale = grads, grad_scale
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([g for g in grads if not g.is_inference()])
        ctx.versions = _versions(grads)


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [-1 if t.is_inference() else t._version for t in tensors]


def hand_on(op: str, ctx: Any, grad_loss: Tensor) -> list[Tensor]:
    """``ctx.grads``, stored times ``ctx.grad_scale``, times what the loss was multiplied by since.

    In place where the graph is freed by this backward: the buffers then belong to whoever consumes them.
    """
    if ctx.grads is None:
        raise RuntimeError(
            f"{op}: backward ran a second time, after the first took the gradient: use retain_graph=True"
        )
    if not torch.compiler.is_compiling() and ctx.versions != _versions(ctx.grads):
        raise RuntimeError(
            f"{op}: a gradient buffer was written to between the forward and its backward: give each forward buffers"
            " of its own, or run its backward first"
        )
    factor = grad_loss.float() / ctx.grad_scale
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        # Compiled, the product fuses with whatever consumes it; with the graph kept, another backward will want the
        # buffers.
        return [(g.float() * factor).to(g.dtype) for g in ctx.grads]
    grads: list[Tensor] = ctx.grads
    ctx.grads = None
    torch.ops.fastdistill.scale_gradients.default(grads, factor)
    return grads
