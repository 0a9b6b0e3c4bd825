# SPDX-License-Identifier: Apache-2.0
"""What is measured: per op the shapes of real models, the bytes that must move, the rivals, the check before any
timing.

A rival is the strongest form that a user would write, with its outputs reused where ours are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastdistill.ops import NoiseGather, feature_match, use
from fastdistill.train import AdamWEMA

# Outputs of the down and up blocks of a U-Net of Stable Diffusion 1.5 at 512 x 512: bk_base's taps.
SD15_TAPS = (
    (320, 32, 32),
    (640, 16, 16),
    (1280, 8, 8),
    (1280, 8, 8),
    (1280, 16, 16),
    (1280, 32, 32),
    (640, 64, 64),
    (320, 64, 64),
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Benchmark:
    """One op at one shape. ``ours`` and ``rivals`` run it once; ``check`` raises where ours is wrong."""

    op: str
    shape: str
    dtype: str
    bytes: int
    ours: Callable[[], object]
    check: Callable[[], None]
    rivals: dict[str, Callable[[], object]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def benchmarks(ops: list[str], dtypes: list[str], batches: list[int], compiled: bool) -> Iterator[Benchmark]:
    """The chosen benchmarks, made one at a time, as they are large."""
    for op in ops:
        for dtype in dtypes:
            for batch in batches[:1] if op in WITHOUT_BATCH else batches:
                yield MAKERS[op](batch, dtype, compiled)


def _feature_match(batch: int, dtype: str, compiled: bool) -> Benchmark:
    g = torch.Generator().manual_seed(0)
    kind = DTYPES[dtype]
    student = [torch.randn(batch, *s, generator=g).to(kind).requires_grad_() for s in SD15_TAPS]
    teacher = [torch.randn(batch, *s, generator=g).to(kind) for s in SD15_TAPS]
    buffers = [torch.empty_like(s, requires_grad=False) for s in student]

    def ours() -> tuple[Tensor, ...]:
        return torch.autograd.grad(feature_match(student, teacher, grads=buffers).loss, student)

    def recipe(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        pairs = zip(student, teacher, strict=True)
        return torch.stack([F.mse_loss(s.float(), t.float()) for s, t in pairs]).sum()

    def eager() -> tuple[Tensor, ...]:
        return torch.autograd.grad(recipe(student, teacher), student)

    def check() -> None:
        got = [x.clone() for x in ours()]
        with use("reference"):
            expected = ours()
        eps = torch.finfo(kind).eps
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2 * eps, atol=eps * b.abs().max().item())

    rivals: dict[str, Callable[[], object]] = {"eager": eager}
    missing = {}
    if compiled:
        fast = torch.compile(recipe)
        rivals["torch.compile"] = lambda: torch.autograd.grad(fast(student, teacher), student)
    else:
        missing["torch.compile"] = "left out by --no-compiled"
    elements = sum(s.numel() for s in student)
    return Benchmark(
        "feature_match",
        f"SD-1.5 8 taps B={batch}",
        dtype,
        3 * elements * kind.itemsize,
        ours,
        check,
        rivals,
        missing,
    )


def _noise_gather(batch: int, dtype: str, compiled: bool) -> Benchmark:
    g = torch.Generator().manual_seed(0)
    kind = DTYPES[dtype]
    rows, texts, steps = 256, 600, 1000
    latents = torch.randn(rows, 4, 64, 64, generator=g).to(kind)
    prompts = torch.randn(texts, 77, 768, generator=g).to(kind)
    own = torch.arange(rows)
    alpha = torch.linspace(0.99, 0.05, steps)
    coefficients = torch.stack([alpha, (1 - alpha**2).sqrt(), torch.zeros(steps), torch.ones(steps)], 1)
    replace = torch.full((steps,), 2**31)
    numbers = np.array([1, 0])
    counter = torch.from_numpy(numbers)  # the step is counted in the same memory
    signal, noise = (c.to(kind) for c in coefficients[:, :2].T)
    x, z = latents.new_empty(2, batch, *latents.shape[1:])
    prompt = prompts.new_empty(batch, *prompts.shape[1:])

    draw = NoiseGather(latents, own, prompts, coefficients, replace, counter, null_index=texts - 1, batch=batch)

    def ours() -> object:
        numbers[1] += 1
        return draw()

    def literal() -> Tensor:
        row, t, text = torch.randint(rows, (batch,)), torch.randint(steps, (batch,)), torch.randint(texts, (batch,))
        torch.index_select(latents, 0, row, out=x)
        torch.index_select(prompts, 0, text, out=prompt)
        torch.randn(z.shape, dtype=kind, out=z)
        x.mul_(signal[t].view(-1, 1, 1, 1))
        return torch.addcmul(x, z, noise[t].view(-1, 1, 1, 1), out=x)

    def check() -> None:
        got = [tensor.clone() for tensor in ours()]  # type: ignore[attr-defined]
        numbers[1] -= 1
        with use("reference"):
            expected = ours()
        bound = 4e-6 if kind == torch.float32 else 2 * torch.finfo(kind).eps
        for a, b in zip(got, expected, strict=True):  # type: ignore[call-overload]
            torch.testing.assert_close(a, b, rtol=bound, atol=bound)

    moved = batch * 2 * (latents[0].numel() + prompts[0].numel()) * kind.itemsize
    return Benchmark(
        "noise_gather", f"SD-1.5 4x64x64 77x768 B={batch}", dtype, moved, ours, check, {"literal": literal}
    )


# Widths of the stages of a U-Net of Stable Diffusion 1.5; a block is a resnet with its time projection, a transformer.
SD15_WIDTHS = (320, 640, 1280)


def _block(width: int) -> list[tuple[int, ...]]:
    resnet = [(width,), (width,), (width, width, 3, 3), (width,), (width, 1280), (width,)]
    resnet += [(width,), (width,), (width, width, 3, 3), (width,)]
    attention = [(width,), (width,), *[(width, width)] * 4, (width,), (width, width), (width,)]
    cross = [(width, width), (width, 768), (width, 768), (width, width), (width,)]
    return [*resnet, *attention, *cross, (8 * width, width), (8 * width,), (width, 4 * width), (width,)]


def sd15_weights() -> list[tuple[int, ...]]:
    """The shapes of one block of each width."""
    return [shape for width in SD15_WIDTHS for shape in _block(width)]


def _adamw_ema(batch: int, dtype: str, compiled: bool) -> Benchmark:
    """One block of each width; bf16 is bf16 weights and gradients with fp32 masters."""
    kind = DTYPES[dtype]
    g = torch.Generator().manual_seed(0)
    shapes = sd15_weights()
    weights = [torch.randn(s, generator=g) for s in shapes]
    grads = [torch.randn(s, generator=g) for s in shapes]

    def parameters() -> list[Tensor]:
        made = [w.to(kind, copy=True).requires_grad_() for w in weights]
        for p, grad in zip(made, grads, strict=True):
            p.grad = grad.to(kind, copy=True)
        return made

    def rival(fused: bool | None, foreach_average: bool) -> Callable[[], object]:
        held = parameters()
        masters = [p.detach().float().requires_grad_() for p in held] if kind != torch.float32 else held
        averages = [p.detach().clone() for p in masters]
        optimizer = torch.optim.AdamW(masters, lr=1e-5, fused=fused)

        @torch.no_grad()
        def run() -> None:
            if masters is not held:
                for p, master in zip(held, masters, strict=True):
                    master.grad = p.grad.float()  # type: ignore[union-attr]
            torch.nn.utils.clip_grad_norm_(masters, 1.0)
            optimizer.step()
            if foreach_average:
                torch._foreach_lerp_(averages, masters, 1e-4)
            else:
                for average, p in zip(averages, masters, strict=True):
                    average.lerp_(p, 1e-4)
            if masters is not held:
                torch._foreach_copy_(held, masters)

        return run

    optimizer = AdamWEMA(parameters(), lr=1e-5, max_norm=1.0, ema_decay=0.9999)

    def check() -> None:
        results = []
        for kernel in (None, "reference"):
            some = [w[:8].to(kind, copy=True).requires_grad_() for w in weights]
            small = AdamWEMA(some, lr=1e-3, max_norm=1.0, ema_decay=0.9999)
            for p, grad in zip(some, grads, strict=True):
                p.grad = grad[:8].to(kind)
            with use(kernel):
                small.step()
            results.append([t for p in some for t in small.state[p].values()])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)

    count = sum(w.numel() for w in weights)
    rivals = {"default": rival(None, False), "fused, foreach EMA": rival(True, True)}
    moved = count * (4 + 4 * 8 + 4 if kind == torch.float32 else 2 + 4 * 8 + 2 + 2)  # norm, four arrays, gradient, copy
    shape = f"SD-1.5 blocks 320 640 1280, {count / 1e6:.0f}M"
    return Benchmark("adamw_ema", shape, dtype, moved, optimizer.step, check, rivals)


WITHOUT_BATCH = {"adamw_ema"}
MAKERS: dict[str, Callable[[int, str, bool], Benchmark]] = {
    "adamw_ema": _adamw_ema,
    "feature_match": _feature_match,
    "noise_gather": _noise_gather,
}
