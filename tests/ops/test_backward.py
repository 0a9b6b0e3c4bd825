# SPDX-License-Identifier: Apache-2.0
"""What the losses that make their gradient in the forward share: buffers, other modes of differentiation, tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fastdistill.ops import feature_match, output_match, use
from tests.harness import kernels_of

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
    """Two forwards into one buffer would hand the second's gradient on twice; so would a graph that is kept."""
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
    """It would take the tangent for zero."""
    s = torch.randn(2, 4, 5)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.jvp(LOSSES[name], (s,), (s,))


@pytest.mark.parametrize("name", LOSSES)
def test_traced_with_symbolic_sizes(name: str) -> None:
    s = torch.randn(2, 4, 5)
    traced: Any = make_fx(lambda x: LOSSES[name](x), tracing_mode="symbolic", _allow_non_fake_inputs=True)(s)
    assert torch.equal(traced(s), LOSSES[name](s))
