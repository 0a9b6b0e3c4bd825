# SPDX-License-Identifier: Apache-2.0
"""What every op supports: expanded tensors, sizes of zero, and sizes that vary in a compiled function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastdistill.diffusion.matching import match_table
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.ops import (
    AdamWGroup,
    Task,
    adamw_ema,
    attention,
    cross_attention,
    feature_match,
    geglu,
    grad_square_sum,
    group_norm_silu,
    layer_norm_modulate,
    noise_gather,
    output_match,
    residual_layer_norm_modulate,
    use,
)
from fastdistill.ops.attention.reference import attention as attend
from tests.harness import EPS, assert_alike, generator, kernels_of

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
    """The bits are those of a copy; its gradient is summed."""
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


def tasked(x: Tensor, **options: Tensor) -> Tensor:
    """output_match with all its options; the student has a learned variance."""
    index = torch.arange(len(x))
    table = TABLE.to(x.device)
    task = Task(torch.ones_like(x), index, 0 * index, table[:, :4].contiguous(), index[:2])
    twice = torch.cat([x, x], 1)
    return output_match(twice, torch.ones_like(x), index, table, task=task, x_t=torch.zeros_like(x), **options).loss


def drawn(x: Tensor) -> Tensor:
    index, table = torch.zeros(9, dtype=torch.int64), TABLE[:, :4].contiguous()
    bank = x.detach()
    draw = noise_gather(bank, index[: len(x)], bank[:, 0], table, index, index[:2], batch=3, null_index=0)
    return x.sum() + draw.x_t.sum() + draw.prompt.sum()


def updated(x: Tensor) -> Tensor:
    param, *moments = (torch.zeros_like(x.detach()) for _ in range(3))
    grads, skipped = [x.detach() * 1.0], torch.zeros((), dtype=torch.int64)
    adamw_ema(
        [param], grads, moments[:1], moments[1:], [torch.zeros(())], groups=[AdamWGroup(torch.ones(()))],
        square_sum=grad_square_sum(grads), skipped=skipped,
    )  # fmt: skip
    return x.sum() + param.sum()


SIZED = {name: ours for name, (_, ours) in OURS.items()} | {
    "task": tasked,
    "cosine": lambda x: feature_match([x, 2 * x], [torch.ones_like(x)] * 2, distance="cosine", weights=[1.0, 2.0]).loss,
    "masked": lambda x: cross_attention(
        x, x.detach(), x.detach(), mask=torch.ones(x.shape[:2]), rows=torch.arange(len(x))
    ),
    "heads": lambda x: cross_attention(*[x.flatten(2)] * 3, heads=x.shape[2]),
    "attention": lambda x: attention(x, x, x),
    "noise_gather": drawn,
    "adamw_ema": updated,
}


QUICK = ("output_match", "task", "masked")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SIZED])
def test_compiled_for_sizes_that_vary(name: str) -> None:
    """Compiled as one graph, it gives the bits of eager code, except that a compiler may sum the gradients of a tensor
    that is used three times in another order."""
    ours = SIZED[name]
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="eager" if name in QUICK else "aot_eager")
    with use("reference"):
        for shape in ((3, 4, 2, 6), (5, 8, 3, 10)):
            x = randn(*shape).requires_grad_()
            pairs = [(out, *torch.autograd.grad(out.sum(), x)) for out in (compiled(x), ours(x))]
            (out, grad), (eager_out, eager_grad) = pairs
            assert torch.equal(out, eager_out)
            assert (grad - eager_grad).abs().max() <= 4 * EPS * eager_grad.abs().max()
