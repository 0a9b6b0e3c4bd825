# SPDX-License-Identifier: Apache-2.0
"""Prepared steps give the same bits as steps that are not prepared, whatever happens in between."""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdistill.errors import InputError
from fastdistill.ops import OPS, use
from fastdistill.train import AdamWEMA, optimizer, prepared
from tests.train.test_optimizer import OPTIONS, backward, model


def made(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, AdamWEMA]:
    net = model(dtype)
    groups = [{"params": list(net[0].parameters())}, {"params": list(net[2].parameters()), "lr": 1e-3, "ema": False}]
    return net, AdamWEMA(groups, **OPTIONS, max_norm=3.0, ema_decay=0.9)


def steps(net: nn.Module, opt: AdamWEMA, numbers: range) -> None:
    for k in numbers:
        backward(net, k)
        opt.step()
        opt.zero_grad()


def everything(net: nn.Module, opt: AdamWEMA) -> list[Tensor]:
    state = [t for p in net.parameters() for t in opt.state.get(p, {}).values()]
    return [*net.parameters(), *state, opt.skipped]


def no_gradient(net: nn.Module, opt: AdamWEMA) -> None:
    backward(net, 50)
    next(net.parameters()).grad = None
    opt.step()
    opt.zero_grad()


def infinite(net: nn.Module, opt: AdamWEMA) -> None:
    backward(net, 50)
    grad = next(net.parameters()).grad
    assert grad is not None
    grad.view(-1)[0] = float("inf")
    opt.step()
    opt.zero_grad()


def another_layout(net: nn.Module, opt: AdamWEMA) -> None:
    backward(net, 50)
    weight = next(net.parameters())
    assert weight.grad is not None
    weight.grad = weight.grad.contiguous(memory_format=torch.channels_last)
    opt.step()
    opt.zero_grad()


def kept_gradients(net: nn.Module, opt: AdamWEMA) -> None:
    backward(net, 50)
    opt.step()
    opt.zero_grad(set_to_none=False)


def moved(net: nn.Module, opt: AdamWEMA) -> None:
    weight = next(net.parameters())
    weight.data = weight.data.clone()


def channels_last(net: nn.Module, opt: AdamWEMA) -> None:
    net.to(memory_format=torch.channels_last)


def loaded(net: nn.Module, opt: AdamWEMA) -> None:
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def replaced(net: nn.Module, opt: AdamWEMA) -> None:
    state = opt.state[next(net.parameters())]
    state["exp_avg"] = state["exp_avg"] * 2


def another_dict(net: nn.Module, opt: AdamWEMA) -> None:
    p = next(net.parameters())
    opt.state[p] = {name: t + 1 for name, t in opt.state[p].items()}


def forgotten(net: nn.Module, opt: AdamWEMA) -> None:
    opt.state = defaultdict(dict)


def cleared(net: nn.Module, opt: AdamWEMA) -> None:
    opt.state.clear()


def one_more(net: nn.Module, opt: AdamWEMA) -> None:
    net.register_parameter("more", nn.Parameter(torch.ones(3, 2)))
    opt.add_param_group({"params": [net.more]})


def options(net: nn.Module, opt: AdamWEMA) -> None:
    opt.param_groups[1].update(lr=5e-3, betas=(0.5, 0.9), weight_decay=0.3, eps=1e-3)
    opt.max_norm, opt.ema_warmup = 0.1, False
    opt.ema_weight.fill_(0.5)


def no_average(net: nn.Module, opt: AdamWEMA) -> None:
    opt.param_groups[0]["ema"] = False


def scaled(net: nn.Module, opt: AdamWEMA) -> None:
    opt.grad_scale = torch.tensor(4.0)


def by_the_reference(net: nn.Module, opt: AdamWEMA) -> None:
    with use("reference"):
        steps(net, opt, range(50, 52))


def profiled(net: nn.Module, opt: AdamWEMA) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        steps(net, opt, range(50, 52))


EVENTS = [
    no_gradient, infinite, another_layout, kept_gradients, moved, channels_last, loaded, replaced, another_dict,
    forgotten, cleared, one_more, options, no_average, scaled, by_the_reference, profiled,
]  # fmt: skip


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_bits(event: Callable[..., None], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for way in ("prepared", "not"):
        if way == "not":
            monkeypatch.setattr(prepared.Prepared, "of", lambda *_: None)
        net, opt = made(dtype)
        steps(net, opt, range(3))
        event(net, opt)
        steps(net, opt, range(3, 7))
        results.append(everything(net, opt))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.skipif(OPS["adamw_ema"].kernels[-1].available() is not None, reason="no C++ kernels")
def test_what_is_prepared_is_not_gathered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net, opt = made()
    steps(net, opt, range(1))

    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("the ops were called")

    for name in ("adamw_ema", "grad_square_sum"):
        monkeypatch.setattr(optimizer, name, fail)
    before = [p.clone() for p in net.parameters()]
    calls = OPS["adamw_ema"].calls["cpp"]
    steps(net, opt, range(1, 4))
    assert OPS["adamw_ema"].calls["cpp"] == calls + 3 and not any(map(torch.equal, before, net.parameters()))


def test_gradients_that_go_between_the_norm_and_the_update() -> None:
    net, opt = made()
    steps(net, opt, range(2))
    before = [t.clone() for t in everything(net, opt)]
    backward(net, 2)
    norm = opt.square_sum()
    gone = weakref.ref(next(net.parameters()).grad)  # type: ignore[arg-type]
    opt.zero_grad()
    assert gone() is None, "nothing keeps them"
    opt.update(norm)
    assert all(map(torch.equal, before, everything(net, opt)))


def test_loading_lets_go_of_the_state_before() -> None:
    net, opt = made()
    steps(net, opt, range(2))
    gone = weakref.ref(opt.state[next(net.parameters())]["exp_avg"])
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert gone() is None


def test_a_copy_steps_alone() -> None:
    net, opt = made()
    steps(net, opt, range(2))
    net2, opt2 = copy.deepcopy((net, opt))
    before = everything(net, opt)
    kept = [t.clone() for t in before]
    steps(net2, opt2, range(2, 4))
    assert all(map(torch.equal, before, kept))
    steps(net, opt, range(2, 4))
    assert all(map(torch.equal, everything(net, opt), everything(net2, opt2)))


def test_a_wrong_sum_is_named() -> None:
    net, opt = made()
    steps(net, opt, range(2))
    backward(net, 2)
    for wrong in (torch.tensor(1.0), torch.ones(1, dtype=torch.float64)):
        with pytest.raises(InputError, match="square_sum: expected "):
            opt.update(wrong)
