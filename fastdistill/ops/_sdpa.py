# SPDX-License-Identifier: Apache-2.0
"""torch's ``scaled_dot_product_attention``, made safe for calls from several threads.

The switches that allow its backends belong to the process. If two threads set them at the same time, those of one
thread could stay set, and a call of a third thread could find no allowed backend.
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

    A lock serializes calls: on a GPU all, because they only launch; on a CPU only those with ``backends``.
    """
    if not torch.compiler.is_compiling() and _native.overlaps(q):  # some backends give the result q's strides
        q = q.contiguous()
    if list(backends) == [SDPBackend.MATH]:  # a separate operator, which needs no switch
        out: Tensor = torch.ops.aten._scaled_dot_product_attention_math.default(q, k, v, mask, scale=scale)[0]
        return out
    attend = functools.partial(F.scaled_dot_product_attention, q, k, v, attn_mask=mask, scale=scale)
    if torch.compiler.is_compiling():  # only one thread compiles at a time
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
    """Inside, torch's attention uses the math backend, which has forward mode and second derivatives; one thread at a
    time."""
    with _switches, sdpa_kernel(SDPBackend.MATH):
        yield
