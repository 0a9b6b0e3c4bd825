# SPDX-License-Identifier: Apache-2.0
"""layer_norm_modulate under ``check_op``: every kernel, dtype, shape and option, against float64 and diffusers."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastdistill.errors import InputError, KernelError
from fastdistill.ops import layer_norm_modulate, residual_layer_norm_modulate, use
from fastdistill.ops.layer_norm_modulate import layer_norm_beside
from tests.harness import (
    Case,
    assert_alike,
    check_fake,
    check_op,
    crossed,
    detached,
    emulated,
    evaluate,
    generator,
    kernels_of,
    layouts,
)

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {"tokens": (2, 5, 32), "odd": (3, 7, 13), "4d": (2, 3, 2, 24), "no rows": (3, 20), "long": (2, 37, 70)}
NAMES = ("gate", "scale", "shift", "weight", "bias")
MODULATED = ("scale", "shift")
KERNELS = kernels_of("layer_norm_modulate")
Given = tuple[Tensor | None, ...]


def over(t: Tensor | None, x: Tensor, default: float) -> Tensor | float:
    return default if t is None else t.to(x.dtype).reshape(-1, *[1] * (x.dim() - 2), x.shape[-1])


def eager(x: Tensor, h: Tensor | None, given: Given, eps: float) -> tuple[Tensor, ...]:
    """The code of a user, in the dtype of x."""
    gate, scale, shift, weight, bias = given
    s = x if h is None else x + over(gate, x, 1.0) * h
    if weight is None and bias is not None:  # F.layer_norm has no gradient for this
        weight = torch.ones_like(bias)
    w, b = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    y = F.layer_norm(s, s.shape[-1:], w, b, eps) * (1 + over(scale, x, 0.0)) + over(shift, x, 0.0)
    return (y,) if h is None else (y, s)


def call(x: Tensor, h: Tensor | None, given: Given, eps: float) -> tuple[Tensor, ...]:
    gate, scale, shift, weight, bias = given
    if h is None:
        return (layer_norm_modulate(x, scale, shift, weight, bias, eps),)
    return residual_layer_norm_modulate(x, h, gate, scale, shift, weight, bias, eps)


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    names: tuple[str, ...] = NAMES,
    small: torch.dtype | None = None,
    mean: float = 0.5,
    residual: bool = True,
    grad: bool = True,
) -> Case:
    g = generator(sum(shape))
    x = (mean + torch.randn(shape, generator=g)).to(dtype).requires_grad_(grad)
    h = torch.randn(shape, generator=g).to(dtype).requires_grad_(grad) if residual else None
    given = []
    for name in NAMES:
        size = (shape[-1],) if name in ("weight", "bias") else (shape[0], shape[-1])
        value = (0.5 * torch.randn(size, generator=g) + (name == "weight")).to(small or dtype)
        given.append(value.requires_grad_(grad) if name in names else None)
    return Case("layer_norm_modulate", (x, h, tuple(given), 1e-6), call, eager, eager)


@pytest.mark.parametrize("kernel", KERNELS)
@crossed("residual, dtype, shape", [False, True], FLOATS, SHAPES)
def test_values_and_contract(kernel: str, residual: bool, dtype: torch.dtype, shape: str) -> None:
    thorough = dtype == torch.float32 and shape in ("tokens", "odd")
    check_op(
        make(SHAPES[shape], dtype, NAMES if residual else NAMES[1:], residual=residual),
        kernel,
        compiled=("aot_eager", "inductor") if thorough and shape == "tokens" else ("aot_eager",) if thorough else (),
        registration=thorough,
    )


@pytest.mark.parametrize("kernel", KERNELS)
@crossed("residual, names", [False, True], [MODULATED, (), ("weight", "bias"), ("bias", "shift"), ("scale",)])
def test_options(kernel: str, residual: bool, names: tuple[str, ...]) -> None:
    check_op(make((2, 6, 19), names=names, residual=residual), kernel, compiled=("aot_eager",))


def call_beside(x: Tensor, h: Tensor | None, given: Given, eps: float) -> tuple[Tensor, ...]:
    y, same = layer_norm_beside(x, *given[1:], eps)
    return y, 2 * same


def eager_beside(x: Tensor, h: Tensor | None, given: Given, eps: float) -> tuple[Tensor, ...]:
    return *eager(x, h, given, eps), 2 * x


@pytest.mark.parametrize("kernel", KERNELS)
@crossed("dtype, names", FLOATS, [NAMES[1:], ()])
def test_the_gradient_of_what_is_beside(kernel: str, dtype: torch.dtype, names: tuple[str, ...]) -> None:
    """Of the residual, added in the pass of the backward."""
    case = make((2, 6, 19), dtype, names, residual=False)
    case = Case(case.op, case.inputs, call_beside, eager_beside, eager_beside)
    check_op(case, kernel, compiled=("aot_eager",) if dtype == torch.float32 else (), registration=False)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_weights_beside_half_precision(kernel: str, dtype: torch.dtype) -> None:
    check_op(make((2, 9, 24), dtype, small=torch.float32), kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_mean_far_above_the_deviation(kernel: str) -> None:
    """Where E[x^2] - E[x]^2 has no correct digit in float32."""
    for residual in (False, True):
        case = make((2, 6, 50), names=MODULATED, mean=3000.0, residual=residual)
        check_op(case, kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_layouts(kernel: str) -> None:
    x, h, *rest = make((2, 3, 4, 10)).inputs
    for (_, one), (_, other) in zip(layouts(x), reversed(list(layouts(h))), strict=True):
        case = Case("layer_norm_modulate", (one, other, *rest), call, eager, eager)
        check_op(case, kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_chunks_of_a_projection(kernel: str) -> None:
    """[B, 1, D] with the row stride of six chunks, as in PixArt and DiT."""
    x, h, (*_, weight, bias), eps = make((3, 5, 8)).inputs
    chunks = [t.requires_grad_() for t in torch.randn(3, 6, 8).chunk(6, 1)]
    given = (*chunks[1:4], weight, bias)
    check_op(Case("layer_norm_modulate", (x, h, given, eps), call, eager, eager), kernel, compiled=("aot_eager",))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone(kernel: str, used: int) -> None:
    """The last block does not use y, a block without a residual stream does not use s."""

    def one(*inputs: object) -> tuple[Tensor]:
        return (call(*inputs)[used],)  # type: ignore[arg-type]

    def expected(*inputs: object) -> tuple[Tensor]:
        y, s = eager(*inputs)  # type: ignore[arg-type]
        return (y + 0 * s if used == 0 else s + 0 * y,)

    case = Case("layer_norm_modulate", make((2, 5, 12)).inputs, one, expected, expected)
    check_op(case, kernel, compiled=("aot_eager",), registration=False)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0)])
def test_empty(kernel: str, shape: tuple[int, ...]) -> None:
    case = make(shape)
    with use(kernel):
        (y, s), gradients = evaluate(call, case.inputs, 1.0)
    assert y.shape == s.shape == shape
    assert [g.shape for g in gradients] == [shape, shape, *(t.shape for t in case.inputs[2])]
    assert all(g.count_nonzero() == 0 for g in gradients)


@pytest.mark.parametrize("kernel", KERNELS)
def test_only_what_is_wanted(kernel: str) -> None:
    x, h, given, eps = make((2, 5, 9), grad=False).inputs
    with use(kernel):
        assert not any(t.requires_grad for t in call(x, h, given, eps))
        full = evaluate(call, make((2, 5, 9)).inputs, 1.0)[1]
        for i in range(5):
            some = tuple(t.clone().requires_grad_(i == j) for j, t in enumerate(given))
            y, s = call(x, h, some, eps)
            assert torch.equal(torch.autograd.grad(y.sum() + s.sum(), some[i])[0], full[2 + i])


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k == "triton"])
def test_long_chunks_of_the_triton_kernel(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("fastdistill.ops.layer_norm_modulate.triton"), "PROGRAMS", 1)
    check_op(make((2, 37, 70)), kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k == "triton"])
@pytest.mark.parametrize(("rows", "held"), [(37, 64), (8, 64), (3, 64), (7, 32)])
def test_several_rows_of_a_program(kernel: str, rows: int, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the last program of a sample has fewer."""
    module = importlib.import_module("fastdistill.ops.layer_norm_modulate.triton")
    monkeypatch.setattr(module, "HELD", held)
    monkeypatch.setattr(module, "MANY", 1)
    for residual in (True, False):
        check_op(
            make((2, rows, 470), names=NAMES[not residual :], residual=residual),
            kernel,
            compiled=(),
            registration=False,
        )


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_a_gate_both_summands_have_one_gradient(kernel: str) -> None:
    x, h, given, eps = make((2, 5, 12), names=("weight", "bias")).inputs
    with use(kernel):
        y, s = call(x, h, given, eps)
        dx, dh = torch.autograd.grad((y * s).sum(), [x, h])
    assert torch.equal(dx, dh)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "reference" and not emulated(k)])
def test_same_bits_for_any_number_of_threads(kernel: str) -> None:
    case, before, results = make((3, 101, 70)), torch.get_num_threads(), []
    check_op(case, kernel, compiled=(), registration=False)
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            with use(kernel):
                results.append(evaluate(call, detached(case.inputs), 1.0))
    finally:
        torch.set_num_threads(before)
    for outputs, gradients in results[1:]:
        for one, two in zip([*outputs, *gradients], [*results[0][0], *results[0][1]], strict=True):
            assert torch.equal(one, two)


def test_a_norm_of_diffusers() -> None:
    normalization = pytest.importorskip("diffusers.models.normalization")
    torch.manual_seed(0)
    norm = normalization.AdaLayerNormZero(12)
    x, embedded = torch.randn(2, 5, 12, requires_grad=True), torch.randn(2, 12)
    shift, scale, *_ = norm.linear(norm.silu(embedded)).chunk(6, dim=1)
    got = layer_norm_modulate(x, scale, shift, eps=norm.norm.eps)
    exact, y = copy.deepcopy(norm).double(), x.detach().double().requires_grad_()
    outputs = [got, norm(x, emb=embedded)[0], exact(y, emb=embedded.double())[0]]
    wanted = [[x, *norm.parameters()]] * 2 + [[y, *exact.parameters()]]
    gradients = [torch.autograd.grad(out.square().sum(), of) for out, of in zip(outputs, wanted, strict=True)]
    assert_alike(*outputs)
    assert_alike(*gradients, factor=3.0)


def test_fake_cuda_tensors() -> None:
    check_fake(make((2, 3, 8), torch.bfloat16), "cuda")


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "reference"])
def test_layouts_that_kernels_refuse(kernel: str) -> None:
    x = torch.ones(2, 6, 4).transpose(1, 2)
    statistics = torch.empty(2, 2, 4)
    with use(kernel), pytest.raises(KernelError, match="must be contiguous and of one dtype"):
        torch.ops.fastdistill.layer_norm_modulate(
            x, None, None, None, None, None, None, 1e-6, torch.empty(2, 4, 6), [], *statistics
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": torch.ones(2, 3, 8).double()}, "x: expected dtype float32 or bfloat16 or float16, got float64"),
        ({"x": torch.ones(8)}, r"x: expected \[batch, ..., channels\], got \(8,\)"),
        ({"eps": -1.0}, "eps: expected a number >= 0, got -1.0"),
        ({"h": torch.ones(2, 3, 8).half()}, r"h: expected a tensor like x \(2, 3, 8\) torch.float32, got"),
        ({"h": None}, "h: expected a tensor, got NoneType"),
        ({"weight": torch.ones(7)}, r"weight: expected one number a channel \(8,\), got \(7,\)"),
        ({"gate": torch.ones(8)}, r"gate: expected one number a sample and channel \(2, 8\), got \(8,\)"),
        ({"scale": torch.ones(2, 3, 8)}, r"scale: expected one number a sample and channel \(2, 8\), got \(2, 3, 8\)"),
        ({"shift": torch.ones(2, 8, device="meta")}, r"shift: expected the device of x \(cpu\), got meta"),
    ],
)
def test_bad_input(options: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"x": torch.ones(2, 3, 8), "h": torch.ones(2, 3, 8)}
    with pytest.raises(InputError, match=message):
        residual_layer_norm_modulate(**(arguments | options))  # type: ignore[arg-type]
