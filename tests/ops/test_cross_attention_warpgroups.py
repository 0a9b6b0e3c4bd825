# SPDX-License-Identifier: Apache-2.0
"""cross_attention and its gradients in CUDA for Hopper (warpgroup products)."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.errors import KernelError
from fastdistill.ops import OPS, use
from fastdistill.ops.cross_attention import reference
from tests.harness import Case, check_values, crossed, device_of, kernels_of, on, partial_kernels_of
from tests.ops.test_cross_attention import make, randn

WARPGROUPS = [k for k in kernels_of("cross_attention_backward") if k == "cuda"]
FORWARD = partial_kernels_of("cross_attention")
module = importlib.import_module("fastdistill.ops.cross_attention.cuda")


class _Gradients(torch.autograd.Function):
    """The values of the reference, and the gradients of the selected kernel."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.rest = *rest[:2], q.shape[-1] ** -0.5 if rest[2] is None else rest[2]
        out = torch.empty_like(q)
        reference.cross_attention(q, k, v, *ctx.rest, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in (q, k, v)]
        OPS["cross_attention_backward"](None, q, k, v, *ctx.rest, grad_out.contiguous(), *grads)
        return *grads, None, None, None


def gradients(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: Tensor | None, scale: float | None = None
) -> tuple[Tensor]:
    return (_Gradients.apply(q, k, v, mask, rows, scale),)


def of_gradients(case: Case, device: str) -> Case:
    return dataclasses.replace(case, call=gradients, inputs=on(device, case.inputs))


@pytest.mark.parametrize("kernel", WARPGROUPS)
@crossed("D, L, dtype", [40, 64, 80, 160, 72], [77, 80, 66], [torch.float16, torch.bfloat16])
def test_gradients_by_warpgroups(kernel: str, D: int, L: int, dtype: torch.dtype) -> None:
    """Several tiles, the last of which is not full."""
    check_values(of_gradients(make(1, 130, 2, D, L, dtype), device_of(kernel)), kernel)


@pytest.mark.parametrize("kernel", WARPGROUPS)
@crossed("mask, rows, D, L", ["bool", "none", "bias", "-inf"], [None, [1, 0, 1]], [40, 72], [77, 120])
def test_gradients_by_warpgroups_of_masks_and_rows(
    kernel: str, mask: str, rows: list[int] | None, D: int, L: int
) -> None:
    case = make(2 + (rows is not None), 33, 1, D, min(L, 80 if D == 40 else L), torch.float16, mask=mask, rows=rows)
    check_values(of_gradients(case, device_of(kernel)), kernel)


@pytest.mark.parametrize("kernel", FORWARD)
@crossed("D, L, dtype", [40, 64, 80, 160, 72], [77, 80, 66], [torch.float16, torch.bfloat16])
def test_values_by_warpgroups(kernel: str, D: int, L: int, dtype: torch.dtype) -> None:
    """Several tiles, of which the last is not full; the gradients by warpgroups, too."""
    case = make(1, 150, 2, D, L, dtype)
    check_values(dataclasses.replace(case, inputs=on(device_of(kernel), case.inputs)), kernel)


@pytest.mark.parametrize("kernel", FORWARD)
@crossed("mask, rows, D, L", ["bool", "none", "bias", "-inf"], [None, [1, 0, 1]], [40, 72], [77, 120])
def test_values_by_warpgroups_of_masks_and_rows(kernel: str, mask: str, rows: list[int] | None, D: int, L: int) -> None:
    case = make(2 + (rows is not None), 33, 1, D, min(L, 80 if D == 40 else L), torch.float16, mask=mask, rows=rows)
    check_values(dataclasses.replace(case, inputs=on(device_of(kernel), case.inputs)), kernel)


@pytest.mark.parametrize("kernel", FORWARD)
@pytest.mark.parametrize(("D", "chunks"), [(40, 1), (160, 1), (72, 3)])
def test_values_by_warpgroups_over_tiles(kernel: str, D: int, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six tiles in one chunk, and two in each of three."""
    monkeypatch.setattr(module, "chunks_of", lambda *_, **__: (6 // chunks * 64, chunks))
    q = randn(1, 6 * 64 - 20, 1, D).half().to(device_of(kernel))
    k, v = (randn(1, 77, 1, D).half().to(q.device) for _ in range(2))
    out, expected = torch.empty_like(q), torch.empty(q.shape, device=q.device)
    with use(kernel):
        OPS["cross_attention"](None, q, k, v, None, None, 0.2, out)
    reference.cross_attention(q.float(), k.float(), v.float(), None, None, 0.2, expected)
    assert (out.float() - expected).norm() < 5e-4 * expected.norm()


@pytest.mark.parametrize("kernel", FORWARD)
@pytest.mark.parametrize("D", [40, 64])
def test_swizzled_and_padded_matrices_give_the_same_bits(kernel: str, D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device = device_of(kernel)
    q, g = (randn(1, 200, 1, D).half().to(device) for _ in range(2))
    k, v = (randn(1, 77, 1, D).half().to(device) for _ in range(2))
    got = []
    for swizzled in ((), (40, 64)):
        monkeypatch.setattr(module, "SWIZZLED", swizzled)
        new = [torch.empty_like(t) for t in (q, q, k, v)]
        with use(kernel):
            OPS["cross_attention"](None, q, k, v, None, None, 0.2, new[0])
            OPS["cross_attention_backward"](None, q, k, v, None, None, 0.2, g, *new[1:])
        got.append(new)
    assert all(map(torch.equal, *got)) and got[0][1].any()


@pytest.mark.parametrize("kernel", WARPGROUPS)
@pytest.mark.parametrize(("D", "queries"), [(40, 64), (80, 128), (160, 128)])
@pytest.mark.parametrize("chunks", [1, 3])
def test_gradients_by_warpgroups_over_tiles(
    kernel: str, D: int, queries: int, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tiles in one chunk (the kernel writes the gradients of K and V itself), and in three chunks."""
    monkeypatch.setattr(module, "chunks_of", lambda *_: (3 // chunks * queries, chunks))
    check_values(of_gradients(make(1, 2 * queries + 44, 1, D, 77, torch.float16), device_of(kernel)), kernel)


@pytest.mark.parametrize("kernel", WARPGROUPS)
@pytest.mark.parametrize("D", [40, 72])
def test_clusters_and_partial_sums_give_the_same_bits(kernel: str, D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device = device_of(kernel)
    monkeypatch.setattr(module, "chunks_of", lambda *_: (128, 2))
    q, g = (randn(2, 200, 1, D).half().to(device) for _ in range(2))
    k, v = (randn(2, 77, 1, D).half().to(device) for _ in range(2))
    got = []
    for clusters in (1,), (1, 2):
        monkeypatch.setattr(module, "CLUSTERS", clusters)
        grads = [torch.empty_like(t) for t in (q, k, v)]
        with use(kernel):
            OPS["cross_attention_backward"](None, q, k, v, None, None, 0.2, g, *grads)
        got.append(grads)
    assert all(map(torch.equal, *got)) and got[0][1].any()


@pytest.mark.parametrize("kernel", WARPGROUPS)
def test_gradients_by_warpgroups_of_nothing_and_of_what_is_not_there(kernel: str) -> None:
    """A sample without keys has no gradient; a sample whose row does not exist has NaN and adds to no row."""
    device = device_of(kernel)
    q, g = (randn(2, 20, 1, 160).half().to(device) for _ in range(2))
    k, v = (randn(3, 9, 1, 160).half().to(device) for _ in range(2))
    mask = torch.tensor([True, False], device=device)[:, None].expand(2, 9).contiguous()
    for masks, rows in ((mask, [0, 2]), (None, [2, 3]), (None, [2, -1])):
        grads = [torch.empty_like(t) for t in (q, k, v)]
        with use(kernel):
            OPS["cross_attention_backward"](None, q, k, v, masks, torch.tensor(rows, device=device), 0.2, g, *grads)
        dq, dk, dv = grads
        assert all(t[rows[0]].any() and t.isfinite().all() for t in (dk, dv)) and not dk[1].any() and not dv[1].any()
        assert dq[0].isfinite().all() and (not dq[1].any() if masks is not None else dq[1].isnan().all())


@pytest.mark.parametrize("kernel", WARPGROUPS)
def test_gradients_by_warpgroups_of_slices(kernel: str) -> None:
    """K and V as slices of one projection, heads before tokens; other alignments are refused."""
    device = device_of(kernel)
    q, g = (randn(1, 2, 20, 40).half().to(device).transpose(1, 2) for _ in range(2))
    k, v = randn(1, 66, 4, 40).half().to(device).split(2, 2)
    got, expected = ([torch.empty(t.shape, dtype=t.dtype, device=device) for t in (q, k, v)] for _ in range(2))
    op = OPS["cross_attention_backward"]
    with use(kernel):
        op(None, q, k, v, None, None, 0.2, g, *got)
        op(None, *(t.contiguous() for t in (q, k, v)), None, None, 0.2, g.contiguous(), *expected)
        assert all(map(torch.equal, got, expected))
        with pytest.raises(KernelError, match="heads that do not start at multiples of 16 bytes"):
            op(None, randn(1, 20, 2, 41).half().to(device)[..., 1:], k, v, None, None, 0.2, g, *got)
        with pytest.raises(KernelError, match="float32, where it takes bfloat16 and float16"):
            op(None, *(t.float() for t in (q, k, v)), None, None, 0.2, g.float(), *(t.float() for t in got))
        with pytest.raises(KernelError, match="a head dim of 32, where it takes 40, 64, 72, 80, 160"):
            op(None, *(t[..., :32] for t in (q, k, v)), None, None, 0.2, g[..., :32], *got)
        with pytest.raises(KernelError, match="81 keys, where it takes 65 to 80"):
            op(None, q, *[randn(1, 81, 2, 40).half().to(device)] * 2, None, None, 0.2, g, *got)
        with pytest.raises(KernelError, match="not all gradients are asked for"):
            op(None, q, k, v, None, None, 0.2, g, got[0], got[1][:0], got[2][:0])


def test_warpgroups_where_they_are_faster() -> None:
    refuse = module.refuse
    for dim, first in ((40, False), (64, False), (72, True), (80, True), (160, True)):
        q, k = (torch.zeros(1, n, 1, dim, dtype=torch.float16) for n in (128, 77))
        assert (refuse(q, k, k, None, None, 0.1, q, q, k, k) is None) == first
        assert module.refuse_forward(q, k, k, None, None, 0.1, q) is not None
        with use("cuda"):
            assert refuse(q, k, k, None, None, 0.1, q, q, k, k) is None
            assert module.refuse_forward(q, k, k, None, None, 0.1, q) is None


def test_chunks_of_warpgroups() -> None:
    """There are enough chunks to fill a GPU (nearly) once; every query is in exactly one chunk."""
    chunks_of = module.chunks_of
    shapes = (4096, 40), (1024, 80), (256, 160)
    assert [chunks_of(16, n, 8, dim) for n, dim in shapes] == [(2048, 2), (1024, 1), (256, 1)]
    assert chunks_of(4, 4096, 8, 80) == (1024, 4) and chunks_of(1, 19, 1, 40) == (64, 1)
    assert [chunks_of(16, n, 8, dim, forward=True) for n, dim in shapes] == [(1024, 4), (384, 3), (128, 2)]
    for B, N, H, D in ((1, 4096, 8, 40), (3, 1000, 10, 64), (20, 77, 5, 160)):
        span, chunks = chunks_of(B, N, H, D)
        assert span % 64 == 0 and (chunks - 1) * span < N <= chunks * span
