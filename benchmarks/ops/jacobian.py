# SPDX-License-Identifier: Apache-2.0
"""Products with the Jacobian of ``mid_block``, 8 vectors per sample, and the top 10 directions computed with them.

Rivals of the products compute the whole forward and read a hook, differentiate twice, or use ``torch.func`` with vmap.
Rivals of ``top_subspace`` are its other methods, and one vector after another with deflation
(``benchmarks.products`` prints how many products each needs).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.registry import Case, Run, Workload, generator
from fastdistill.ops._sdpa import math_attention

SHAPES = [  # model, batch, device, headline
    ("digits 3x8x8", 4, "cpu", False),
    ("U-Net 4x32x32", 1, "cpu", False),
    ("SD-1.5 4x64x64", 1, "cuda", True),
]
VECTORS, K = 8, 10
TAP = "mid_block"
PRODUCTS = {"jvp": ("whole forward", "double VJP", "torch.func"), "vjp": ("whole forward", "torch.func")}
METHODS = ("subspace", "dense", "deflation")


def cases() -> Iterator[Case]:
    for model, batch, device, headline in SHAPES:
        for product, rivals in PRODUCTS.items():
            build = functools.partial(_product, model, batch, product)
            yield Case("jacobian", f"{product} {model} B={batch}", "fp32", device, build, rivals, headline)
        methods = METHODS if model.startswith("digits") else METHODS[:1]
        build = functools.partial(_top, model, batch, methods)
        yield Case("jacobian", f"top {K} {model} B={batch}", "fp32", device, build, methods)


class Setup(NamedTuple):
    """``f`` stops at the tap; ``whole`` computes the whole model."""

    f: Any
    whole: Callable[[Tensor], Tensor]
    x: Tensor


def setup(name: str, batch: int, device: torch.device, tap: str = TAP) -> Setup:
    from fastdistill.models import Taps
    from fastdistill.models.calling import Predictor
    from fastdistill.models.jacobian import TapFunction

    model, size, prompt = model_of(name)
    model = model.to(device).eval().requires_grad_(False)
    g = generator(device)
    x = torch.randn(batch, *size, generator=g, device=device)
    row = torch.randn(1, *prompt, generator=g, device=device)
    taps, predict = Taps(model, [tap]), Predictor(model)

    def whole(x: Tensor) -> Tensor:
        predict(x, torch.full((len(x),), 600, device=device), row.expand(len(x), -1, -1))
        return taps.features()[0].flatten(1)

    return Setup(TapFunction(model, tap, 600, row.expand(batch, -1, -1)), whole, x)


def model_of(name: str) -> tuple[Any, tuple[int, ...], tuple[int, ...]]:
    """A model, the shapes of its latents and of a prompt."""
    if name.startswith("digits"):
        from fastdistill.tasks.digits.teacher import load_teacher

        teacher = load_teacher()
        return teacher, (3, 8, 8), (4, teacher.config.cross_attention_dim)
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    if name.startswith("SD-1.5"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768), (4, 64, 64), (77, 768)
    tiny = UNet2DConditionModel(
        sample_size=32, block_out_channels=(16, 32, 32), layers_per_block=1, cross_attention_dim=16,
        norm_num_groups=8, attention_head_dim=4,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return tiny, (4, 32, 32), (8, 16)


def _product(name: str, batch: int, product: str, device: torch.device) -> Workload:
    from fastdistill.models import jacobian

    f, whole, x = setup(name, batch, device)
    size = x[0].numel() if product == "jvp" else f(x).shape[1]
    vectors = torch.randn(batch, size, VECTORS, generator=generator(device), device=device)
    compute = getattr(jacobian, product)
    rivals: dict[str, Run | str] = {
        "whole forward": lambda: compute(whole, x, vectors),
        "torch.func": lambda: _functorch(whole, x, vectors, product),
    }
    if product == "jvp":
        rivals["double VJP"] = lambda: _twice(f, x, vectors)

    def check() -> None:
        ours = compute(f, x, vectors)
        for rival in rivals.values():
            assert callable(rival)
            torch.testing.assert_close(rival(), ours, rtol=0, atol=1e-4 * float(ours.abs().max()))

    return Workload(lambda: compute(f, x, vectors), rivals, check, memory=True, graphs=False)


def _functorch(f: Callable[[Tensor], Tensor], x: Tensor, vectors: Tensor, product: str) -> Tensor:
    by_vector = vectors.permute(2, 0, 1)
    with math_attention():
        if product == "jvp":
            tangents = by_vector.reshape(-1, *x.shape)
            made = torch.func.vmap(lambda v: torch.func.jvp(f, (x,), (v,))[1])(tangents)
        else:
            pull = torch.func.vjp(f, x)[1]
            made = torch.func.vmap(lambda u: pull(u)[0])(by_vector).flatten(2)
    out: Tensor = made.permute(1, 2, 0)
    return out


def _twice(f: Any, x: Tensor, vectors: Tensor) -> Tensor:
    from fastdistill.models import jacobian

    jacobian._without_forward_mode.add(f.model)
    try:
        return jacobian.jvp(f, x, vectors)
    finally:
        jacobian._without_forward_mode.discard(f.model)


def _top(name: str, batch: int, methods: tuple[str, ...], device: torch.device) -> Workload:
    from benchmarks.products import deflation
    from fastdistill.models.subspace import top_subspace

    f, _, x = setup(name, batch, device)

    def find(method: str) -> Tensor:
        if method == "deflation":
            return deflation(f, x, K, 3e-3)[0]
        return top_subspace(f, x, K, method=method, max_products=100 * K).vectors  # type: ignore[arg-type]

    def check() -> None:
        ours = find("krylov")
        for method in methods:
            theirs = find(method)
            sine = torch.linalg.matrix_norm(theirs - ours @ (ours.mT @ theirs), ord=2).max()
            assert sine <= 0.05, f"{method}: sine {sine:.3f} of an angle between two of error 0.01 each"

    return Workload(
        lambda: find("krylov"), {m: functools.partial(find, m) for m in methods}, check, memory=True, graphs=False
    )
