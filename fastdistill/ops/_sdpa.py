# SPDX-License-Identifier: Apache-2.0
"""torch's ``scaled_dot_product_attention`` where several threads call it.

The switches by which it is told which backends it may choose belong to the process: set by two threads at once, those
of one would stay for good, and a call of a third would find no backend that is allowed.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdistill.ops import _native

_switches = threading.RLock()


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float, backends: Sequence[SDPBackend] = ()
) -> Tensor:
    """softmax(scale q k^T + mask) v, [B, H, N, D], by one of ``backends`` (none: by any).

    On a GPU calls take turns, as they only launch; on a CPU, where they compute, those with ``backends`` do.
    """
    if not torch.compiler.is_compiling() and _native.overlaps(q):  # the result of some would have its strides
        q = q.contiguous()
    if list(backends) == [SDPBackend.MATH]:  # is an operator of its own, which needs no switch
        out: Tensor = torch.ops.aten._scaled_dot_product_attention_math.default(q, k, v, mask, scale=scale)[0]
        return out
    attend = functools.partial(F.scaled_dot_product_attention, q, k, v, attn_mask=mask, scale=scale)
    if torch.compiler.is_compiling():  # one thread at a time
        if not backends:
            return attend()
        with sdpa_kernel(list(backends)):
            return attend()
    if backends:
        with _switches, sdpa_kernel(list(backends)):
            return attend()
    with _switches if q.is_cuda else contextlib.nullcontext():
        return attend()


@contextlib.contextmanager
def math_attention() -> Iterator[None]:
    """Inside, torch's attention is its math form, which has forward mode and second derivatives; one thread at a
    time."""
    with _switches, sdpa_kernel(SDPBackend.MATH):
        yield
