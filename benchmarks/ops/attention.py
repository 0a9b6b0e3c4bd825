# SPDX-License-Identifier: Apache-2.0
"""``attention``, forward and backward: the backend chosen by measurement against each backend by name."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.ops.cross_attention import BACKENDS, MODELS, XFORMERS, missing, sdpa, works
from benchmarks.registry import DTYPES, Case, Run, Workload, agrees, forward_backward, generator, optional
from benchmarks.shapes import SD15_ATTENTION
from fastdistill.ops import attention


def cases() -> Iterator[Case]:
    for device, batch in (("cpu", 1), ("cuda", 16)):
        rivals = ("SDPA flash", "SDPA math") if device == "cpu" else (*BACKENDS, XFORMERS)
        for model, shapes in MODELS.items():
            for tokens, heads, dim, keys in shapes[-1:] if device == "cpu" else shapes:
                for dtype in DTYPES:
                    shape = f"{model} {tokens}x{heads}x{dim} B={batch}"
                    make = functools.partial(_build, (batch, tokens, heads, dim), DTYPES[dtype], rivals)
                    first = dtype == "bf16" and (tokens, heads, dim, keys) == SD15_ATTENTION[0]
                    yield Case("attention", shape, dtype, device, make, rivals, first)


def _build(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, rivals: tuple[str, ...], device: torch.device
) -> Workload:
    batch, tokens, heads, dim = sizes
    g = generator(device)
    q, k, v, cotangent = (torch.randn(sizes, generator=g, device=device).to(dtype) for _ in range(4))
    inputs = tuple(t.requires_grad_() for t in (q, k, v))
    ours = forward_backward(attention, *inputs, cotangent=cotangent)

    def xformers(module: Any) -> Run:
        found = works(module.memory_efficient_attention, *inputs)
        if isinstance(found, str):
            raise RuntimeError(found)
        return found

    def of(name: str) -> Run | str:
        if name == XFORMERS:
            return missing(name) or optional("xformers.ops", xformers)
        return works(functools.partial(sdpa, BACKENDS[name]), *inputs)

    factor = math.sqrt(tokens * dim) if dtype == torch.float32 else 8.0  # different order of sums; rounded weights
    flops = 14 * batch * heads * tokens * tokens * dim  # two products forward, five backward
    return Workload(ours, {n: of(n) for n in rivals}, agrees(ours, factor), 11 * q.numel() * q.element_size(), flops)
