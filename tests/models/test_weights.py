# SPDX-License-Identifier: Apache-2.0
"""Quantized weights as plain tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from fastdistill.data.fingerprint import sha256_of_tensors
from fastdistill.errors import InputError
from fastdistill.models import make_student
from fastdistill.models.weights import plain_tensors, quantized
from tests import tiny


class TwoTensor(Tensor):
    """A tensor that consists of two tensors, like the quantized ones of torchao."""

    def __new__(cls, a: Tensor, b: Tensor) -> TwoTensor:
        made = a.clone().as_subclass(cls)
        made.a, made.b = a, b
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["a", "b"], None


def fingerprint(model: nn.Module) -> str:
    return sha256_of_tensors(plain_tensors(model.state_dict()))


def test_plain_weights_are_themselves() -> None:
    state = nn.Linear(3, 2).state_dict()
    assert plain_tensors(state) == state and not quantized(nn.Linear(3, 2))


def test_packed_weights_of_torch_ao() -> None:
    """The hash depends on every weight, and a copy of the model has the same hash."""
    models = [tiny.packed(nn.Sequential(nn.Linear(4, 4))) for _ in range(2)]
    assert all(map(quantized, models))
    assert fingerprint(models[0]) != fingerprint(models[1])
    models[1].load_state_dict(models[0].state_dict())
    assert fingerprint(models[0]) == fingerprint(models[1])


def test_weights_that_are_several_tensors() -> None:
    """Tensor subclasses, like torchao's: only their parts can be hashed."""
    parts = torch.arange(4.0), torch.arange(4.0) + 1
    state = {"weight": TwoTensor(*parts), "inner": {"scale": 0.5, "dtype": torch.int8, "rows": (parts[0], None)}}
    found = plain_tensors(state)
    expected: dict[str, Any] = {"weight.a": parts[0], "weight.b": parts[1], "inner['rows'][0]": parts[0]}
    assert found.pop("inner['scale']") == 0.5 and found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    other = plain_tensors({**state, "weight": TwoTensor(parts[0], parts[1] + 1)})
    assert sha256_of_tensors(found) != sha256_of_tensors({k: v for k, v in other.items() if "scale" not in k})


def test_integers_are_packed_weights() -> None:
    model = nn.Linear(3, 2)
    model.weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.uint8), requires_grad=False)
    assert quantized(model)
    model.weight = nn.Parameter(TwoTensor(torch.zeros(2, 3), torch.zeros(2, 3)), requires_grad=False)
    assert quantized(model)


def test_a_student_is_not_made_of_quantized_weights(digits: UNet2DConditionModel) -> None:
    """int8 weights have the same shape as the student's and would be copied as numbers up to 127."""
    linear = digits.time_embedding.linear_1
    linear.weight = nn.Parameter((linear.weight.detach() * 100).to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"teacher: expected weights to copy, .*init='random'\), got quantized ones"):
        make_student(digits, {"remove_mid": True})
    assert make_student(digits, {"remove_mid": True}, init="random").model.dtype == torch.float32
