# SPDX-License-Identifier: Apache-2.0
"""Quantizes rows to float8 (e4m3) with a scale for each row, the input of a float8 matrix product, in one pass.

    scale = max |x| / 448,    q = x / scale

For activations in front of a frozen linear layer (``fastdistill.models.float8``). It has no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.ops import _check, _native
from fastdistill.ops._dispatch import Kernel, later, register
from fastdistill.ops.quantize_rows import reference

WIDEST = 16384  # rows that the kernel keeps in registers
OLDEST = 8, 9  # the first GPUs with float8


def _refuse(x: Tensor, gelu: bool, q: Tensor, scale: Tensor) -> str | None:
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < OLDEST:
        return "the GPU has no float8"
    if x.dim() == 2 and x.shape[1] > WIDEST:
        return f"rows of {x.shape[1]}, where it takes up to {WIDEST}"
    return reference.refuse(x, gelu, q, scale)


_quantize_rows = register(
    "quantize_rows",
    "(Tensor x, bool gelu, Tensor(a!) q, Tensor(b!) scale)",
    summary="rows in float8 with a scale each, of x or of its tanh GELU",
    reference=reference.quantize_rows,
    kernels=[Kernel("triton", "cuda", later(f"{__name__}.triton", "quantize_rows"), _native.triton_reason, _refuse)],
)


def quantize_rows(x: Tensor, *, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """Each row divided by its scale, in float8 (e4m3); the scale makes the row's largest magnitude 448.

    Args:
        x: [N, C], float32, bfloat16 or float16, without gradient.
        gelu: quantize the tanh GELU of x instead, without rounding it before.

    Returns:
        q [N, C] float8_e4m3fn and scale [N, 1] float32: x is about q * scale. The error of an element is at most the
        larger of 1/16 of its magnitude and 2^-10 of the scale. A row with a NaN or an infinity has the scale infinity,
        so its products are NaN.

    Raises:
        InputError: the shape or dtype does not match, x requires gradient, or gelu is not True or False.
    """
    _check.tensors(x=x)
    _check.flag(gelu, "gelu")
    kind = _check.once(_checked, (x,), None)
    _check.constants(x=x)
    x = x.detach().contiguous()
    q = torch.empty_like(x, dtype=reference.FLOAT8)
    scale = x.new_empty((x.shape[0], 1), dtype=torch.float32)
    if x.numel():
        _quantize_rows(kind, x, gelu, q, scale)
    else:
        scale.fill_(reference.LEAST / reference.LARGEST)  # rows without elements have that of zeros
    return q, scale


def _checked(tensors: tuple[Tensor, ...], _: object = None) -> None:
    (x,) = tensors
    _check.dtype(x, "x", *_check.FLOATS)
    _check.shape(x, "x", (None, None), "[N, C]")
