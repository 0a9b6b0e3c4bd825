# SPDX-License-Identifier: Apache-2.0
"""Products with the Jacobian of a feature."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.errors import InputError
from fastdistill.models import Taps, jacobian
from fastdistill.models.calling import Predictor
from fastdistill.models.fuse import fuse, unfuse
from fastdistill.models.jacobian import TapFunction, jvp, share, vjp
from tests.harness import EPS64
from tests.models import tiny_families
from tests.tiny import Net

FAMILIES = ["sd", "dit", "pixart_sigma", "sd3"]


def net(dtype: torch.dtype = torch.float64) -> Any:
    return Net().to(dtype).eval()


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_net(name: str = "mid", batch: int = 2, **given: Any) -> TapFunction:
    return TapFunction(given.pop("model", None) or net(), name, 7, rows(batch, 5, 6), **given)


def of_family(name: str, at: str) -> tuple[TapFunction, Tensor]:
    model = tiny_families.model(name).double().eval()
    prompt = {k: v[:2].double() if v.is_floating_point() else v[:2] for k, v in tiny_families.banks(model).items()}
    time = torch.tensor([1.0, 500.0]) if name == "sd3" else torch.tensor([1, 500])
    return TapFunction(model, at, time, prompt, level=(0.6, 0.8)), rows(2, 4, 4, 4)


def dense(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The Jacobian of every sample, by one backward per output."""
    x = x.clone().requires_grad_()
    y = f(x).flatten(1)
    found = [torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0].flatten(1) for i in range(y.shape[1])]
    return torch.stack(found, 1)


def near(got: Tensor, exact: Tensor) -> None:
    assert got.shape == exact.shape
    assert (got - exact).abs().max() <= 1e-9 * exact.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_products_of_families(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with the Jacobian from backwards of the whole model; J and J^T are adjoint; both ways for J v agree."""
    f, x = of_family(name, tiny_families.tap(name))
    with Taps(f.model, [f.name]) as taps:

        def whole(x: Tensor) -> Tensor:
            Predictor(f.model)(x, f._timestep, f._prompt)
            return taps.features()[0]

        J = dense(whole, x)
    V, U = rows(2, 64, 2, seed=1), rows(2, J.shape[1], 2, seed=2)
    forward, backward = jvp(f, x, V), vjp(f, x, U, chunk=3)
    near(forward, J @ V)
    near(backward, J.mT @ U)
    near(forward.mT @ U, V.mT @ backward)
    monkeypatch.setattr(jacobian, "_without_forward_mode", {f.model})
    near(jvp(f, x, V, chunk=1), forward)
    assert 0 < share(f, x) < 1


def test_the_prediction_and_the_clean_sample() -> None:
    for name, kind in (("output", "epsilon"), ("x0", "epsilon"), ("x0", "v_prediction")):
        f = of_net(name, level=(0.6, 0.8), prediction_type=kind)
        x = rows(2, 4, 5, 3)
        out = f.model(x, torch.tensor([7, 7]), rows(2, 5, 6))
        x0 = {"epsilon": (x - 0.8 * out) / 0.6, "v_prediction": 0.6 * x - 0.8 * out}[kind]
        assert (f(x) - (out if name == "output" else x0).flatten(1)).abs().max() <= 8 * EPS64 * x0.abs().max()
        assert f.shape == (4, 5, 3) and share(f, x) == 1


def test_leaving_at_the_tap() -> None:
    """The bits are those of the whole forward, nothing after the tap runs, and no hook stays, also after an error."""
    model, x = net(), rows(2, 4, 5, 3)
    f, ran = of_net(model=model), list[str]()
    model.last.register_forward_hook(lambda *_: ran.append("last"))
    with Taps(model, ["mid"]) as taps:
        model(x, torch.tensor([7, 7]), rows(2, 5, 6))
        (expected,) = taps.features()
    assert ran == ["last"] and torch.equal(f.feature(x), expected) and ran == ["last"]
    with pytest.raises(RuntimeError):
        f(rows(2, 3, 5, 3))
    assert not model.mid._forward_hooks
    model.mid.forward = lambda x: None
    with pytest.raises(InputError, match="a tensor, or a tuple with one, from mid, got NoneType"):
        f(x)
    assert not model.mid._forward_hooks


class Square(torch.autograd.Function):
    """Has no forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        return 2 * ctx.saved_tensors[0] * g[0]


def test_without_forward_mode() -> None:
    x, V = rows(3, 5), rows(3, 5, 2, seed=1)

    def square(x: Tensor) -> Tensor:
        return Square.apply(x)  # type: ignore[no-any-return, no-untyped-call]

    with pytest.warns(UserWarning, match="jvp: computed by two VJPs, as there is no forward mode"):
        near(jvp(square, x, V), 2 * x[:, :, None] * V)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near(jvp(square, x, V), 2 * x[:, :, None] * V)

    def once(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(square, x, use_reentrant=True)  # type: ignore[no-any-return]

    refused = pytest.raises(InputError, match="model: expected a model with forward mode, or that can be differ")
    with refused, pytest.warns(UserWarning, match="no forward mode"):
        jvp(once, x, V)


def test_chunks_that_do_not_fit_are_halved() -> None:
    x, V, W = rows(3, 5), rows(3, 5, 4, seed=1), rows(7, 5, seed=2)
    sizes: list[int] = []

    def f(x: Tensor) -> Tensor:
        sizes.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError
        return x @ W.T

    near(jvp(f, x, V), W @ V)
    assert sizes == [1, 12, 6, 3, *[2] * 6]
    with torch.inference_mode():
        near(vjp(f, x, rows(3, 7, 1), chunk=2), W.T @ rows(3, 7, 1))
    with pytest.raises(torch.OutOfMemoryError):
        jvp(f, x, V, chunk=5)


def test_what_has_no_products_is_refused() -> None:
    x, V = rows(2, 4, 5, 3), rows(2, 60, 1)
    unet: Any = tiny_families.model("sd").eval()
    prompt = {k: v[:2] for k, v in tiny_families.banks(unet).items()}
    fuse(unet)
    with pytest.raises(InputError, match=r"fastdistill\.unfuse\(model\)"):
        TapFunction(unet, "mid_block", 1, prompt)
    unfuse(unet)
    unet.enable_gradient_checkpointing()
    with pytest.raises(InputError, match=r"disable_gradient_checkpointing"):
        TapFunction(unet, "mid_block", 1, prompt)
    with pytest.raises(InputError, match=r"float32 or float64 \(model\.float\(\)\).* got torch.bfloat16 in first"):
        of_net(model=net(torch.bfloat16))
    with pytest.raises(InputError, match=r"not compiled \(model\._orig_mod is\)"):
        TapFunction(torch.compile(net()), "mid", 7, rows(2, 5, 6))
    with pytest.raises(InputError, match="'midd' \\(near matches: mid\\)"):
        of_net("midd")
    with pytest.raises(InputError, match="level: expected the"):
        of_net("x0")
    with pytest.raises(InputError, match="eval mode"):
        jvp(of_net(model=net().train()), x, V)
    for product, size in ((jvp, 60), (vjp, 6)):
        with pytest.raises(InputError, match="a function that depends on x, got time"):
            product(of_net("time"), x, rows(2, size, 1))
    with pytest.raises(InputError, match="x: expected torch"):
        jvp(of_net(), x.float(), V.float())
    with pytest.raises(InputError, match="a batch of 2"):
        jvp(of_net(), x[:1], V[:1])
    with pytest.raises(InputError, match=r"V: expected \[2, 60, k\]"):
        jvp(of_net(), x, V[:, :5])
    with pytest.raises(InputError, match=r"U: expected vectors of the feature, \[B, 90, k\]"):
        vjp(of_net(), x, V)

    class Idle(Net):
        def features(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
            return self.first(x)  # type: ignore[no-any-return]

    with pytest.raises(InputError, match="a module that runs in a forward of the model, got mid"):
        of_net(model=Idle().double().eval())(x)
