# SPDX-License-Identifier: Apache-2.0
"""``cross_attention``, forward and backward: from an image's tokens to its prompt's, in the layout of the projections.

The rivals are torch's attention with each of its backends, and xformers, on views of the same memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.registry import DTYPES, Case, Run, Workload, agrees, forward_backward, generator, optional
from benchmarks.shapes import PIXART_ATTENTION, SD15_ATTENTION, SDXL_ATTENTION
from fastdistill.ops import OPS, cross_attention

MODELS = {"SD-1.5": SD15_ATTENTION, "SDXL": SDXL_ATTENTION, "PixArt-XL/2": PIXART_ATTENTION}
BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
XFORMERS = "xformers"


def cases() -> Iterator[Case]:
    for device, batch in (("cpu", 1), ("cuda", 16)):
        rivals = ("SDPA flash", "SDPA math") if device == "cpu" else (*BACKENDS, XFORMERS)
        for model, shapes in MODELS.items():
            for sizes in shapes[-1:] if device == "cpu" else shapes:
                for dtype in DTYPES:
                    tokens, heads, dim, keys = sizes
                    shape = f"{model} {tokens}x{heads}x{dim} {keys} keys B={batch}"
                    make = functools.partial(_build, (batch, *sizes), DTYPES[dtype], rivals)
                    first = dtype == "bf16" and sizes == SD15_ATTENTION[0]
                    yield Case("cross_attention", shape, dtype, device, make, rivals, first)


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def works(function: Callable[..., Tensor], *inputs: Tensor) -> Run | str:
    """A forward and backward, or the reason why it is not possible."""
    run = forward_backward(lambda *t: function(*t), *inputs, cotangent=torch.randn_like(inputs[0]))
    try:
        run()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return run


def missing(backend: str) -> str | None:
    """Why a backend of ``attention`` cannot run on this GPU."""
    (kernel,) = (k for k in OPS["attention"].kernels if (k.name, k.device) == (backend, "cuda"))
    return kernel.available()


def _build(
    sizes: tuple[int, int, int, int, int], dtype: torch.dtype, rivals: tuple[str, ...], device: torch.device
) -> Workload:
    batch, tokens, heads, dim, keys = sizes

    def made(n: int) -> Tensor:
        return torch.randn(batch, n, heads, dim, generator=generator(device), device=device).to(dtype).requires_grad_()

    q, k, v = made(tokens), made(keys), made(keys)
    ours = forward_backward(cross_attention, q, k, v, cotangent=torch.randn_like(q))

    def xformers(module: Any) -> Run:
        found = works(module.memory_efficient_attention, q, k, v)
        if isinstance(found, str):
            raise RuntimeError(found)
        return found

    others: dict[str, Run | str] = {}
    for name in rivals:
        if name == XFORMERS:
            others[name] = missing(name) or optional("xformers.ops", xformers)
        else:
            others[name] = works(functools.partial(sdpa, BACKENDS[name]), q, k, v)
    moved = (5 * q.numel() + 6 * k.numel()) * q.element_size()  # q, out; q, its gradient and the output's; K, V
    flops = 14 * batch * heads * tokens * keys * dim  # two products forward, five backward
    factor = math.sqrt(tokens * dim) if dtype == torch.float32 else 8.0  # different order of sums; rounded weights
    return Workload(ours, others, agrees(ours, factor), moved, flops)
