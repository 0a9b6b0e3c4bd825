# SPDX-License-Identifier: Apache-2.0
"""add_bias under ``check_op``: every kernel, dtype and layout, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdistill.errors import InputError, KernelError
from fastdistill.ops import add_bias, use
from fastdistill.ops.add_bias import plus_bias, with_bias
from tests.harness import Case, check_fake, check_op, crossed, evaluate, generator, kernels_of, layouts

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {"map": (2, 70, 9, 8), "sequence": (3, 5, 7), "flat": (4, 130), "one": (1, 1, 1, 1), "cube": (1, 64, 2, 3, 2)}
KERNELS = kernels_of("add_bias")


def eager(x: Tensor, h: Tensor, bias: Tensor) -> tuple[Tensor]:
    return (x + (h + bias.reshape(-1, *[1] * (x.dim() - 2))),)


def call(x: Tensor, h: Tensor, bias: Tensor) -> tuple[Tensor]:
    return (add_bias(x, h, bias),)


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Case:
    inputs = [torch.randn(s, generator=generator(sum(s))) for s in (shape, shape, shape[1:2])]
    inputs[1] = inputs[1].flip(0) + 1
    moved = [t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 1 else t for t in inputs]
    return Case("add_bias", tuple(t.to(dtype).requires_grad_() for t in moved), call, eager, eager)


@pytest.mark.parametrize("kernel", KERNELS)
@crossed("dtype, shape", FLOATS, SHAPES)
def test_values_and_contract(kernel: str, dtype: torch.dtype, shape: str) -> None:
    thorough = dtype == torch.float32 and shape == "map"
    compiled = ("aot_eager", "inductor") if thorough else ()
    check_op(make(SHAPES[shape], dtype), kernel, compiled=compiled, registration=thorough)


@pytest.mark.parametrize("kernel", KERNELS)
@crossed("dtype, shape", FLOATS, SHAPES)
def test_without_x(kernel: str, dtype: torch.dtype, shape: str) -> None:
    _, h, bias = make(SHAPES[shape], dtype).inputs
    case = Case(
        "add_bias", (h, bias), lambda h, bias: (plus_bias(h, bias),),
        *[lambda h, bias: (h + bias.reshape(-1, *[1] * (h.dim() - 2)),)] * 2,
    )  # fmt: skip
    check_op(case, kernel, compiled=("aot_eager",) if dtype == torch.float32 else (), registration=False)


#: Rows and columns for several programs, and rows that are slices of wider ones.
ROWS = {"few": (5, 7), "one": (1, 1), "rows": (300, 6), "columns": (70, 130), "apart": (150, 70)}


@pytest.mark.parametrize("kernel", kernels_of("bias_gradient"))
@crossed("dtype, shape", FLOATS, ROWS)
def test_sums_of_rows(kernel: str, dtype: torch.dtype, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("fastdistill.ops.add_bias.triton")
    monkeypatch.setattr(triton, "PROGRAMS", 2)
    n, c = ROWS[shape]
    grad = torch.randn(n, 2 * c, generator=generator(n)).to(dtype)
    grad = grad[:, c:] if shape == "apart" else grad[:, c:].contiguous()
    exact, total = grad.double().sum(0), torch.empty(c, dtype=dtype)
    with use(kernel):
        torch.ops.fastdistill.bias_gradient(grad, total)
        again = torch.empty_like(total)
        torch.ops.fastdistill.bias_gradient(grad, again)
    eps = torch.finfo(dtype).eps
    assert torch.equal(total, again)
    size = grad.double().abs().sum(0).max().item()
    torch.testing.assert_close(total.double(), exact, rtol=eps, atol=4 * torch.finfo(torch.float32).eps * size)


@pytest.mark.parametrize("kernel", kernels_of("bias_gradient"))
def test_a_bias_that_was_added(kernel: str) -> None:
    """h keeps its values and gradients, also with a bias of another dtype and for second derivatives."""
    h = torch.randn(2, 5, 6, generator=generator(3)).requires_grad_()
    bias = torch.randn(6, generator=generator(4)).double().requires_grad_()
    bias = bias.detach().bfloat16().requires_grad_()
    with use(kernel):
        y = with_bias(h + bias.detach(), bias)
        dh, dbias = torch.autograd.grad(y.sin().sum(), (h, bias))
    expected = (h + bias.detach().float()).cos()
    assert torch.equal(y, h + bias.detach()) and torch.equal(dh, expected)
    torch.testing.assert_close(dbias.float(), expected.sum((0, 1)), rtol=1e-2, atol=1e-2)
    found = []
    for function in (lambda h, b: with_bias(h + b.detach(), b), lambda h, b: h + b):
        inputs = [t.detach().double().requires_grad_() for t in (h, bias)]
        first = torch.autograd.grad(function(*inputs).pow(3).sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))  # type: ignore[arg-type]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_layouts(kernel: str) -> None:
    x, h, bias = make((2, 3, 4, 6)).inputs
    for _, moved in layouts(x):
        case = Case("add_bias", (moved, h, bias), call, eager, eager)
        check_op(case, kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_result_lies_as_its_inputs(kernel: str) -> None:
    x, h, bias = make((2, 6, 4, 5)).inputs
    with use(kernel):
        y = add_bias(x, h, bias)
    assert y.stride() == x.stride() and y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(0, 8, 2, 2), (3, 4, 0, 2)])
def test_empty(kernel: str, shape: tuple[int, ...]) -> None:
    with use(kernel):
        (y,), gradients = evaluate(call, make(shape).inputs, 1.0)
    assert y.shape == shape and not gradients[2].any()


def test_of_what_is_frozen() -> None:
    x, h, bias = (t.detach() for t in make((2, 6, 4, 5)).inputs)
    for learned in (x, h, bias):
        learned.requires_grad_()
        (gradient,) = torch.autograd.grad(add_bias(x, h, bias).sum(), learned)
        torch.testing.assert_close(gradient, torch.full_like(gradient, 40.0 if learned is bias else 1.0))
        learned.requires_grad_(False)


def test_second_derivative() -> None:
    found = []
    for function in (call, eager):
        inputs = make((2, 3, 2, 2)).inputs
        first = torch.autograd.grad(function(*inputs)[0].pow(3).sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))  # type: ignore[arg-type]
    torch.testing.assert_close(*found)


def test_bias_of_another_dtype() -> None:
    x, h, bias = make((2, 6, 4, 5), torch.bfloat16).inputs
    bias = bias.detach().float().requires_grad_()
    (gradient,) = torch.autograd.grad(add_bias(x, h, bias).float().square().sum(), bias)
    assert gradient.dtype == torch.float32


def test_fake_cuda_tensors() -> None:
    check_fake(make((2, 8, 3, 3), torch.bfloat16), "cuda")


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "reference"])
def test_layouts_that_kernels_refuse(kernel: str) -> None:
    x = torch.ones(4, 6)
    with use(kernel), pytest.raises(KernelError, match="tensors must be contiguous"):
        torch.ops.fastdistill.add_bias(x.T, x.T, torch.ones(4), torch.empty(6, 4))


X, H, B = torch.ones(2, 4, 3), torch.ones(2, 4, 3), torch.ones(4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, H, B), "x: expected a tensor, got NoneType"),
        ((X.double(), H.double(), B), "x: expected dtype float32 or bfloat16 or float16, got float64"),
        ((torch.ones(4), H, B), r"x: expected \[batch, channels, \*positions\], got \(4,\)"),
        ((X, H[:, :3], B), r"h: expected the shape of x \(2, 4, 3\), got \(2, 3, 3\)"),
        ((X, H.half(), B), "h: expected dtype float32, got float16"),
        ((X, H, B[:3]), r"bias: expected one number a channel \(4,\), got \(3,\)"),
        ((X, H, B.to("meta")), r"bias: expected the device of x \(cpu\), got meta"),
    ],
)
def test_bad_input(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        add_bias(*arguments)  # type: ignore[arg-type]
