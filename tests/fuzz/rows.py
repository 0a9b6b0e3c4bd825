# SPDX-License-Identifier: Apache-2.0
"""Arguments of the quantization of rows: among them rows of zeros, of subnormal and of the largest numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor

from fastdistill.ops import quantize_rows
from tests.fuzz.calls import Call
from tests.fuzz.tensors import Spec, limited, overlaps, plain, sizes, small_sizes, spec

LARGEST = 448.0  # of e4m3
LEAST = 2.0**-100  # a row of smaller numbers is quantized as if this were its largest magnitude
HALF_STEP = 2.0**-10  # of the smallest numbers of e4m3, which lie 2^-9 apart
MAGNITUDES = (1.0, 1.0, 0.0, 1e-44, 1e-38, 2.0**-100, 1e-20, 1e30, 1e38, math.inf, math.nan)


@dataclass(frozen=True)
class Rows(Spec):
    """A matrix whose rows are multiplied by these numbers, unless elements share memory."""

    magnitudes: tuple[float, ...] = ()

    def made(self, g: torch.Generator, values: str = "normal") -> Tensor:
        tensor = super().made(g, values)
        if not overlaps(tensor):
            for row, magnitude in zip(tensor, self.magnitudes, strict=True):
                row.mul_(magnitude)
        return tensor


def quantize_rows_call(draw: Any) -> Call:
    shape = limited((draw(small_sizes), draw(st.one_of(sizes, st.sampled_from((64, 127, 128, 129, 300))))))
    made = spec(draw, shape)
    made = made if draw(st.integers(0, 15)) == 15 else plain(made)
    magnitudes = tuple(draw(st.sampled_from(MAGNITUDES)) for _ in range(shape[0]))
    x: Any = Rows(**vars(made), magnitudes=magnitudes) if not made.grad else made

    def function(x: Any, gelu: Any) -> tuple[Tensor, ...]:
        q, scale = quantize_rows(x, gelu=gelu)
        if not x.is_meta:
            _check(x, gelu, q, scale)
        if gelu is not False:  # near a tie, the last bits of the GELU decide
            return scale, scale.new_empty(0)
        return scale, q.view(torch.uint8).where(q.float().isfinite(), 0x7F)  # a NaN of either sign

    def truth(x: Tensor, gelu: bool) -> tuple[Tensor, ...]:
        return _largest(_values(x, gelu)) / LARGEST, x.new_empty(0)  # the numbers are checked above

    return Call("quantize_rows", function, {"x": x, "gelu": draw(st.booleans())}, truth, kernels=("reference",))


def _values(x: Tensor, gelu: bool) -> Tensor:
    """In float64. torch's formula of the tanh GELU cancels far below 0."""
    x = x.double()
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)) if gelu else x


def _largest(values: Tensor) -> Tensor:
    if values.shape[1] == 0:
        return values.new_full((len(values), 1), LEAST)
    return values.abs().nan_to_num(nan=math.inf, posinf=math.inf).amax(1, keepdim=True).clamp_min(LEAST)


def _check(x: Tensor, gelu: bool, q: Tensor, scale: Tensor) -> None:
    """The error that the docstring promises; rows that are not finite have products that are NaN."""
    assert q.shape == x.shape and q.dtype == torch.float8_e4m3fn and q.is_contiguous()
    assert scale.shape == (len(x), 1) and scale.dtype == torch.float32 and bool((scale > 0).all())
    exact, got = _values(x.detach(), gelu), q.double()
    largest, product = _largest(exact), got * scale.double()
    fine = largest.isfinite().squeeze(1)
    assert bool(product[~fine].isnan().all()), "a row that is not finite has a finite product"
    slack = 4e-5 if gelu else 1e-6  # of quotient, product and GELU in float32, with exponents down to -70
    allowed = torch.maximum(exact.abs() / 16, HALF_STEP * scale.double()) * (1 + slack) + slack * largest
    wrong = ((product - exact).abs() > allowed)[fine] | ~product[fine].isfinite()
    assert not bool(wrong.any()), f"error {(product - exact)[fine][wrong][0]:.3e} of {exact[fine][wrong][0]:.3e}"
    full = fine & (largest > LEAST).squeeze(1)
    assert bool((got[full].abs().amax(1) == LARGEST).all()) if bool(full.any()) else True, "a row without 448"
