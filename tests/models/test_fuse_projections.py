# SPDX-License-Identifier: Apache-2.0
"""Projections of fused models that one product computes: sharded and quantized weights, gradients, transforms."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from torch import Tensor, nn

from fastdistill.models.fuse import convolutional, fuse, products
from tests.models.fusible import made, parts, run


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutional, "FEW", 0)
    monkeypatch.setattr(products, "PLACES", {"cpu", "cuda"})


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", ["PixArtTransformer2DModel", "SD3Transformer2DModel"])
def test_sharded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks whose weights are gathered for a call: the weights are concatenated then; outputs and gradients are those
    of the unsharded model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    model, inputs = made(name)
    fuse(model)
    output, gradients = run(copy.deepcopy(model), [inputs])
    together = products._Projections.apply
    calls = []
    monkeypatch.setattr(products._Projections, "apply", lambda *args: (calls.append(1), together(*args))[1])
    kinds = BasicTransformerBlock, JointTransformerBlock
    for block in parts(model, *kinds):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = model(**inputs).sample
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view(found.shape)
    (found * weights).sum().backward()
    assert calls and torch.equal(found.detach(), output[0])
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad.full_tensor(), gradients[key][0])  # type: ignore[attr-defined]


class Quantized(Tensor):
    """A weight that works only in a call of its own layer."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.cat and func is not Tensor.flatten
        return super().__torch_function__(func, types, args, kwargs)


def test_weights_of_another_kind() -> None:
    own, x = layers(True)
    expected = [layer(x) for layer in own]
    for layer in own:
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantized))  # type: ignore[arg-type]
    assert type(own[0].weight) is Quantized
    for got, wanted in zip(products.projected(x, *own), expected, strict=True):
        assert torch.equal(got.as_subclass(Tensor), wanted)  # type: ignore[arg-type]


def layers(bias: bool) -> tuple[list[nn.Linear], Tensor]:
    torch.manual_seed(0)
    return [nn.Linear(6, n, bias=bias).double() for n in (4, 4, 2)], torch.randn(2, 3, 6, dtype=torch.float64)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [(), (0,), (1, 2)])
def test_gradients_of_projections(bias: bool, frozen: tuple[int, ...]) -> None:
    """For parameters and input, whichever require a gradient; also if a part of the result is not used, and for second
    derivatives."""
    own, x = layers(bias)
    for i in frozen:
        own[i].requires_grad_(False)
    wanted = [p for layer in own for p in layer.parameters() if p.requires_grad]
    for used in ((0, 1, 2), (1,)):
        found = []
        for make in (lambda x: products.projected(x, *own), lambda x: [layer(x) for layer in own]):
            leaf = x.clone().requires_grad_()
            total = sum(make(leaf)[i].sin().sum() for i in used)  # type: ignore[no-untyped-call]
            first = torch.autograd.grad(total, [leaf, *wanted], create_graph=True, allow_unused=True)
            second = torch.autograd.grad(first[0].square().sum(), [leaf, *wanted], allow_unused=True)
            found.append([*first, *second])
        for got, expected in zip(*found, strict=True):
            if expected is None:
                assert got is None or not got.any()
            else:
                torch.testing.assert_close(got, expected)


def test_projections_of_an_input_without_gradient() -> None:
    own, x = layers(True)
    sum(t.sum() for t in products.projected(x, *own)).backward()  # type: ignore[union-attr]
    grads = [p.grad for layer in own for p in layer.parameters()]
    for layer in own:
        layer.zero_grad()
    sum(layer(x).sum() for layer in own).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(grads, [p.grad for layer in own for p in layer.parameters()])


def test_projections_under_transforms_and_autocast() -> None:
    own, x = layers(True)
    expected = torch.func.jacrev(own[0])(x[0])
    got = torch.func.jacrev(lambda x: products.projected(x, *own)[0])(x[0])
    torch.testing.assert_close(got, expected)
    with torch.autocast("cpu", torch.bfloat16):
        own, x = [layer.float() for layer in own], x.float()
        assert all(torch.equal(a, layer(x)) for a, layer in zip(products.projected(x, *own), own, strict=True))
