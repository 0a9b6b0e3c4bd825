# SPDX-License-Identifier: Apache-2.0
"""Compiles every Triton kernel for the smallest sizes: ``python -m tests.build.ones``.

Triton turns an argument of 1 into a constant, which has no methods. Neither its interpreter nor the sizes of real
models show if a kernel uses such a method.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.kernels.triton import rows

FLOAT, DOUBLE, INDEX = torch.float32, torch.float64, torch.int64


def _module(op: str) -> Any:
    return importlib.import_module(f"fastdistill.ops.{op}.triton")


def _ones(*dimensions: int, dtype: torch.dtype = FLOAT) -> list[Tensor]:
    """Tensors with one element and these numbers of dimensions."""
    return [torch.empty((1,) * n, dtype=dtype, device="meta") for n in dimensions]


def _noise_gather(ring: int, with_replacement: bool) -> None:
    numbers, table, (x_t, target, prompt) = _ones(*[1] * 8, dtype=INDEX), _ones(2), _ones(2, 2, 2)
    _module("noise_gather").noise_gather(
        *_ones(2), numbers[0], _ones(2), *table, *numbers[1:3], 1, 1, ring, ring, 1, 1, 1, with_replacement, x_t,
        numbers[3], [prompt], target, *numbers[4:7],
    )  # fmt: skip


def _feature_match(distance: int) -> None:
    student, teacher, grads = (_ones(2) for _ in range(3))
    loss, scale, weights, taps = _ones(0, 0, 1, 1)
    _module("feature_match").feature_match(student, teacher, weights, scale, distance, 1.0, loss, taps, grads)


def _output_match() -> None:
    student, teacher, unconditional, x_t, latents, coefficients, samples, grad = _ones(*[2] * 8)
    time, index, choice, counter = _ones(*[1] * 4, dtype=INDEX)
    guidance, weights, scale, loss, parts = _ones(1, 1, 0, 0, 1)
    _module("output_match").output_match(
        student, teacher, unconditional, time, *_ones(2), guidance, weights, x_t, latents, index, choice, coefficients,
        counter, 1, 1, 1.0, 1.0, scale, False, 1.0, loss, parts, samples, grad,
    )  # fmt: skip


def _adamw_ema() -> None:
    lists = [_ones(1) for _ in range(5)]
    scalars, (total,), (skipped,) = _ones(0, 0, 0, 0, 0), _ones(0, dtype=DOUBLE), _ones(0, dtype=INDEX)
    step, rate, scale, found, weight = scalars
    _module("adamw_ema").adamw_ema(
        *lists, [], [step], [rate], total, scale, found, weight, skipped, [0], [0.9, 0.99, 1e-8, 0.1], 1.0, True, True
    )


def _group_norm_silu(backward: bool) -> None:
    (x, y), given, (mean, rstd) = _ones(3, 3), _ones(1, 1, 2, 2, 2), _ones(2, 2)
    module = _module("group_norm_silu")
    for whole in (module.WHOLE, 0):  # in one program, and in tiles
        with mock.patch.object(module, "WHOLE", whole):
            if backward:
                small = _ones(1, 1, 2, 2, 2)
                module.group_norm_silu_backward(x, x, *given, mean, rstd, 1, True, 31, y, small)
            else:
                module.group_norm_silu(x, *given, 1, 1e-5, True, y, mean, rstd)


def _layer_norm_modulate(backward: bool) -> None:
    (x, y), (gate, scale, shift, weight, bias), statistics = _ones(3, 3), _ones(2, 2, 2, 1, 1), _ones(2, 2)
    module = _module("layer_norm_modulate")
    if backward:
        small = _ones(2, 2, 2, 1, 1)
        module.layer_norm_modulate_backward(x, x, x, x, gate, scale, weight, bias, *statistics, 31, y, _ones(3), small)
    else:
        module.layer_norm_modulate(x, x, gate, scale, shift, weight, bias, 1e-6, y, _ones(3), *statistics)


def _cross_attention(keys: int, backward: bool) -> None:
    (q, out), (k, v) = _ones(4, 4), (torch.empty(1, keys, 1, 1, device="meta") for _ in range(2))
    masks, module = (torch.empty(1, keys, device="meta"), *_ones(1, dtype=INDEX)), _module("cross_attention")
    if backward:
        module.cross_attention_backward(q, k, v, *masks, 1.0, q, out, torch.empty_like(k), torch.empty_like(v))
    else:
        module.cross_attention(q, k, v, *masks, 1.0, out)


def _geglu(backward: bool) -> None:
    x, y = torch.empty(1, 2, device="meta"), torch.empty(1, 1, device="meta")
    if backward:
        _module("geglu").geglu_backward(y, x, False, x)
        _module("geglu").geglu_backward(y, x, False, x, [torch.empty(2, device="meta")])
    else:
        _module("geglu").geglu(x, False, y)


LAUNCHES: dict[str, Callable[[], None]] = {
    "noise_gather": lambda: _noise_gather(0, False),
    "noise_gather staged": lambda: _noise_gather(1, False),
    "noise_gather with replacement": lambda: _noise_gather(0, True),
    **{f"feature_match {distance}": lambda distance=distance: _feature_match(distance) for distance in range(4)},
    "scale_gradients": lambda: _module("feature_match").scale_gradients(_ones(2), *_ones(0)),
    "output_match": _output_match,
    "adamw_ema": _adamw_ema,
    **{
        f"{name}{'_backward' * backward}": lambda launch=launch, backward=backward: launch(backward)
        for backward in (False, True)
        for name, launch in (
            ("group_norm_silu", _group_norm_silu),
            ("layer_norm_modulate", _layer_norm_modulate),
            ("geglu", _geglu),
        )
    },
    **{
        f"cross_attention{'_backward' * backward} {keys}": lambda keys=keys, backward=backward: _cross_attention(
            keys, backward
        )
        for backward in (False, True)
        for keys in (1, 512)
    },
    "add_bias": lambda: _module("add_bias").add_bias(*_ones(2, 2, 1, 2)),
    "bias_gradient": lambda: _module("add_bias").bias_gradient(*_ones(2, 1)),
    "quantize_rows": lambda: _module("quantize_rows").quantize_rows(
        *_ones(2), False, *_ones(2, dtype=torch.float8_e4m3fn), *_ones(2)
    ),
    "grad_square_sum": lambda: _module("adamw_ema").grad_square_sum(_ones(1), *_ones(0, dtype=DOUBLE)),
}

if __name__ == "__main__":
    for row in rows(LAUNCHES, (90,)):
        print(row.op, row.kernel)
