# SPDX-License-Identifier: Apache-2.0
"""group_norm_silu under ``check_op``: every kernel, dtype, layout, shape and option, against float64 and diffusers."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastdistill.errors import InputError, KernelError
from fastdistill.ops import group_norm_silu, use
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
SHAPES = {
    "resnet": ((2, 32, 4, 4), 8),
    "odd": ((3, 15, 3, 7), 5),
    "3d": ((2, 12, 37), 3),
    "5d": ((1, 24, 2, 3, 5), 4),
    "no positions": ((3, 20), 4),
    "one group": ((2, 18, 5), 1),
    "group a channel": ((2, 6, 70), 6),
    "many channels": ((1, 160, 5, 5), 8),
}
NAMES = ("weight", "bias", "time_bias", "scale", "shift")
KERNELS = kernels_of("group_norm_silu")
Given = tuple[Tensor | None, ...]


def over(t: Tensor | None, x: Tensor, default: float) -> Tensor | float:
    return default if t is None else t.to(x.dtype).reshape(-1, x.shape[1], *[1] * (x.dim() - 2))


def eager(x: Tensor, given: Given, groups: int, eps: float, silu: bool) -> tuple[Tensor]:
    """The code of a user, in the dtype of x."""
    weight, bias, time_bias, scale, shift = given
    if weight is None and bias is not None:  # F.group_norm has no gradient for this
        weight = torch.ones_like(bias)
    w, b = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    z = F.group_norm(x + over(time_bias, x, 0.0), groups, w, b, eps)
    z = z * (1 + over(scale, x, 0.0)) + over(shift, x, 0.0)
    return (F.silu(z) if silu else z,)


def call(x: Tensor, given: Given, groups: int, eps: float, silu: bool) -> tuple[Tensor]:
    weight, bias, time_bias, scale, shift = given
    y = group_norm_silu(x, weight, bias, groups, eps, time_bias=time_bias, scale=scale, shift=shift, silu=silu)
    return (y,)


def make(
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype = torch.float32,
    names: tuple[str, ...] = NAMES,
    small: torch.dtype | None = None,
    silu: bool = True,
    mean: float = 0.5,
    grad: bool = True,
) -> Case:
    g = generator(sum(shape) + groups)
    x = (mean + torch.randn(shape, generator=g)).to(dtype).requires_grad_(grad)
    given = []
    for name in NAMES:
        size = (shape[1],) if name in ("weight", "bias") else (shape[0], shape[1])
        value = (0.5 * torch.randn(size, generator=g) + (name == "weight")).to(small or dtype)
        given.append(value.requires_grad_(grad) if name in names else None)
    return Case("group_norm_silu", (x, tuple(given), groups, 1e-5, silu), call, eager, eager)


@pytest.mark.parametrize("kernel", KERNELS)
@crossed("dtype, shape", FLOATS, SHAPES)
def test_values_and_contract(kernel: str, dtype: torch.dtype, shape: str) -> None:
    thorough = dtype == torch.float32 and shape in ("resnet", "odd")
    check_op(
        make(*SHAPES[shape], dtype),
        kernel,
        compiled=("aot_eager", "inductor") if thorough and shape == "resnet" else ("aot_eager",) if thorough else (),
        registration=thorough,
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("names", "silu"),
    [
        ((), True),
        (("weight", "bias"), False),
        (("weight", "bias", "time_bias"), True),
        (("weight", "bias", "scale", "shift"), True),
        (("bias", "shift"), True),
        (("weight", "scale"), False),
    ],
)
def test_options(kernel: str, names: tuple[str, ...], silu: bool) -> None:
    check_op(make((2, 16, 5, 3), 4, names=names, silu=silu), kernel, compiled=("aot_eager",))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_weights_beside_half_precision(kernel: str, dtype: torch.dtype) -> None:
    check_op(make((2, 16, 5, 3), 4, dtype, small=torch.float32), kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(2, 32, 5, 7), (2, 6, 1, 9), (3, 8, 1, 1), (2, 1, 13, 11)])
def test_layouts(kernel: str, shape: tuple[int, ...]) -> None:
    """The values are the same in any layout; output and gradient have the layout of x if it is a supported one."""
    names = NAMES if shape[1] > 1 else ("weight", "bias", "scale")  # one channel a group: time_bias has gradient 0
    case = make(shape, max(shape[1] // 4, 1), names=names)
    x, *rest = case.inputs
    for name, moved in layouts(x):
        compiled = ("aot_eager",) if name == "permuted" else ()
        check_op(Case(case.op, (moved, *rest), call, eager, eager), kernel, compiled=compiled, registration=False)
        with use(kernel):
            (y,), (dx, *_) = evaluate(call, detached((moved, *rest)), 1.0)
        if name in ("contiguous", "channels_last"):
            assert y.stride() == dx.stride() == moved.stride()


@pytest.mark.parametrize("kernel", KERNELS)
def test_channels_last_of_three_and_five_dimensions(kernel: str) -> None:
    for shape in ((2, 24, 11), (1, 24, 2, 3, 5)):
        x, *rest = make(shape, 4).inputs
        moved = x.detach().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_()
        check_op(Case("group_norm_silu", (moved, *rest), call, eager, eager), kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("last", [False, True])
def test_mean_far_above_the_deviation(kernel: str, last: bool) -> None:
    """Where E[x^2] - E[x]^2 has no correct digit in float32."""
    x, *rest = make((2, 16, 9, 11), 4, mean=3000.0).inputs
    if last:
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    check_op(Case("group_norm_silu", (x, *rest), call, eager, eager), kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if not emulated(k)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_parts_of_an_image_that_differ(kernel: str, dtype: torch.dtype) -> None:
    """Very different means at the ends of an image with several chunks; nearly all variance is between them."""
    x, *rest = make((2, 24, 31, 27), 4, dtype).inputs
    ramp = torch.linspace(-50.0, 50.0, 31)[:, None].expand(31, 27).round()
    for base in (x.detach() + ramp.to(dtype), (ramp + torch.zeros_like(x, dtype=torch.float32)).to(dtype)):
        moved = base.to(memory_format=torch.channels_last).requires_grad_()
        check_op(Case("group_norm_silu", (moved, *rest), call, eager, eager), kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_in_another_layout(kernel: str) -> None:
    """As the backward of a convolution may return it."""
    x, *rest = make((2, 8, 3, 5), 2).inputs
    grad = torch.randn(2, 8, 3, 5)
    with use(kernel):
        (y,) = call(x, *rest)
        expected = torch.autograd.grad(y, x, grad, retain_graph=True)[0]
        got = torch.autograd.grad(y, x, grad.to(memory_format=torch.channels_last))[0]
    assert torch.equal(got, expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_of_a_projection(kernel: str) -> None:
    """Slices of one projection, and one row for all samples."""
    x, (weight, bias, *_), *rest = make((3, 8, 6), 2).inputs
    given = (weight, bias, *(t.requires_grad_() for t in torch.randn(3, 24).chunk(3, 1)))
    check_op(Case("group_norm_silu", (x, given, *rest), call, eager, eager), kernel, compiled=(), registration=False)
    shared = torch.randn(1, 8).expand(3, 8)
    with use(kernel):
        (got,) = call(x, (weight, bias, shared, shared, None), *rest)
        (expected,) = call(x, (weight, bias, shared.clone(), shared.clone(), None), *rest)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)])
def test_empty(kernel: str, shape: tuple[int, ...]) -> None:
    case = make(shape, 2)
    with use(kernel):
        (y,), gradients = evaluate(call, case.inputs, 1.0)
    assert y.shape == shape
    assert [g.shape for g in gradients] == [shape, *(t.shape for t in case.inputs[1])]
    assert all(g.count_nonzero() == 0 for g in gradients)


@pytest.mark.parametrize("kernel", KERNELS)
def test_only_what_is_wanted(kernel: str) -> None:
    """A frozen block needs no gradient of its weights; a teacher needs none at all."""
    case = make((2, 8, 3, 3), 2, grad=False)
    x, given, *rest = case.inputs
    with use(kernel):
        assert not call(x, given, *rest)[0].requires_grad
        full = evaluate(call, make((2, 8, 3, 3), 2).inputs, 1.0)[1]
        for i in range(5):
            some = tuple(t.clone().requires_grad_(i == j) for j, t in enumerate(given))
            (y,) = call(x, some, *rest)
            assert torch.equal(torch.autograd.grad(y.sum(), some[i])[0], full[1 + i])


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that do not fit into a program of the Triton kernel are split into several tiles."""
    module = importlib.import_module("fastdistill.ops.group_norm_silu.triton")
    for name, value in {"WHOLE": 0, "TILE": 64, "SUMS": 16}.items():
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k == "triton"])
@pytest.mark.usefixtures("small_tiles")
@crossed("last, dtype", [False, True], FLOATS)
def test_tiles_of_the_triton_kernel(kernel: str, last: bool, dtype: torch.dtype) -> None:
    x, *rest = make((3, 12, 5, 7), 2, dtype, small=torch.float32).inputs
    if last:
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    check_op(Case("group_norm_silu", (x, *rest), call, eager, eager), kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k == "triton"])
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("options", [{"mean": 3000.0}, {"names": (), "silu": False}], ids=["far from zero", "plain"])
def test_tiles_with_options(kernel: str, options: dict[str, Any]) -> None:
    check_op(make((2, 12, 5, 7), 2, **options), kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "reference" and not emulated(k)])
@pytest.mark.parametrize("last", [False, True])
def test_same_bits_for_any_number_of_threads(kernel: str, last: bool) -> None:
    x, *rest = make((3, 96, 23, 21), 6).inputs
    if last:
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    check_op(Case("group_norm_silu", (x, *rest), call, eager, eager), kernel, compiled=(), registration=False)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            with use(kernel):
                results.append(evaluate(call, detached((x, *rest)), 1.0))
    finally:
        torch.set_num_threads(before)
    for outputs, gradients in results[1:]:
        for one, two in zip([*outputs, *gradients], [*results[0][0], *results[0][1]], strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("embedding", ["default", "scale_shift"])
def test_a_residual_block_of_diffusers(embedding: str) -> None:
    """The block's own forward, with its norms, time embedding and activations replaced."""
    resnet = pytest.importorskip("diffusers.models.resnet")
    torch.manual_seed(0)
    block = resnet.ResnetBlock2D(
        in_channels=16, out_channels=32, temb_channels=24, groups=4, time_embedding_norm=embedding
    )
    x, embedded = torch.randn(2, 16, 6, 6, requires_grad=True), torch.randn(2, 24)
    h = block.conv1(group_norm_silu(x, block.norm1.weight, block.norm1.bias, 4, block.norm1.eps))
    projection = block.time_emb_proj(F.silu(embedded))
    options = {"time_bias": projection}
    if embedding == "scale_shift":
        scale, shift = projection.chunk(2, 1)
        options = {"scale": scale, "shift": shift}
    h = group_norm_silu(h, block.norm2.weight, block.norm2.bias, 4, block.norm2.eps, **options)
    got = block.conv_shortcut(x) + block.conv2(h)
    exact, y = copy.deepcopy(block).double(), x.detach().double().requires_grad_()
    outputs = [got, block(x, embedded), exact(y, embedded.double())]
    wanted = [[x, *block.parameters()]] * 2 + [[y, *exact.parameters()]]
    gradients = [torch.autograd.grad(out.sum(), of) for out, of in zip(outputs, wanted, strict=True)]
    assert_alike(*outputs)
    assert_alike(*gradients, factor=3.0)


def test_fake_cuda_tensors() -> None:
    check_fake(make((2, 8, 3, 5), 2, torch.bfloat16), "cuda")


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "reference"])
def test_layouts_that_kernels_refuse(kernel: str) -> None:
    x = torch.randn(2, 3, 4, 5).permute(3, 1, 0, 2)
    y, (mean, rstd) = torch.empty_like(x), torch.empty(2, 5, 3)
    arguments = x, None, None, None, None, None, 3, 1e-5, True, y, mean, rstd
    with use(kernel), pytest.raises(KernelError, match="x is neither contiguous nor channels last"):
        torch.ops.fastdistill.group_norm_silu(*arguments)
    torch.ops.fastdistill.group_norm_silu(*arguments)
    assert_alike(y, *(F.silu(F.group_norm(some, 3)) for some in (x, x.double())))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": None}, "x: expected a tensor, got NoneType"),
        ({"x": torch.ones(2, 8, 3).double()}, "x: expected dtype float32 or bfloat16 or float16, got float64"),
        ({"x": torch.ones(8)}, r"x: expected \[batch, channels, \*positions\], got \(8,\)"),
        ({"groups": 3}, "groups: expected a divisor of the 8 channels of x, got 3"),
        ({"eps": -1.0}, "eps: expected a number >= 0, got -1.0"),
        ({"weight": torch.ones(7)}, r"weight: expected one number a channel \(8,\), got \(7,\)"),
        ({"time_bias": torch.ones(8)}, r"time_bias: expected one number a sample and channel \(2, 8\), got \(8,\)"),
        ({"scale": torch.ones(2, 8).double()}, "scale: expected dtype float32 or bfloat16 or float16, got float64"),
        ({"shift": torch.ones(2, 8, device="meta")}, r"shift: expected the device of x \(cpu\), got meta"),
    ],
)
def test_bad_input(options: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"x": torch.ones(2, 8, 3), "weight": None, "bias": None, "groups": 2}
    with pytest.raises(InputError, match=message):
        group_norm_silu(**(arguments | options))  # type: ignore[arg-type]
