# SPDX-License-Identifier: Apache-2.0
"""Arguments of ops of another type than they take: each is refused by its name, before a kernel sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastdistill import (
    attention,
    cross_attention,
    feature_match,
    geglu,
    group_norm_silu,
    layer_norm_modulate,
    output_match,
    residual_layer_norm_modulate,
)
from fastdistill.diffusion.matching import match_table
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.errors import InputError

X, ROW = torch.ones(2, 3, 8), torch.ones(2, 8)
QKV = {"q": torch.ones(2, 5, 8), "k": torch.ones(2, 5, 8), "v": torch.ones(2, 5, 8), "heads": 2, "scale": 0.5}
MODULATE = {"x": X, "scale": ROW, "shift": ROW, "weight": ROW[0], "bias": ROW[0], "eps": 1e-6}
CALLS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (geglu, {"x": X, "approximate": "none"}),
    (group_norm_silu, {"x": X.mT.contiguous(), "weight": ROW[0], "bias": ROW[0], "groups": 4, "eps": 1e-5,
                       "time_bias": ROW, "scale": ROW, "shift": ROW, "silu": True}),
    (layer_norm_modulate, MODULATE),
    (residual_layer_norm_modulate, MODULATE | {"h": X, "gate": ROW}),
    (attention, QKV),
    (cross_attention, QKV | {"mask": torch.ones(2, 5, dtype=torch.bool), "rows": torch.arange(2)}),
    (feature_match, {"student": [X], "teacher": [X], "weights": [1.0], "grad_scale": torch.ones(()), "eps": 1e-6,
                     "delta": 1.0, "distance": "mse"}),
    (output_match, {"student": X, "teacher": X, "timestep": torch.arange(2), "weights": torch.ones(2),
                    "table": match_table(NoiseSchedule.linear(5).coefficients()), "output_weight": 1.0,
                    "task_weight": 1.0, "delta": 1.0, "distance": "mse"}),
]  # fmt: skip


@pytest.mark.parametrize(("op", "given"), CALLS)
def test_another_type_is_refused_by_the_name_of_its_argument(op: Callable[..., Any], given: dict[str, Any]) -> None:
    op(**given)
    for argument, value in given.items():
        wrong: list[Any] = ["x", [None], object()]
        if isinstance(value, torch.Tensor):
            wrong += [3, *([value.to_sparse()] if value.ndim else [])]
        elif isinstance(value, float | int) and not isinstance(value, bool):
            wrong += ["1"]
        for other in wrong:
            with pytest.raises(InputError, match=rf"^{argument}(\[0\])?: expected "):
                op(**given | {argument: other})


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    wanted = group_norm_silu(X.mT.contiguous(), None, None, 4, 0.5)
    assert torch.equal(group_norm_silu(X.mT.contiguous(), None, None, np.int64(4), np.float32(0.5)), wanted)
    assert torch.equal(attention(**QKV | {"scale": np.float32(0.5)}), attention(**QKV))
    assert torch.equal(attention(**QKV | {"scale": torch.tensor(0.5)}), attention(**QKV))
