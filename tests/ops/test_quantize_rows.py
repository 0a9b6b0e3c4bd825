# SPDX-License-Identifier: Apache-2.0
"""quantize_rows: the numbers that e4m3 has nearest, a scale for each row, by every kernel."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastdistill.errors import InputError, KernelError
from fastdistill.ops import quantize_rows, use
from tests.harness import crossed, generator, kernels_of

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {"rows": (5, 48), "wide": (3, 1153), "one": (1, 1), "column": (4, 1)}
KERNELS = kernels_of("quantize_rows")
HALF_STEP = 2.0**-10  # of the smallest numbers of e4m3, which lie 2^-9 apart


def rows(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Of magnitudes that differ from row to row."""
    x = torch.randn(shape, generator=generator(sum(shape)))
    return (x * torch.logspace(-3, 3, shape[0])[:, None]).to(dtype)


@pytest.mark.parametrize("kernel", KERNELS)
@crossed("dtype, shape, gelu", FLOATS, SHAPES, [False, True])
def test_values(kernel: str, dtype: torch.dtype, shape: str, gelu: bool) -> None:
    x = rows(SHAPES[shape], dtype)
    with use(kernel):
        q, scale = quantize_rows(x, gelu=gelu)
        again = quantize_rows(x, gelu=gelu)
    assert q.shape == x.shape and q.dtype == torch.float8_e4m3fn
    assert scale.shape == (len(x), 1) and scale.dtype == torch.float32
    assert torch.equal(q.float(), again[0].float()) and torch.equal(scale, again[1])
    exact = F.gelu(x.double(), approximate="tanh") if gelu else x.double()
    largest = exact.abs().amax(1, keepdim=True)
    torch.testing.assert_close(scale.double(), largest / 448, rtol=1e-5 if gelu else 3e-7, atol=0)
    error = (q.double() * scale.double() - exact).abs()
    slack = 1e-5 if gelu else 1e-6  # of quotient, product and GELU in float32
    allowed = torch.maximum(exact.abs() / 16, HALF_STEP * scale.double()) * (1 + slack) + slack * largest
    assert (error <= allowed).all()
    assert (q.float().abs().amax(1) == 448).all()


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "reference"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_bits_of_the_reference(kernel: str, dtype: torch.dtype) -> None:
    """Ties, the smallest numbers and zeros too, and a quotient that is a tie if 448 / 184 is rounded once."""
    x = rows((6, 80), dtype)
    x[1], x[2, :3], x[3] = 0.0, torch.tensor([1.0, 17 / 16, 19 / 16], dtype=dtype), torch.linspace(-1, 1, 80)
    x[4, :2] = torch.tensor([184.0, -34.5], dtype=dtype)
    x[4, 2:] = 1.0
    with use("reference"):
        expected = quantize_rows(x)
    with use(kernel):
        q, scale = quantize_rows(x)
    assert torch.equal(q.view(torch.uint8), expected[0].view(torch.uint8)) and torch.equal(scale, expected[1])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible(kernel: str, wrong: float) -> None:
    x = rows((3, 20))
    x[1, 7] = wrong
    with use(kernel):
        q, scale = quantize_rows(x)
    product = (q.float() * scale) @ torch.ones(20)
    assert product.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("kernel", KERNELS)
def test_tiny_and_huge_rows(kernel: str) -> None:
    x = torch.tensor([[0.0, 0.0], [1e-44, -1e-44], [3e38, 1e38]])
    with use(kernel):
        q, scale = quantize_rows(x)
    assert scale.isfinite().all() and (scale > 0).all() and q.float().isfinite().all()
    assert not q[:2].float().any() and q[2].float().tolist() == [448.0, 144.0]


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_tail_of_gelu(kernel: str) -> None:
    x = -torch.arange(1.0, 10.0)[:, None].expand(9, 3)
    with use(kernel):
        q, scale = quantize_rows(x, gelu=True)
    u = math.sqrt(2 / math.pi) * (x.double() + 0.044715 * x.double() ** 3)
    exact = x.double() * (2 * u).sigmoid()
    torch.testing.assert_close(q.double() * scale.double(), exact, rtol=4e-5, atol=0)  # exponents down to -67


@pytest.mark.parametrize("kernel", KERNELS)
def test_layouts_and_empty_ones(kernel: str) -> None:
    x = rows((8, 12))
    with use(kernel):
        q, scale = quantize_rows(x.t().contiguous().t())
        for empty in (x[:0], x[:, :0]):
            assert quantize_rows(empty)[0].shape == empty.shape
        of_zeros = quantize_rows(torch.zeros(8, 1))[1]
        torch.full((8, 1), torch.nan)  # what memory that is used again may hold
        assert torch.equal(quantize_rows(x[:, :0])[1], of_zeros)
        expected = quantize_rows(x)
    assert torch.equal(q.float(), expected[0].float()) and torch.equal(scale, expected[1])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(kernel: str, backend: str) -> None:
    x = rows((4, 24))
    with use(kernel):
        q, scale = torch.compile(lambda t: quantize_rows(t, gelu=True), backend=backend)(x)
        expected = quantize_rows(x, gelu=True)
    torch.compiler.reset()
    assert torch.equal(q.float(), expected[0].float()) and torch.equal(scale, expected[1])


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "reference"])
def test_rows_that_the_kernel_refuses(kernel: str) -> None:
    x = torch.ones(1, 16385)
    with use(kernel), pytest.raises(KernelError, match="rows of 16385, where it takes up to 16384"):
        quantize_rows(x)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (None, "x: expected a tensor, got NoneType"),
        (torch.ones(2, 3).double(), "x: expected dtype float32 or bfloat16 or float16, got float64"),
        (torch.ones(3), r"x: expected \[N, C\], got \(3,\)"),
        (torch.ones(2, 3, requires_grad=True), "x: expected a tensor without gradient"),
    ],
)
def test_bad_input(x: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantize_rows(x)  # type: ignore[arg-type]


@pytest.mark.parametrize("gelu", [None, 1, "tanh", torch.tensor([True, False])])
def test_gelu_is_a_switch(gelu: object) -> None:
    with pytest.raises(InputError, match="gelu: expected True or False, got"):
        quantize_rows(torch.ones(2, 3), gelu=gelu)  # type: ignore[arg-type]
