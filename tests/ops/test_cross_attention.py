# SPDX-License-Identifier: Apache-2.0
"""cross_attention under ``check_op``: every kernel, head dim, layout, mask and row index, against float64."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdistill.errors import InputError, KernelError
from fastdistill.ops import OPS, _check, cross_attention, use
from tests.harness import (
    Case,
    assert_alike,
    check_fake,
    check_op,
    check_values,
    crossed,
    detached,
    emulated,
    evaluate,
    generator,
    kernels_of,
)

KERNELS = kernels_of("cross_attention")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # from NumPy, for samples without keys
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
LOWEST = torch.finfo(torch.float32).min


def multiply_numbers(patch: Callable[..., None] = setattr) -> None:
    """Triton's interpreter multiplies the bits of bfloat16 numbers; with this patch it multiplies their values."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    product = InterpreterBuilder.create_dot

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    patch(InterpreterBuilder, "create_dot", lambda self, a, b, *rest: product(self, wide(a), wide(b), *rest))


@pytest.fixture(autouse=True)
def _bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    if emulated("triton"):
        multiply_numbers(monkeypatch.setattr)


def eager(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: Tensor | None, scale: float | None = None
) -> tuple[Tensor]:
    """The code of a user, in the tensors' own precision; in float64 it is the truth."""
    if rows is not None:
        k, v = k[rows], v[rows]
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)).transpose(1, 2) @ k.permute(0, 2, 3, 1)
    if mask is not None:
        bias = (
            torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
        )
        scores = scores + bias[:, None, None].to(q.dtype)
    top = scores.detach().amax(-1, keepdim=True)
    weights = (scores - top.masked_fill(top == -torch.inf, 0)).exp()
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1, total)
    return ((weights @ v.transpose(1, 2)).transpose(1, 2),)


def call(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: Tensor | None, scale: float | None = None
) -> tuple[Tensor]:
    return (cross_attention(q, k, v, mask=mask, rows=rows, scale=scale),)


def make(
    B: int = 2, N: int = 19, H: int = 2, D: int = 8, L: int = 5, dtype: torch.dtype = torch.float32, *,
    mask: str = "none", rows: list[int] | None = None, gradients: str = "qkv", scale: float | None = None,
) -> Case:  # fmt: skip
    g = generator(B * N * D * L)
    count = B if rows is None else max(rows) + 2  # a row that no sample uses gets a gradient of zero
    q = torch.randn(B, N, H, D, generator=g).to(dtype).requires_grad_("q" in gradients)
    k = torch.randn(count, L, H, D, generator=g).to(dtype).requires_grad_("k" in gradients)
    v = torch.randn(count, L, H, D, generator=g).to(dtype).requires_grad_("v" in gradients)
    kept = torch.rand(B, L, generator=g) < 0.6
    kept[:, 0] = True
    bias = torch.randn(B, L, generator=g).to(dtype)
    masks = {"none": None, "bool": kept, "bias": bias, "-inf": bias.masked_fill(~kept, -torch.inf)}
    inputs = q, k, v, masks[mask], None if rows is None else torch.tensor(rows), scale
    sums = {} if gradients != "qkv" else terms(*inputs)
    return Case("cross_attention", inputs, call, eager, eager, gradient_sums=sums)


def terms(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: Tensor | None, scale: float | None
) -> dict[int, tuple[int, float]]:
    """For the gradients of Q and K: each term of dS = P (dP - sum_j P_j dP_j), dP = dO V^T, is a sum over D. Its terms
    cancel, so the bound uses their magnitudes."""
    cotangent = Case.cotangent
    with torch.no_grad():
        (q, k, v), own = (t.double() for t in (q, k, v)), torch.arange(len(q)) if rows is None else rows
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        scores = scale * torch.einsum("bnhd,blhd->bhnl", q, k[own])
        if mask is not None:
            scores += (mask.double().log() if mask.dtype == torch.bool else mask.double())[:, None, None]
        p, d = scores.softmax(-1), cotangent * v[own].abs().sum(-1).transpose(1, 2)[:, :, None]
        s = scale * p * (d + (p * d).sum(-1, keepdim=True))
        dq = torch.einsum("bhnl,blhd->bnhd", s, k[own].abs())
        dk = torch.zeros_like(k).index_add_(0, own, torch.einsum("bhnl,bnhd->blhd", s, q.abs()))
    samples = int(own.bincount().max()) if len(own) else 0
    return {
        0: (k.shape[1] * q.shape[3], dq.max().item()),
        1: (samples * q.shape[1] * q.shape[3], dk.max().item()),
    }


@pytest.mark.parametrize("kernel", KERNELS)
@crossed("mask, rows", ["bool", "none", "bias", "-inf"], [None, [1, 0, 1]])
def test_values_and_contract(kernel: str, mask: str, rows: list[int] | None) -> None:
    thorough = mask == "bool"
    case = make(2 + (rows is not None), 5, 1, L=7, mask=mask, rows=rows, scale=0.7 if thorough else None)
    with use(kernel):  # also for fake tensors, because torch's attention has other strides
        check_op(case, kernel, compiled=("aot_eager",) if thorough else (), registration=thorough)


def test_compiled_by_inductor() -> None:
    with use("reference"):
        check_op(make(rows=[0, 0], mask="bool"), "reference", compiled=("inductor",), registration=False)


@pytest.mark.parametrize("kernel", KERNELS)
@crossed("D, dtype", [40, 8, 13, 64, 72, 80, 160], [torch.float32, torch.float16])
def test_head_dims(kernel: str, D: int, dtype: torch.dtype) -> None:
    """Plans with and without a loop: in float32 the kernel loops over keys; in float16 up to 96 keys are on chip at
    once."""
    N = 70 if dtype == torch.float16 else 34
    check_values(make(1, N, 1, D, 77, dtype, mask="bool"), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("L", "D"), [(1, 8), (16, 24), (50, 72), (90, 24), (120, 24), (120, 72), (300, 72), (512, 16), (77, 256)]
)
def test_numbers_of_keys(kernel: str, L: int, D: int) -> None:
    check_values(make(1, 33, 1, D, L, torch.float16, mask="-inf"), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@crossed("L, dtype", [5, 130], [torch.float32, torch.float16])
def test_a_mask_that_adds_much_to_all_keys(kernel: str, L: int, dtype: torch.dtype) -> None:
    """The exponential overflows: positions of a tile beyond the last query must not have weights either."""
    q, k, v, mask, rows, scale = make(1, 19, 1, 8, L, dtype, mask="bias").inputs
    check_values(Case("cross_attention", (q, k, v, mask + 300, rows, scale), call, eager, eager), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("L", "D"), [(77, 40), (300, 40)])
def test_bfloat16(kernel: str, L: int, D: int) -> None:
    """The interpreter truncates to bfloat16 while a GPU rounds: one ulp per operation, and there are two in
    sequence."""
    case = make(1, 40, 2, D, L, torch.bfloat16)
    if not emulated(kernel):
        check_values(case, kernel)
        return
    with use(kernel):
        got = evaluate(case.call, detached(case.inputs), 1.75)
    truth = evaluate(eager, detached(case.inputs, torch.float64), 1.75)
    for one, two in zip([*got[0], *got[1]], [*truth[0], *truth[1]], strict=True):
        assert (one.double() - two).abs().max() <= 4 * 2**-7 * two.abs().max()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gradients", ["", "q", "kv", "v"])
def test_gradients_that_nobody_asked_for(kernel: str, gradients: str) -> None:
    for dtype in (torch.float32, torch.float16):  # a loop over keys; all keys at once
        check_values(make(dtype=dtype, gradients=gradients, rows=[0, 1]), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_many_chunks(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of K and V are sums over chunks of queries and over the samples of a row."""
    if kernel == "triton":
        monkeypatch.setattr(importlib.import_module("fastdistill.ops.cross_attention.triton"), "PROGRAMS", 1)
        check_values(make(1, 200, 1, 16, 20, torch.float16), kernel)
        monkeypatch.undo()
    for L in (20, 200):
        check_values(make(3, 150, 1, 16, L, torch.float16, rows=[2, 0, 2]), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@crossed("mask, L", ["bool", "bias"], [7, 300])
def test_a_sample_whose_keys_are_all_left_out(kernel: str, mask: str, L: int) -> None:
    """It gives zeros and no gradient, also with torch's attention on a CPU."""
    case = make(2, 9, 1, 8, L, torch.float16)
    q, k, v, *_ = case.inputs
    kept = torch.tensor([True, False])[:, None].expand(2, L).clone()
    out_mask = kept if mask == "bool" else torch.zeros(2, L).masked_fill(~kept, -torch.inf)
    for forced in (kernel, None):
        with use(forced):
            (out,), (gq, gk, gv) = evaluate(call, (q, k, v, out_mask, None), 1.0)
        for tensor in (out, gq, gk, gv):
            assert tensor.isfinite().all() and not tensor[1].any() and tensor[0].any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_layouts(kernel: str, dtype: torch.dtype) -> None:
    """Heads before tokens, slices of one joint projection, strided elements, addresses without alignment."""
    case = make(2, 17, 2, 8, 5, dtype)
    (expected,), gradients = evaluate(case.call, detached(case.inputs), 1.75)
    for layout in ("heads first", "sliced", "elements apart", "shifted", "expanded"):

        def moved(t: Tensor, layout: str = layout) -> Tensor:
            b, n, h, d = t.shape
            empty = {
                "heads first": lambda: torch.empty(b, h, n, d, dtype=dtype).transpose(1, 2),
                "sliced": lambda: torch.empty(b, n, 3 * h * d, dtype=dtype)[..., h * d : 2 * h * d].unflatten(
                    2, (h, d)
                ),
                "elements apart": lambda: torch.empty(b, n, h, 2 * d, dtype=dtype)[..., ::2],
                "shifted": lambda: torch.empty(b * n * h * d + 1, dtype=dtype)[1:].view(b, n, h, d),
                "expanded": lambda: torch.empty(b, n, h, d, dtype=dtype),
            }[layout]()
            return empty.copy_(t.detach()).requires_grad_()

        q, k, v = (moved(t) for t in case.inputs[:3])
        weight = torch.full((1,), 1.75, dtype=dtype).expand(expected.shape) if layout == "expanded" else None
        with use(kernel):
            out = cross_attention(q, k, v)
            got = torch.autograd.grad(out, (q, k, v), torch.full_like(out, 1.75) if weight is None else weight)
        for one, two in zip((out, *got), (expected, *gradients), strict=True):
            bound = 16 * torch.finfo(dtype).eps
            torch.testing.assert_close(one, two, rtol=bound, atol=bound * two.abs().max().item())


@pytest.mark.parametrize("kernel", [*KERNELS, None])
def test_projections_as_they_come(kernel: str | None) -> None:
    """[B, N, H * D] with ``heads`` equals [B, N, H, D]."""
    q, k, v, *_ = make(D=8, H=2).inputs
    with use(kernel):
        expected = cross_attention(q, k, v).flatten(2)
        got = cross_attention(q.flatten(2), k.flatten(2), v.flatten(2), heads=2)
    assert got.shape == (2, 19, 16) and torch.equal(got, expected)


@crossed("mask, dtype", ["none", "bool", "-inf"], FLOATS)
def test_torch_itself_on_a_cpu(mask: str, dtype: torch.dtype) -> None:
    """If no kernel supports the call, torch's attention gives the same values, also with autograd and compiled."""
    case = make(3, 19, 2, 40, 77, dtype, mask=mask, rows=[1, 0, 1])
    truth, gradients = evaluate(eager, detached(case.inputs, torch.float64), 1.75)
    torch._dynamo.reset()
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        got, got_gradients = evaluate(function, detached(case.inputs), 1.75)
        for one, two in zip([*got, *got_gradients], [*truth, *gradients], strict=True):
            assert (one.double() - two).abs().max() <= 8 * torch.finfo(dtype).eps * two.abs().max()
    assert "reference" in OPS["cross_attention"].calls


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_samples_and_no_queries(kernel: str) -> None:
    for B, N in ((0, 4), (2, 0)):
        q, k, v = (torch.zeros(B, n, 2, 8, requires_grad=True) for n in (N, 3, 3))
        with use(kernel):
            out = cross_attention(q, k, v)
            gradients = torch.autograd.grad(out.sum(), (q, k, v))
        assert out.shape == q.shape and all(not g.any() for g in gradients)


def test_fake_cuda_tensors() -> None:
    with use("reference"):
        check_fake(make(mask="bool", rows=[0, 0]), "cuda")


def test_pieces() -> None:
    pieces = importlib.import_module("fastdistill.ops.cross_attention.triton").pieces
    assert [pieces(n) for n in (1, 16, 40, 64, 72, 77, 80, 120, 160, 256, 300)] == [
        (16,), (16,), (32, 16), (64,), (64, 16), (64, 16), (64, 16), (128,), (128, 32), (256,), (256, 64),
    ]  # fmt: skip
    for n in range(1, 513):
        assert n <= sum(pieces(n)) <= max(16, 2 * n) and all(p & (p - 1) == 0 for p in pieces(n))


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k == "triton"])
def test_what_the_kernels_do_not_take(kernel: str) -> None:
    many, wide = make(L=513).inputs[:3], make(D=257).inputs[:3]
    with use(kernel):
        with pytest.raises(KernelError, match="513 keys, where it takes 1 to 512"):
            cross_attention(*many)
        with pytest.raises(KernelError, match="a head dim of 257, where it takes 1 to 256"):
            cross_attention(*wide)
    assert cross_attention(*many).isfinite().all() and cross_attention(*wide).isfinite().all()


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(sum(shape)))


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": zeros(2, 4)}, r"q: expected \[B, N, H, D\], got \(2, 4\)"),
        ({"q": zeros(2, 9, 16)}, r"heads: expected the number of heads, .* got None"),
        ({"q": zeros(2, 9, 15), "heads": 2}, r"q: expected \[rows, tokens, a multiple of 2 heads\], got \(2, 9, 15\)"),
        ({"q": zeros(2, 9, 2, 8).double()}, "q: expected dtype float32 or bfloat16 or float16, got float64"),
        ({"heads": 3}, "heads: expected the 2 heads of q, or None, got 3"),
        ({"k": zeros(2, 5, 2, 16)}, r"k: expected \[R, L, 2, 8\] beside q, got \(2, 5, 2, 16\)"),
        ({"k": zeros(1, 5, 2, 8)}, r"k: expected \[R, L, 2, 8\] beside q, got \(1, 5, 2, 8\)"),
        ({"k": zeros(2, 5, 2, 8).half()}, "k: expected dtype float32, got float16"),
        ({"v": zeros(2, 4, 2, 8)}, r"v: expected the shape of k \(2, 5, 2, 8\), got \(2, 4, 2, 8\)"),
        ({"v": zeros(2, 5, 2, 8, device="meta")}, r"v: expected the device of q \(cpu\), got meta"),
        ({"mask": zeros(2, 9)}, r"mask: expected \[B, L\] = \(2, 5\), got \(2, 9\)"),
        ({"mask": zeros(2, 5).long()}, "mask: expected dtype bool or float32 or bfloat16 or float16, got int64"),
        ({"mask": zeros(2, 5, requires_grad=True)}, "mask: expected a tensor without gradient"),
        ({"rows": zeros(3).long()}, r"rows: expected \[B\] = \(2,\), got \(3,\)"),
        ({"rows": zeros(2).int()}, "rows: expected dtype int64, got int32"),
        ({"rows": torch.tensor([1, 2])}, r"rows\[1\]: expected a row of k, 0 to 1, got 2"),
        ({"rows": torch.tensor([-1, 0])}, r"rows\[0\]: expected a row of k, 0 to 1, got -1"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    arguments = {"q": zeros(2, 9, 2, 8), "k": zeros(2, 5, 2, 8), "v": zeros(2, 5, 2, 8)} | changes
    for kernel in (None, "reference"):
        with use(kernel), pytest.raises(InputError, match=message):
            cross_attention(**arguments)


@pytest.mark.parametrize("kernel", [*KERNELS, None])
@pytest.mark.parametrize("L", [5, 40])
@pytest.mark.parametrize(("dtype", "low"), [("float16", -1e9), ("bfloat16", LOWEST), ("float32", LOWEST)])
def test_a_sample_of_padding_attends_to_all_keys(kernel: str | None, L: int, dtype: str, low: float) -> None:
    """A large finite bias is not -inf in any precision: the scores vanish next to it, so all keys get equal weights."""
    q, k, v, g = (randn(2, n, 1, 8).to(getattr(torch, dtype)) for n in (4, L, L, 4))
    inputs, mask = [t.requires_grad_() for t in (q, k, v)], torch.full((2, L), low)
    mask[1, 1:] = 0.0
    with use(kernel):
        out = cross_attention(*inputs, mask=mask)
        _, dk, dv = torch.autograd.grad(out, inputs, g)
    mean, share = v[0].double().mean(0), g[0].double().sum(0) / L
    plain = [t.detach().float() for t in (v[0].mean(0), (g[0] / L).sum(0))]
    assert_alike([out[0, 0], dv[0, 0]], plain, [mean, share], 3.0)
    assert dk[0].isfinite().all() and not dk[1, 0].any() and not dv[1, 0].any()


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k == "triton"])
@pytest.mark.parametrize("row", [-1, 3])
def test_where_an_error_cannot_be_raised_the_sample_is_nan(kernel: str, row: int) -> None:
    """A kernel on a GPU reads nothing outside of the bank; the sample becomes NaN."""
    q, k = randn(2, 4, 1, 8).requires_grad_(), randn(3, 5, 1, 8).requires_grad_()
    with use(kernel), mock.patch.object(_check, "rows"):
        out = cross_attention(q, k, k, rows=torch.tensor([2, row]))
    dq, dk = torch.autograd.grad(out.sum(), (q, k))
    assert out[1].isnan().all() and dq[1].isnan().all() and out[0].isfinite().all()
    assert dk[2].isfinite().all() and not dk[:2].any()
