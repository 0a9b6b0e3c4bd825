# SPDX-License-Identifier: Apache-2.0
"""geglu under ``check_op``: every kernel, dtype and shape, against float64 and diffusers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastdistill.errors import InputError, KernelError
from fastdistill.ops import geglu, use
from fastdistill.ops.geglu.reference import gelu_and_slope
from tests.harness import (
    EPS,
    Case,
    assert_alike,
    check_fake,
    check_op,
    crossed,
    device_of,
    emulated,
    evaluate,
    generator,
    kernels_of,
    layouts,
)

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {"tokens": (2, 5, 48), "odd": (3, 1, 7, 26), "flat": (34,), "one": (1, 2), "large": (3, 2 * 1031)}
KERNELS = kernels_of("geglu")


def eager(x: Tensor, approximate: str) -> tuple[Tensor]:
    a, g = x.chunk(2, -1)
    return (a * F.gelu(g, approximate=approximate),)


def call(x: Tensor, approximate: str) -> tuple[Tensor]:
    return (geglu(x, approximate),)


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, approximate: str = "none") -> Case:
    x = 3 * torch.randn(shape, generator=generator(sum(shape)))
    return Case("geglu", (x.to(dtype).requires_grad_(), approximate), call, eager, eager)


@pytest.mark.parametrize("kernel", KERNELS)
@crossed("approximate, dtype, shape", ["none", "tanh"], FLOATS, SHAPES)
def test_values_and_contract(kernel: str, approximate: str, dtype: torch.dtype, shape: str) -> None:
    thorough = dtype == torch.float32 and shape == "tokens"
    compiled = ("aot_eager", "inductor") if thorough else ()
    check_op(make(SHAPES[shape], dtype, approximate), kernel, compiled=compiled, registration=thorough)


def eager_with_bias(x: Tensor, bias: Tensor) -> tuple[Tensor]:
    return eager(x + bias, "none")


def call_with_bias(x: Tensor, bias: Tensor) -> tuple[Tensor]:
    return (geglu(x + bias.detach(), bias=bias),)


def with_bias(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Case:
    x = 3 * torch.randn(shape, generator=generator(sum(shape)))
    bias = torch.randn(shape[-1:], generator=generator(1))
    inputs = x.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_()
    return Case("geglu", inputs, call_with_bias, eager_with_bias, eager_with_bias)


#: Rows for several programs, the last of which has fewer, and columns for several programs.
SUMMED = {**SHAPES, "rows": (5, 53, 6), "columns": (9, 2 * 520)}


@pytest.mark.parametrize("kernel", KERNELS)
@crossed("dtype, shape", FLOATS, SUMMED)
def test_gradient_of_a_bias(kernel: str, dtype: torch.dtype, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("fastdistill.ops.geglu.triton")
    monkeypatch.setattr(triton, "PROGRAMS", 16)
    thorough = dtype == torch.float32 and shape == "tokens"
    check_op(with_bias(SUMMED[shape], dtype), kernel, compiled=("aot_eager",) if thorough else (), registration=False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_bias_changes_no_other_bit(kernel: str) -> None:
    x, bias = with_bias((7, 26)).inputs
    with use(kernel):
        pairs = [evaluate(lambda x, b=b: (geglu(x, bias=b),), (x,), 1.0) for b in (None, bias.detach())]
        (y,), (dx, dbias) = evaluate(lambda x, bias: (geglu(x, bias=bias),), (x, bias), 1.0)
        (alone,) = torch.autograd.grad(geglu(x.detach(), bias=bias).sum(), bias)
    for (own,), (gradient,) in pairs:
        assert torch.equal(own, y) and torch.equal(gradient, dx)
    assert dbias.shape == alone.shape == bias.shape


@pytest.mark.parametrize("kernel", KERNELS)
def test_bias_of_another_dtype_and_of_nothing(kernel: str) -> None:
    x, bias = with_bias((7, 26)).inputs
    with use(kernel):
        (dbias,) = torch.autograd.grad(geglu(x.bfloat16(), bias=bias).float().square().sum(), bias)
        (nothing,) = torch.autograd.grad(geglu(x[:0], bias=bias).sum(), bias)
    assert dbias.dtype == torch.float32 and not nothing.any()


def test_second_derivative_by_a_bias() -> None:
    x, bias = with_bias((3, 8)).inputs
    found = []
    for function in (call_with_bias, eager_with_bias):
        (first,) = torch.autograd.grad(function(x, bias)[0].square().sum(), bias, create_graph=True)
        found.append([first, *torch.autograd.grad(first.square().sum(), (x, bias))])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kernel", KERNELS)
def test_layouts(kernel: str) -> None:
    x, approximate = make((2, 3, 4, 10)).inputs
    for _, moved in layouts(x):
        check_op(Case("geglu", (moved, approximate), call, eager, eager), kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_far_from_zero(kernel: str, approximate: str) -> None:
    """Where Phi is 0 or 1 and exp under- or overflows."""
    g = torch.cat([torch.linspace(-200, 200, 801), torch.tensor([-1e30, 1e30, 1e-30, 0.0])])
    x = torch.cat([torch.full((5, 161), 2.0), g.view(5, 161)], 1).requires_grad_()
    with use(kernel):
        (y,), (dx,) = evaluate(call, (x, approximate), 1.0)
    y, dx = y.flatten(), dx.view(5, 2, 161).transpose(0, 1).flatten(1)
    pairs = torch.stack([torch.full((801,), 2.0), g[:801]], -1).double().requires_grad_()
    (expected,), (d,) = evaluate(eager, (pairs, approximate), 1.0)
    # erf and tanh have an error of some EPS; the factors 2 and g (at most 5 without saturation) amplify it.
    bounds = {"rtol": 8 * EPS, "atol": 16 * EPS}
    torch.testing.assert_close(y[:801].double(), expected.flatten(), **bounds)
    torch.testing.assert_close(dx[:, :801].double(), d.T, **bounds)
    torch.testing.assert_close(y[801:], torch.tensor([0.0, 2e30, 1e-30, 0.0]), rtol=4 * EPS, atol=EPS)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_empty(kernel: str, shape: tuple[int, ...]) -> None:
    with use(kernel):
        (y,), (dx,) = evaluate(call, make(shape).inputs, 1.0)
    assert y.shape == (shape[0], shape[1] // 2) and dx.shape == shape


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "reference" and not emulated(k)])
def test_same_bits_for_any_number_of_threads(kernel: str) -> None:
    case, before, results = make((37, 74)), torch.get_num_threads(), []
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            with use(kernel):
                results.append(evaluate(call, case.inputs, 1.0))
    finally:
        torch.set_num_threads(before)
    for (y,), (dx,) in results[1:]:
        assert torch.equal(y, results[0][0][0]) and torch.equal(dx, results[0][1][0])


def test_a_layer_of_diffusers() -> None:
    activations = pytest.importorskip("diffusers.models.activations")
    torch.manual_seed(0)
    layer, x = activations.GEGLU(12, 20), torch.randn(2, 5, 12, requires_grad=True)
    exact, y = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    outputs = [geglu(layer.proj(x)), layer(x), exact(y)]
    wanted = [[x, *layer.parameters()]] * 2 + [[y, *exact.parameters()]]
    gradients = [torch.autograd.grad(out.square().sum(), of) for out, of in zip(outputs, wanted, strict=True)]
    assert_alike(*outputs)
    assert_alike(*gradients, factor=3.0)


@pytest.mark.parametrize("tanh", [False, True])
def test_slope_of_the_reference(tanh: bool) -> None:
    g = torch.linspace(-5, 5, 41, dtype=torch.float64, requires_grad=True)
    value, slope = gelu_and_slope(g, tanh)
    (expected,) = torch.autograd.grad(value.sum(), g)
    torch.testing.assert_close(slope, expected, rtol=0, atol=16 * torch.finfo(torch.float64).eps)  # of slopes up to 1.1


@pytest.mark.parametrize("kernel", KERNELS)
def test_far_below_0_no_digits_are_lost(kernel: str) -> None:
    """Relative to gelu itself, which a relative change of g moves by 1 + g^2 of it."""
    g = torch.linspace(-12, -0.5, 999, device=device_of(kernel))
    x = torch.cat([torch.ones_like(g), g]).requires_grad_()
    with use(kernel):
        y = call(x, "none")[0]
    (dx,) = torch.autograd.grad(y.sum(), x)
    wide = g.double()
    below, density = torch.special.erfc(-wide / 2**0.5) / 2, (-wide * wide / 2).exp() / (2 * torch.pi) ** 0.5
    condition = 4 * EPS * (1 + wide * wide)
    gelu, slope = wide * below, below + wide * density
    for got in (y.detach(), dx[: len(g)]):
        assert bool(((got - gelu).abs() <= condition * gelu.abs()).all())
    assert bool(((dx[len(g) :] - slope).abs() <= condition * (below + density * wide.abs())).all())


def test_fake_cuda_tensors() -> None:
    check_fake(make((2, 8), torch.bfloat16), "cuda")


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "reference"])
def test_layouts_that_kernels_refuse(kernel: str) -> None:
    with use(kernel), pytest.raises(KernelError, match="tensors must be contiguous and of one dtype"):
        torch.ops.fastdistill.geglu(torch.ones(4, 6).T, False, torch.empty(6, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None,), "x: expected a tensor, got NoneType"),
        ((torch.ones(4).double(),), "x: expected dtype float32 or bfloat16 or float16, got float64"),
        ((torch.ones(2, 5),), r"x: expected an even last dimension, got \(2, 5\)"),
        ((torch.ones(2, 4), "erf"), "approximate: expected one of none, tanh, got 'erf'"),
    ],
)
def test_bad_input(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        geglu(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (1.0, "bias: expected a tensor, got float"),
        (torch.ones(3), r"bias: expected one number a column \(4,\), got \(3,\)"),
        (torch.ones(4).double(), "bias: expected dtype float32 or bfloat16 or float16, got float64"),
        (torch.ones(4, device="meta"), r"bias: expected the device of x \(cpu\), got meta"),
    ],
)
def test_bad_bias(bias: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        geglu(torch.ones(2, 4), bias=bias)  # type: ignore[arg-type]
