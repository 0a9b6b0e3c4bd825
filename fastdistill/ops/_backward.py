# SPDX-License-Identifier: Apache-2.0
"""The backward of losses whose forward has made the gradient already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def hand_on(op: str, ctx: Any, grad_loss: Tensor) -> list[Tensor]:
    """``ctx.grads``, stored times ``ctx.grad_scale``, times what the loss was multiplied by since.

    In place where the graph is freed by this backward: the buffers then belong to whoever consumes them.
    """
    if ctx.grads is None:
        raise RuntimeError(
            f"{op}: backward ran a second time, after the first took the gradient: use retain_graph=True"
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
