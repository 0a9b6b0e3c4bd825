# SPDX-License-Identifier: Apache-2.0
"""What every op takes beside its own shapes: tensors that repeat their memory, and sizes of zero."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastdistill.diffusion.matching import match_table
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.ops import (
    attention,
    cross_attention,
    feature_match,
    geglu,
    group_norm_silu,
    layer_norm_modulate,
    output_match,
    residual_layer_norm_modulate,
    use,
)
from fastdistill.ops.attention.reference import attention as attend
from tests.harness import assert_alike, generator, kernels_of

TABLE = match_table(NoiseSchedule.linear(9).coefficients())
OURS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {  # of [B, 4, 2, 6]
    "geglu": ("geglu", geglu),
    "group_norm_silu": ("group_norm_silu", lambda x: group_norm_silu(x, None, None, 2, time_bias=x[:, :, 0, 0])),
    "layer_norm_modulate": ("layer_norm_modulate", lambda x: layer_norm_modulate(x, x[:, 0, 0], x[:, 0, 1])),
    "residual": ("layer_norm_modulate", lambda x: residual_layer_norm_modulate(x, x, x[:, 0, 0])[0]),
    "feature_match": ("feature_match", lambda x: feature_match([x], [torch.ones_like(x)]).loss),
    "output_match": (
        "output_match",
        lambda x: output_match(x, torch.ones_like(x), torch.zeros(len(x), dtype=torch.int64), TABLE.to(x.device)).loss,
    ),
    "cross_attention": ("cross_attention", lambda x: cross_attention(x, x, x)),
}
EACH = [(kernel, name) for name in OURS for kernel in kernels_of(OURS[name][0])]


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDISTILL_CACHE", str(tmp_path))
    monkeypatch.delenv("FASTDISTILL_ATTENTION")


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(sum(shape)))


@pytest.mark.parametrize("dim", range(4))
@pytest.mark.parametrize(("kernel", "name"), EACH)
def test_expanded(kernel: str, name: str, dim: int) -> None:
    """The bits of a copy, and its gradient summed."""
    _, ours = OURS[name]
    shape = [2, 4, 2, 6]
    shape[dim] = 1
    x = randn(*shape).requires_grad_()
    wide = x.expand(2, 4, 2, 6)
    plain = wide.detach().clone().requires_grad_()
    with use(kernel):
        y, expected = ours(wide), ours(plain)
        (dx,), (whole,) = (torch.autograd.grad(out.sum(), t) for out, t in ((y, x), (expected, plain)))
    assert torch.equal(y, expected) and torch.equal(dx, whole.sum(dim, keepdim=True))


@pytest.mark.parametrize(("kernel", "name"), EACH)
def test_no_samples(kernel: str, name: str) -> None:
    x = torch.zeros(0, 4, 2, 6, requires_grad=True)
    with use(kernel):
        y = OURS[name][1](x)
    y.sum().backward()
    assert not y.any() and x.grad is not None and x.grad.shape == x.shape


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("kernel", ["attention", *kernels_of("cross_attention")])
@pytest.mark.parametrize(("keys", "dim"), [(0, 6), (5, 0), (0, 0)])
def test_attention_to_nothing_is_zero(kernel: str, keys: int, dim: int) -> None:
    q, k = randn(2, 4, 2, dim).requires_grad_(), randn(2, keys, 2, dim).requires_grad_()
    for mask in (None, torch.ones(2, keys, dtype=torch.bool), torch.zeros(2, keys)):
        with use(None if kernel == "attention" else kernel):
            out = attention(q, k, k) if kernel == "attention" else cross_attention(q, k, k, mask=mask)
        dq, dk = torch.autograd.grad(out.sum(), (q, k))
        assert out.shape == q.shape and not out.any() and not dq.any() and dk.shape == k.shape


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("dim", range(4))
def test_attention_is_measured_for_expanded_tensors(dim: int) -> None:
    shape = [2, 4, 2, 6]
    shape[dim] = 1
    x = randn(*shape).expand(2, 4, 2, 6)
    eager, exact = (attention(*[x.clone()] * 3, backend="reference"), attend(*[x.double()] * 3, 6**-0.5))
    assert_alike(attention(x, x, x), eager, exact)
    attention(x.requires_grad_(), x, x).sum().backward()
