# SPDX-License-Identifier: Apache-2.0
"""Calls of a known form: they skip torch's dispatcher if nothing intercepts there, else they go through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from fastdistill.ops import (
    OPS,
    _dispatch,
    feature_match,
    geglu,
    group_norm_silu,
    layer_norm_modulate,
    output_match,
    use,
)
from fastdistill.ops._backward import _one as loss_scale
from fastdistill.ops._dispatch import Kernel, Kind, Op
from fastdistill.ops.feature_match import _ones as tap_weights
from tests.harness import EPS

X, TIME, TABLE, WEIGHT = torch.linspace(-2, 2, 48).view(2, 4, 6), torch.tensor([0, 1]), torch.ones(3, 5), torch.ones(4)
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "geglu": geglu,
    "group_norm_silu": lambda x: group_norm_silu(x, WEIGHT, None, 2),
    "layer_norm_modulate": layer_norm_modulate,
    "feature_match": lambda x: feature_match([x], [X.flip(0)]).loss,
    "output_match": lambda x: output_match(x, X.flip(0), TIME, TABLE).loss,
}
BACKWARD = {"feature_match": "scale_gradients", "output_match": "scale_gradients"}


def both(call: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The output without gradients, the output with gradients, and the gradient."""
    x = X.clone().requires_grad_()
    y = call(x)
    return call(x.detach()), y.detach(), torch.autograd.grad(y.square().sum(), x)[0]


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.add(str(func).split(".")[1] if func.namespace == "fastdistill" else "")
        return func(*args, **(kwargs or {}))


class Mine(Tensor):
    pass


@pytest.mark.parametrize("name", CALLS)
def test_who_listens_hears_every_op(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = {name, BACKWARD.get(name, f"{name}_backward")}
    expected = both(CALLS[name])
    with Seen() as seen:
        heard = both(CALLS[name])
    assert ops <= seen.ops
    with profile() as profiler:
        both(CALLS[name])
    assert {f"fastdistill::{op}" for op in ops} <= {event.key for event in profiler.key_averages()}
    assert CALLS[name](X.as_subclass(Mine)).shape == expected[0].shape

    def dispatched(*args: Any) -> None:
        raise AssertionError("through the dispatcher")

    for op in ops:
        monkeypatch.setattr(OPS[op], "overload", dispatched)
    past = both(CALLS[name])
    for one, two, three in zip(expected, heard, past, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    with pytest.raises(AssertionError, match="through the dispatcher"), Seen():
        both(CALLS[name])
    with pytest.raises(AssertionError, match="through the dispatcher"):
        CALLS[name](X.as_subclass(Mine))


@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_that_is_asked_for_runs_calls_of_a_known_kind(name: str) -> None:
    both(CALLS[name])
    for op in (name, BACKWARD.get(name, f"{name}_backward")):
        before = OPS[op].calls["reference"]
        with use("reference"):
            both(CALLS[name])
        assert OPS[op].calls["reference"] > before
        after = OPS[op].calls["reference"]
        both(CALLS[name])
        assert OPS[op].calls["reference"] == after or len(OPS[op].kernel_names()) == 1


@pytest.mark.parametrize("name", CALLS)
def test_a_tensor_that_outlived_its_transform(name: str) -> None:
    left: list[Tensor] = []
    torch.func.grad(lambda x: (left.append(x), x.sum())[1])(X.clone())
    with torch.no_grad():
        assert torch.equal(CALLS[name](left[0]), CALLS[name](X))


@pytest.mark.parametrize("name", ["geglu", "group_norm_silu", "layer_norm_modulate"])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.filterwarnings("ignore")  # from the tracer, which is deprecated: shapes become constants
def test_a_tracer_hears_every_op(name: str, gradient: bool) -> None:
    """If a call skipped the dispatcher, the tracer's graph would contain the outputs' memory but not the op."""
    expected = CALLS[name](X.flip(0))
    traced = torch.jit.trace(CALLS[name], X.clone().requires_grad_(gradient), check_trace=False)
    assert torch.equal(traced(X.flip(0)), expected)


def test_an_empty_list_that_comes_as_none() -> None:
    """Code from AOTInductor calls an op like this, without the checks of torch's dispatcher."""
    seen: list[tuple[Any, ...]] = []
    op = OPS["layer_norm_modulate"].overload
    _dispatch._with_lists(lambda *args: seen.append(args), op)(X, *[None] * 6, 1e-6, X, None, X, X)
    (args,) = seen
    assert args[9] == [] and args[1:7] == (None,) * 6
    geglu_op = OPS["geglu"].run
    assert _dispatch._with_lists(geglu_op, OPS["geglu"].overload) is geglu_op


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kernel", [None, "reference"])
@pytest.mark.parametrize("default", [torch.float64, "meta"], ids=str)
def test_any_default(name: str, kernel: str | None, default: torch.dtype | str) -> None:
    """Default weights and scales are float32 on the device of the call, whatever the default dtype and device are."""
    with use(kernel):
        expected = both(CALLS[name])
        loss_scale.cache_clear()
        tap_weights.cache_clear()
        if isinstance(default, str):
            torch.set_default_device(default)
        else:
            torch.set_default_dtype(default)
        try:
            found = both(CALLS[name])
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
    for one, two in zip(expected, found, strict=True):
        assert (two.dtype, two.device) == (torch.float32, X.device) and torch.equal(one, two)


def test_compiled_loops_run_after_the_ops_they_read() -> None:
    """The compiler for CPUs fuses loops of two shapes that sum outputs, and then schedules them by memory."""

    def chain(x: Tensor, scale: Tensor, weight: Tensor, gate: Callable[[Tensor], Tensor] = geglu) -> Tensor:
        for _ in range(3):
            total = gate(x) + gate(torch.sin(x) @ weight)
            scaled = total * scale[:, None]
            x = torch.cat([total @ weight[:16], scaled @ weight[:16]], -1)[..., :32] + total.sum((0, 1))[0]
        return x

    g = torch.Generator().manual_seed(0)
    inputs = [torch.rand(shape, generator=g) for shape in ((2, 16, 32), (2, 16), (32, 32))]
    inputs[2] /= 32
    with torch._inductor.config.patch(force_disable_caches=True):
        got = torch.compile(chain)(*inputs)
    truth, moved = (
        chain(*(x.double() * by for x in inputs), lambda x: x[..., :16] * torch.nn.functional.gelu(x[..., 16:]))
        for by in (1.0, 1.0 + 2**-20)
    )
    # All terms are positive, so a relative change of all inputs bounds the relative change of the result.
    condition = ((moved - truth).abs() * 2**20).max().item()
    assert (got.double() - truth).abs().max().item() <= 4 * EPS * condition


def test_calls_on_a_gpu_ask_kernels_each_time() -> None:
    """Also without torch's dispatcher; whether a kernel supports a call may depend on its strides."""
    ran: list[str] = []
    refuse = lambda x: None if x.is_contiguous() else "strides"  # noqa: E731
    kernels = [
        Kernel("first", "cuda", lambda x: ran.append("first"), lambda: None, refuse),
        Kernel("second", "cuda", lambda x: ran.append("second"), lambda: None),
    ]
    op = Op("copy", "", lambda x: ran.append("reference"), kernels)
    kind = Kind(on_cpu=False)
    for x in (X, X.transpose(0, 1), X):
        op(kind, x)
    assert ran == ["first", "second", "first"] and op.calls == {"first": 2, "second": 1}


def test_kinds_of_tensors() -> None:
    x = torch.ones(2)
    known = Kind.of((x, None, torch.nn.Parameter(x)))
    assert known is not None and known.on_cpu and Kind.of((None,)) is not None
    with FakeTensorMode():
        assert Kind.of((x, torch.ones(2))) is None
    assert Kind.of((x, x.to("meta"))) is None
