# SPDX-License-Identifier: Apache-2.0
"""How real models launch the Triton kernels of norms and activations; see ``launches.py``."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch


def _module(op: str) -> Any:
    return importlib.import_module(f"fastdistill.ops.{op}.triton")


def _meta(shapes: Iterable[tuple[int, ...]]) -> list[torch.Tensor]:
    return [torch.empty(shape, device="meta") for shape in shapes]


def _norm(x: torch.Tensor, given: int) -> tuple[list[torch.Tensor | None], list[torch.Tensor]]:
    """weight, bias, time_bias, scale and shift of group_norm_silu (``given`` has a bit for each); mean and rstd."""
    sizes = [x.shape[1:2]] * 2 + [x.shape[:2]] * 3
    tensors = [torch.empty(s, dtype=x.dtype, device="meta") if given >> i & 1 else None for i, s in enumerate(sizes)]
    return tensors, _meta([(x.shape[0], 32)] * 2)


def _group_norm_silu(
    shape: tuple[int, ...], dtype: torch.dtype, last: bool, given: int = 7, silu: bool = True
) -> Callable[[], None]:
    def launch() -> None:
        layout = torch.channels_last if last else torch.contiguous_format
        x = torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
        tensors, statistics = _norm(x, given)
        _module("group_norm_silu").group_norm_silu(x, *tensors, 32, 1e-5, silu, torch.empty_like(x), *statistics)

    return launch


def _group_norm_silu_backward(
    shape: tuple[int, ...], dtype: torch.dtype, last: bool, given: int = 7, silu: bool = True
) -> Callable[[], None]:
    def launch() -> None:
        layout = torch.channels_last if last else torch.contiguous_format
        x = torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
        tensors, statistics = _norm(x, given)
        small = [torch.empty_like(t) for t in tensors if t is not None]
        _module("group_norm_silu").group_norm_silu_backward(
            torch.empty_like(x), x, *tensors, *statistics, 32, silu, given, torch.empty_like(x), small
        )

    return launch


def _layer_norm_modulate(
    backward: bool, dtype: torch.dtype, residual: bool, given: int, shape: tuple[int, ...] = (32, 1024, 1152)
) -> Callable[[], None]:
    """``given``: a bit for each of gate, scale, shift, weight and bias."""

    def launch() -> None:
        x, statistics = torch.empty(shape, dtype=dtype, device="meta"), _meta([shape[:2]] * 2)
        h, s = (x, [torch.empty_like(x)]) if residual else (None, [])
        sizes = [(shape[0], shape[2])] * 3 + [shape[2:]] * 2
        tensors = [torch.empty(z, dtype=dtype, device="meta") if given >> i & 1 else None for i, z in enumerate(sizes)]
        module = _module("layer_norm_modulate")
        if backward:
            small = [torch.empty_like(t) for t in tensors if t is not None]
            gate, scale, _, weight, bias = tensors
            h, s = (h, s) if gate is not None else (None, [])  # as the op passes them on
            module.layer_norm_modulate_backward(
                x,
                x if residual else None,
                x,
                h,
                gate,
                scale,
                weight,
                bias,
                *statistics,
                given,
                torch.empty_like(x),
                s,
                small,
            )
        else:
            module.layer_norm_modulate(x, h, *tensors, 1e-6, torch.empty_like(x), s, *statistics)

    return launch


def _geglu(dtype: torch.dtype, tanh: bool, backward: bool, summed: bool = False) -> Callable[[], None]:
    def launch() -> None:
        x, y = (torch.empty(32, 4096, width, dtype=dtype, device="meta") for width in (2560, 1280))
        if backward:
            _module("geglu").geglu_backward(y, x, tanh, x, [x[0, 0]] if summed else [])
        else:
            _module("geglu").geglu(x, tanh, y)

    return launch


def _add_bias(given: bool = True) -> None:
    x, bias = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((32, 64, 64, 320), (320,)))
    _module("add_bias").add_bias(x if given else None, x, bias, x)


def _bias_gradient() -> None:
    grad, total = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((131072, 320), (320,)))
    _module("add_bias").bias_gradient(grad, total)


def _quantize_rows(width: int, gelu: bool) -> Callable[[], None]:
    """Activations of PixArt's layers."""

    def launch() -> None:
        x, q = (torch.empty(32768, width, dtype=d, device="meta") for d in (torch.bfloat16, torch.float8_e4m3fn))
        scale = torch.empty(32768, 1, dtype=torch.float32, device="meta")
        _module("quantize_rows").quantize_rows(x, gelu, q, scale)

    return launch


LAUNCHES: dict[str, Callable[[], None]] = {
    **{
        f"{name}{suffix}": make(*arguments)
        for name, make in (
            ("group_norm_silu", _group_norm_silu),
            ("group_norm_silu_backward", _group_norm_silu_backward),
        )
        for suffix, arguments in {
            "": ((32, 320, 64, 64), torch.bfloat16, True),
            " fp32": ((32, 320, 64, 64), torch.float32, True),
            " contiguous": ((32, 320, 64, 64), torch.bfloat16, False),
            " whole group": ((32, 1280, 8, 8), torch.bfloat16, True),
            " scale and shift": ((32, 640, 32, 32), torch.float16, True, 27),
            " alone": ((32, 320, 4096), torch.bfloat16, False, 3, False),
        }.items()
    },
    **{
        f"layer_norm_modulate{'_backward' * backward}{suffix}": _layer_norm_modulate(backward, *arguments)
        for backward in (False, True)
        for suffix, arguments in {
            "": (torch.bfloat16, False, 6),
            " residual": (torch.bfloat16, True, 7),
            " residual fp32": (torch.float32, True, 7),
            " affine": (torch.float16, False, 24, (32, 4096, 320)),
            " affine residual": (torch.bfloat16, True, 24, (32, 4096, 320)),
        }.items()
    },
    **{
        f"geglu{'_backward' * backward}{suffix}": _geglu(dtype, tanh, backward)
        for backward in (False, True)
        for suffix, dtype, tanh in (
            ("", torch.bfloat16, False),
            (" fp32", torch.float32, False),
            (" tanh", torch.float16, True),
        )
    },
    "add_bias": _add_bias,
    "add_bias without x": functools.partial(_add_bias, False),
    "bias_gradient": _bias_gradient,
    "quantize_rows": _quantize_rows(1152, False),
    "quantize_rows gelu": _quantize_rows(4608, True),
    "geglu_backward bias": _geglu(torch.bfloat16, False, True, summed=True),
}
