# SPDX-License-Identifier: Apache-2.0
"""Behavior of all ops: second derivatives, forward mode, inputs without a gradient. And of the losses that compute
their
gradient in the forward: buffers, tracing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fastdistill.errors import InputError
from fastdistill.ops import (
    AdamWGroup,
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
from fastdistill.ops.attention import backends
from tests.harness import assert_alike, generator, kernels_of

TEACHER, TIME, TABLE = torch.linspace(-2, 2, 40).view(2, 4, 5), torch.tensor([0, 1]), torch.ones(3, 5)


def by_feature(student: Tensor, buffer: Tensor | None = None) -> Tensor:
    teacher = TEACHER.to(student.device)
    return feature_match([student], [teacher], grads=None if buffer is None else [buffer]).loss


def by_output(student: Tensor, buffer: Tensor | None = None) -> Tensor:
    teacher, time, table = (t.to(student.device) for t in (TEACHER, TIME, TABLE))
    return output_match(student, teacher, time, table, grad=buffer).loss


LOSSES = {"feature_match": by_feature, "output_match": by_output}
EACH = [(kernel, name) for name in LOSSES for kernel in kernels_of(name)]


@pytest.mark.parametrize(("kernel", "name"), EACH)
def test_a_buffer_serves_one_forward_until_its_backward(kernel: str, name: str) -> None:
    """Otherwise two forwards into one buffer, or a retained graph, would return the second gradient twice."""
    loss: Callable[..., Tensor] = LOSSES[name]
    s = torch.randn(2, 4, 5, requires_grad=True)
    buffer, message = torch.empty(2, 4, 5), f"{name}: a gradient buffer was written to between"
    with use(kernel):
        with pytest.raises(RuntimeError, match=message):
            (loss(s, buffer) + loss(2 * s, buffer)).backward()
        kept = loss(s, buffer)
        torch.autograd.grad(kept, s, retain_graph=True)
        torch.autograd.grad(loss(2 * s, buffer), s)
        with pytest.raises(RuntimeError, match=message):
            torch.autograd.grad(kept, s)


@pytest.mark.parametrize("name", LOSSES)
def test_a_buffer_of_inference_mode(name: str) -> None:
    s = torch.randn(2, 4, 5, requires_grad=True)
    with torch.inference_mode():
        buffer = torch.empty(2, 4, 5)
    expected = torch.autograd.grad(LOSSES[name](s), s)
    assert torch.equal(*torch.autograd.grad(LOSSES[name](s, buffer), s), *expected)


@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode_is_refused(name: str) -> None:
    """Otherwise the tangent would count as zero."""
    s = torch.randn(2, 4, 5)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.jvp(LOSSES[name], (s,), (s,))


@pytest.mark.parametrize("name", LOSSES)
def test_traced_with_symbolic_sizes(name: str) -> None:
    s = torch.randn(2, 4, 5)
    traced: Any = make_fx(lambda x: LOSSES[name](x), tracing_mode="symbolic", _allow_non_fake_inputs=True)(s)
    assert torch.equal(traced(s), LOSSES[name](s))


def squared_gradient(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of |y|^2 + |dy/dx|^2 for all inputs: a gradient penalty, whose cotangent requires no gradient."""
    first = torch.autograd.grad(function(*inputs).sum(), inputs, create_graph=True)
    loss = function(*inputs).square().sum() + sum((g.square().sum() for g in first), torch.zeros(()))
    return list(torch.autograd.grad(loss, inputs))


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(sum(shape)))


def eager_group_norm(x: Tensor, w: Tensor, b: Tensor, t: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    z = F.group_norm(x + t[:, :, None], 2, w, b, 1e-3)
    return F.silu(z * (1 + scale[:, :, None]) + shift[:, :, None])


def our_layer_norm(x: Tensor, h: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y, s = residual_layer_norm_modulate(x, h, gate, scale, shift, w, b, 1e-3)
    return torch.cat([y, s.sin()])


def eager_layer_norm(x: Tensor, h: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, w: Tensor, b: Tensor) -> Tensor:
    s = x + gate[:, None] * h
    return torch.cat([F.layer_norm(s, s.shape[-1:], w, b, 1e-3) * (1 + scale[:, None]) + shift[:, None], s.sin()])


def eager_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhnl,blhd->bnhd", (torch.einsum("bnhd,blhd->bhnl", q, k) * 0.5).softmax(-1), v)


TWICE: dict[str, tuple[str, Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "geglu": ("geglu", geglu, lambda x: x.chunk(2, -1)[0] * F.gelu(x.chunk(2, -1)[1]), [(2, 3, 6)]),
    "group_norm_silu": (
        "group_norm_silu",
        lambda x, w, b, t, scale, shift: group_norm_silu(
            x, w, b, 2, 1e-3, time_bias=t, scale=scale, shift=shift
        ),
        eager_group_norm,
        [(2, 4, 5), (4,), (4,), (2, 4), (2, 4), (2, 4)],
    ),
    "layer_norm_modulate": (
        "layer_norm_modulate",
        lambda x, w: layer_norm_modulate(x, weight=w, eps=1e-3),
        lambda x, w: F.layer_norm(x, (6,), w, eps=1e-3),
        [(2, 3, 6), (6,)],
    ),
    "residual": (
        "layer_norm_modulate", our_layer_norm, eager_layer_norm,
        [(2, 3, 6), (2, 3, 6), (2, 6), (2, 6), (2, 6), (6,), (6,)],
    ),
    "cross_attention": (
        "cross_attention", lambda q, k, v: cross_attention(q, k, v, scale=0.5), eager_attention,
        [(2, 3, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize(
    ("kernel", "name"), [(kernel, name) for name in TWICE for kernel in kernels_of(TWICE[name][0])]
)
def test_second_derivatives(kernel: str, name: str, layout: str) -> None:
    """Also for tensors that the op copies, and if the first cotangent is a constant."""
    _, ours, eager, shapes = TWICE[name]
    inputs = [randn(*shape) for shape in shapes]
    if layout == "transposed":
        inputs = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs]
    inputs = [t.requires_grad_() for t in inputs]
    with use(kernel):
        got = squared_gradient(ours, inputs)
    truth = squared_gradient(eager, [t.detach().double().requires_grad_() for t in inputs])
    assert_alike(got, squared_gradient(eager, inputs), truth, 3.0)


def test_second_derivatives_where_one_tensor_is_two_inputs() -> None:
    q, k = randn(2, 3, 2, 4).requires_grad_(), randn(2, 5, 2, 4).requires_grad_()
    with use("reference"):
        got = squared_gradient(lambda q, k: cross_attention(q, k, k, scale=0.5), [q, k])
    other = [lambda q, k: eager_attention(q, k, k), [q, k]]
    truth = squared_gradient(other[0], [t.detach().double().requires_grad_() for t in (q, k)])
    assert_alike(got, squared_gradient(*other), truth, 3.0)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_refuse_a_second_derivative(name: str) -> None:
    """Also with respect to the tensors from which the student was computed; their graph does not include the
    gradient."""
    w = randn(2, 4, 5).requires_grad_()
    student = 2 * w
    with pytest.raises(RuntimeError, match=f"{name}: its gradient cannot be differentiated again"):
        torch.autograd.grad(LOSSES[name](student), student, create_graph=True)


def test_other_attention_kernels_refuse_a_second_derivative() -> None:
    q = randn(2, 3).requires_grad_()
    out = backends._once(q.exp())
    torch.autograd.grad(out.sum(), q, retain_graph=True)
    with pytest.raises(RuntimeError, match="attention: this backend's gradient"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def draw(latents: Tensor, prompts: Tensor) -> Tensor:
    index, table = torch.zeros(3, dtype=torch.int64), torch.ones(1, 4)
    return noise_gather(latents, index, prompts, table, index[:1], index[:2], batch=2, null_index=0).x_t


def updated(grad: Tensor) -> None:
    state = [torch.zeros(3) for _ in range(3)]
    group, skipped = AdamWGroup(torch.ones(())), torch.zeros((), dtype=torch.int64)
    square_sum = torch.ones((), dtype=torch.float64)
    adamw_ema(
        state[:1],
        [grad],
        state[1:2],
        state[2:],
        [torch.zeros(())],
        groups=[group],
        square_sum=square_sum,
        skipped=skipped,
    )


CONSTANTS: dict[str, Callable[[Tensor], Any]] = {
    "weights": lambda t: feature_match([TEACHER], [TEACHER], weights=t[:1, 0, 0]),
    "weights of a list": lambda t: feature_match([TEACHER], [TEACHER], weights=[t[0, 0, 0]]),
    "grad_scale": lambda t: feature_match([TEACHER], [TEACHER], grad_scale=t[0, 0, 0]),
    "guidance": lambda t: output_match(TEACHER, TEACHER, TIME, TABLE, unconditional=TEACHER, guidance=t[:, 0, 0]),
    "weights of samples": lambda t: output_match(TEACHER, TEACHER, TIME, TABLE, weights=t[:, 0, 0]),
    "x_t": lambda t: output_match(TEACHER, TEACHER, TIME, TABLE, x_t=t),
    "output_weight": lambda t: output_match(TEACHER, TEACHER, TIME, TABLE, output_weight=t[0, 0, 0]),  # type: ignore[arg-type]
    "mask": lambda t: cross_attention(TEACHER[:, None], TEACHER[:, None], TEACHER[:, None], mask=t[:, :1, 0]),
    "scale": lambda t: cross_attention(TEACHER[:, None], TEACHER[:, None], TEACHER[:, None], scale=t[0, 0, 0]),  # type: ignore[arg-type]
    "scale of attention": lambda t: attention(TEACHER[:, None], TEACHER[:, None], TEACHER[:, None], scale=t[0, 0, 0]),  # type: ignore[arg-type]
    "eps": lambda t: layer_norm_modulate(TEACHER, eps=t[0, 0, 0]),  # type: ignore[arg-type]
    "eps of groups": lambda t: group_norm_silu(TEACHER, None, None, 2, t[0, 0, 0]),  # type: ignore[arg-type]
    "latents": lambda t: draw(t.view(-1, 4)[:3], TEACHER[0]),
    "prompts": lambda t: draw(TEACHER.view(-1, 4)[:3], t[0]),
    "grads": lambda t: grad_square_sum([t]),
    "grads of an update": lambda t: updated(t[0, 0, :3]),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTANTS)
def test_what_has_no_gradient_refuses_to_be_differentiated(name: str) -> None:
    """Otherwise it would silently get no gradient; if no gradient is required, the call works."""
    t = torch.ones(2, 4, 5)
    CONSTANTS[name](t)
    argument = name.split()[0]
    with pytest.raises(InputError, match=rf"^{argument}.*expected a tensor without gradient"):
        CONSTANTS[name](t.requires_grad_())
    with forward_ad.dual_level(), pytest.raises(InputError, match=rf"^{argument}.*got a tensor with a tangent"):
        CONSTANTS[name](forward_ad.make_dual(t.detach(), t.detach()))


@pytest.mark.parametrize("name", TWICE)
def test_forward_mode_is_refused_without_gradients_too(name: str) -> None:
    _, ours, _, shapes = TWICE[name]
    inputs = [randn(*shape) for shape in shapes]
    refused = pytest.raises(NotImplementedError, match="jvp")
    with torch.no_grad(), use("reference"), forward_ad.dual_level(), refused:
        ours(forward_ad.make_dual(inputs[0], inputs[0]), *inputs[1:])
