# SPDX-License-Identifier: Apache-2.0
"""Options and parameters that AdamWEMA does not support: each is refused by name, globally or in a group."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastdistill.errors import InputError
from fastdistill.train import AdamWEMA

NAN = float("nan")
OPTIONS: dict[str, list[Any]] = {
    "lr": ["1e-4", None, NAN, -1.0, [1], torch.ones(2)],
    "betas": [(0.9,), 0.9, None, "ab", ("0.9", 0.9), (NAN, 0.9), (1.0, 0.9), (0.9, 0.9, 0.9)],
    "eps": [None, "1e-8", NAN, -1],
    "weight_decay": [None, "x", NAN, -1],
}
SHARED: dict[str, list[Any]] = {
    "max_norm": [None, "x", NAN, -1],
    "ema_decay": ["x", NAN, 2, [0.9]],
    "ema_warmup": [None, "x"],
    "zero_grads": [None, "x"],
}


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2))]


@pytest.mark.parametrize("option", OPTIONS | SHARED)
def test_wrong_options(option: str) -> None:
    for wrong in (OPTIONS | SHARED)[option]:
        with pytest.raises(InputError, match=rf"^{option}(\[0\])?: expected "):
            AdamWEMA(weights(), **{option: wrong})


@pytest.mark.parametrize("option", OPTIONS | {"ema": ["x", None]})
def test_wrong_options_of_a_group_leave_the_optimizer_as_it_is(option: str) -> None:
    for wrong in (OPTIONS | {"ema": ["x", None]})[option]:
        optimizer = AdamWEMA(weights())
        with pytest.raises(InputError, match=rf"^param_groups\[1\]\['{option}'\](\[0\])?: expected "):
            optimizer.add_param_group({"params": weights(), option: wrong})
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("params", [None, 3, "ab", [], iter(()), {}, nn.Linear(1, 1), torch.ones(2), set(weights())])
def test_what_holds_no_parameters(params: Any) -> None:
    with pytest.raises(InputError, match=r"^params: expected "):
        AdamWEMA(params)
    if not isinstance(params, torch.Tensor):  # one parameter is a group
        with pytest.raises(InputError, match=re.escape("param_groups[0]['params']: expected ")):
            AdamWEMA([{"params": params}])


@pytest.mark.parametrize("wrong", [None, "x", weights()[0] * 2, torch.ones(2).to_sparse()])
def test_what_is_no_parameter(wrong: Any) -> None:
    with pytest.raises(InputError, match=r"^params\[1\]: expected "):
        AdamWEMA([*weights(), wrong])
    with pytest.raises(InputError, match=r"^params\[1\]: expected "):
        AdamWEMA([("first", weights()[0]), ("second", wrong)])


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    found = []
    for number in (float, np.float64, lambda x: torch.tensor(x, dtype=torch.float64)):
        (p,) = weights()
        options = {name: number(0.125) for name in ("lr", "eps", "weight_decay", "max_norm", "ema_decay")}
        optimizer = AdamWEMA([p], betas=(number(0.5), 0.75), **options)
        p.grad = torch.full((2,), 0.5)
        optimizer.step()
        found.append((p.detach(), optimizer.state[p]["ema"]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=4 * torch.finfo(torch.float32).eps, atol=0)


def test_a_parameter_belongs_to_one_group() -> None:
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    rule = "expected each parameter once, in one group"
    for params, place in (([p, p], "param_groups[0]['params'][1]"),
                          ([{"params": [p]}, {"params": [q, p]}], "param_groups[1]['params'][1]"),
                          ([("a", p), ("b", p)], "param_groups[0]['params'][1]")):  # fmt: skip
        with pytest.raises(InputError, match=re.escape(f"{place}: {rule}")):
            AdamWEMA(params)
    optimizer = AdamWEMA([p])
    with pytest.raises(InputError, match=re.escape("param_groups[1]['params'][0]")):
        optimizer.add_param_group({"params": p})
    assert len(optimizer.param_groups) == 1


def optimizer(shape: tuple[int, ...], *, named: str | None = None) -> AdamWEMA:
    parameter = nn.Parameter(torch.ones(shape))
    made = AdamWEMA([(named, parameter)] if named else [parameter], ema_decay=0.9)
    parameter.grad = torch.ones(shape)
    made.step()
    return made


def test_an_optimizer_takes_no_state_of_another_shape_or_name() -> None:
    own = optimizer((2, 3))
    before = {k: v.clone() for k, v in own.state[own.param_groups[0]["params"][0]].items()}
    with pytest.raises(InputError, match=r"state_dict: exp_avg of parameter 0: expected \(2, 3\), got \(3,\)"):
        own.load_state_dict(optimizer((3,)).state_dict())
    after = own.state[own.param_groups[0]["params"][0]]
    assert all(torch.equal(before[k], after[k]) for k in before)
    with pytest.raises(InputError, match=r"param_groups\[0\]: .*, got b in place of a"):
        optimizer((3,), named="a").load_state_dict(optimizer((3,), named="b").state_dict())
    optimizer((3,), named="a").load_state_dict(optimizer((3,)).state_dict())  # without names, by position
