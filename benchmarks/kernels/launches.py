# SPDX-License-Identifier: Apache-2.0
"""How real models launch the Triton kernels of each op: only shapes and dtypes; no memory is touched."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks.kernels import norms
from benchmarks.shapes import SD15_TAPS, sd15_weights

# Pooled embeddings of both text encoders, and the time ids (original size, crop, target size); a mask like PixArt's.
SDXL_PROMPTS = [
    ((77, 2048), torch.bfloat16), ((1280,), torch.bfloat16), ((6,), torch.float32), ((120,), torch.bool),
]  # fmt: skip


def _module(op: str) -> Any:
    return importlib.import_module(f"fastdistill.ops.{op}.triton")


def _noise_gather(
    dtype: torch.dtype,
    with_replacement: bool,
    target: bool,
    prompts: Iterable[tuple[tuple[int, ...], torch.dtype]] = (),
) -> Callable[[], None]:
    def launch() -> None:
        def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        batch, latent, rows = 64, (4, 64, 64), list(prompts) or [((77, 768), dtype)]
        x_t = empty(batch, *latent, dtype=dtype)
        _module("noise_gather").noise_gather(
            empty(10_000, *latent, dtype=dtype), empty(10_000), [empty(200_001, *s, dtype=d) for s, d in rows],
            empty(1000, 4, dtype=torch.float32), empty(1000), empty(2), 0, batch, 0, 0, 200_000, 200_000, 2**28,
            with_replacement, x_t, empty(batch), [empty(batch, *s, dtype=d) for s, d in rows],
            torch.empty_like(x_t) if target else empty(0, dtype=dtype), empty(batch), empty(batch), empty(batch),
        )  # fmt: skip

    return launch


def _feature_match(student: torch.dtype, teacher: torch.dtype, distance: int, gradient: bool) -> Callable[[], None]:
    def launch() -> None:
        def features(dtype: torch.dtype) -> list[torch.Tensor]:
            return [torch.empty((32, *shape), dtype=dtype, device="meta") for shape in SD15_TAPS]

        scalar = torch.empty((), device="meta")
        table = torch.empty(len(SD15_TAPS), device="meta")
        grads = features(student) if gradient else []
        module = _module("feature_match")
        module.feature_match(features(student), features(teacher), table, scalar, distance, 1e-6, scalar, table, grads)

    return launch


def _scale_gradients() -> None:
    grads = [torch.empty((32, *shape), dtype=torch.bfloat16, device="meta") for shape in SD15_TAPS]
    _module("feature_match").scale_gradients(grads, torch.empty((), device="meta"))


def _meta(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]


def _adamw_ema(dtype: torch.dtype, average: bool, zero_grads: bool) -> Callable[[], None]:
    def launch() -> None:
        shapes = sd15_weights()
        copies = _meta(shapes, dtype) if dtype != torch.float32 else []
        averages = _meta(shapes) if average else []
        scalar = torch.empty((), device="meta")
        (double,), (count,) = _meta([()], torch.float64), _meta([()], torch.int64)
        steps = _meta([()] * len(shapes))
        _module("adamw_ema").adamw_ema(
            _meta(shapes), _meta(shapes, dtype), _meta(shapes), _meta(shapes), averages, copies, steps, [scalar],
            double, scalar if average else None, None, scalar, count, [0] * len(shapes), [0.9, 0.999, 1e-8, 1e-2], 1.0,
            True, zero_grads,
        )  # fmt: skip

    return launch


def _grad_square_sum(dtype: torch.dtype) -> Callable[[], None]:
    return lambda: _module("adamw_ema").grad_square_sum(_meta(sd15_weights(), dtype), *_meta([()], torch.float64))


def _output_match(
    student: torch.dtype, teacher: torch.dtype, guided: bool, task: bool, huber: bool
) -> Callable[[], None]:
    def launch() -> None:
        batch, latent = 32, (4, 64, 64)
        (output,) = _meta([(batch, *latent)], student)
        conditional, unconditional = _meta([(batch, *latent)] * 2, teacher)
        floats, (scalar, parts, samples, table, coefficients) = (
            _meta([(batch,)] * 2), _meta([(), (2,), (batch, 2), (1000, 5), (1000, 4)])
        )  # fmt: skip
        time, index, choice, counter = _meta([(batch,)] * 3 + [(2,)], torch.int64)
        (latents,) = _meta([(10_000, *latent)], teacher)
        (nothing,) = _meta([(0,)])
        _module("output_match").output_match(
            output, conditional, unconditional if guided else nothing, time, table, floats[0] if guided else nothing,
            floats[1], nothing, *((latents, index, choice, coefficients, counter) if task else [nothing] * 5), 0, 4,
            1.0, 1.0, scalar, huber, 1.0, scalar, parts, samples, torch.empty_like(output),
        )  # fmt: skip

    return launch


def _cross_attention(
    dtype: torch.dtype, dim: int, keys: int, backward: bool, mask: torch.dtype | None = None, shared: bool = False
) -> Callable[[], None]:
    """Sixteen samples with 1024 queries and eight heads."""

    def launch() -> None:
        q, grad_out, grad_q = _meta([(16, 1024, 8, dim)] * 3, dtype)
        k, v, grad_k, grad_v = _meta([(1 if shared else 16, keys, 8, dim)] * 4, dtype)
        masks = _meta([(16, keys)], mask) if mask else [None]
        rows = _meta([(16,)], torch.int64) if shared else [None]
        module = _module("cross_attention")
        if backward:
            arguments = q, k, v, *masks, *rows, 0.1, grad_out, grad_q, grad_k, grad_v
            module.cross_attention_backward(*arguments)
        else:
            module.cross_attention(q, k, v, *masks, *rows, 0.1, grad_q)

    return launch


# (head dim, keys) of SD-1.5, SDXL, PixArt (alpha, sigma), Sana, and the limits.
CROSS_ATTENTION = {
    "SD-1.5 64x64": (40, 77),
    "SD-1.5 32x32": (80, 77),
    "SD-1.5 16x16": (160, 77),
    "SDXL": (64, 77),
    "PixArt 120": (72, 120),
    "PixArt 300": (72, 300),
    "Sana": (112, 300),
    "512 keys": (64, 512),
    "256 dims": (256, 512),
}


def _cross_attentions() -> dict[str, Callable[[], None]]:
    launches = {}
    for name, backward in (("cross_attention", False), ("cross_attention_backward", True)):
        for model, (dim, keys) in CROSS_ATTENTION.items():
            launches[f"{name} {model}"] = _cross_attention(torch.bfloat16, dim, keys, backward)
        launches[f"{name} fp16 bool mask shared rows"] = _cross_attention(
            torch.float16, 40, 77, backward, torch.bool, True
        )
        launches[f"{name} PixArt 300 bias"] = _cross_attention(torch.bfloat16, 72, 300, backward, torch.bfloat16)
        launches[f"{name} fp32 bias"] = _cross_attention(torch.float32, 80, 77, backward, torch.float32)
    return launches


LAUNCHES: dict[str, Callable[[], None]] = {
    "adamw_ema": _adamw_ema(torch.bfloat16, True, False),
    "adamw_ema fp32": _adamw_ema(torch.float32, True, True),
    "adamw_ema without average": _adamw_ema(torch.float16, False, True),
    "grad_square_sum": _grad_square_sum(torch.bfloat16),
    "grad_square_sum fp32": _grad_square_sum(torch.float32),
    **_cross_attentions(),
    "feature_match": _feature_match(torch.bfloat16, torch.bfloat16, 0, True),
    "feature_match fp32": _feature_match(torch.float32, torch.float32, 0, True),
    "feature_match mixed": _feature_match(torch.float32, torch.float16, 0, True),
    "feature_match normalized": _feature_match(torch.bfloat16, torch.bfloat16, 1, True),
    "feature_match huber": _feature_match(torch.bfloat16, torch.bfloat16, 2, True),
    "feature_match cosine": _feature_match(torch.bfloat16, torch.bfloat16, 3, True),
    "feature_match loss alone": _feature_match(torch.bfloat16, torch.bfloat16, 0, False),
    "scale_gradients": _scale_gradients,
    **norms.LAUNCHES,
    "output_match": _output_match(torch.bfloat16, torch.bfloat16, False, False, False),
    "output_match guided with a task": _output_match(torch.float32, torch.bfloat16, True, True, False),
    "output_match huber": _output_match(torch.float16, torch.float16, True, True, True),
    "noise_gather": _noise_gather(torch.bfloat16, False, False),
    "noise_gather SDXL": _noise_gather(torch.bfloat16, False, False, SDXL_PROMPTS),
    "noise_gather DiT": _noise_gather(torch.float32, False, False, [((), torch.int64)]),
    "noise_gather fp32": _noise_gather(torch.float32, False, False),
    "noise_gather with replacement and target": _noise_gather(torch.float16, True, True),
}
