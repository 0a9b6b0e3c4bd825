# SPDX-License-Identifier: Apache-2.0
"""Arguments of schedules, tables and samplers with a wrong type: each is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastdistill import (
    NoiseSchedule,
    ddim,
    initial_noise,
    loss_weights,
    match_table,
    replacement_probability,
    thresholds,
)
from fastdistill.errors import InputError

TABLE = NoiseSchedule.linear(5).coefficients()
X = torch.ones(2, 3, 4, 4)


def halved(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return x / 2


CALLS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (thresholds, {"p": torch.ones(2)}),
    (thresholds, {"p": 0.5}),
    (replacement_probability, {"p": "exp", "T": 4}),
    (NoiseSchedule, {"alphas_cumprod": TABLE[:, 0]}),
    (NoiseSchedule.cosine, {"T": 4}),
    (NoiseSchedule.linear, {"T": 4}),
    (loss_weights, {"coefficients": TABLE, "weighting": "min_snr", "gamma": 5.0}),
    (match_table, {"coefficients": TABLE, "teacher": TABLE, "guidance": 0.0, "weights": "min_snr", "gamma": 5.0}),
    (initial_noise, {"seed": 1, "rows": torch.arange(2), "shape": (3, 4)}),
    (ddim, {"model": halved, "x_T": X, "prompts": X[:, 0], "null_prompt": None, "schedule": NoiseSchedule.linear(5),
            "steps": 2, "guidance_scale": 1.0, "clip_sample": 1.0}),
]  # fmt: skip


@pytest.mark.parametrize(("function", "given"), CALLS)
def test_another_type_is_refused_by_the_name_of_its_argument(
    function: Callable[..., Any], given: dict[str, Any]
) -> None:
    function(**given)
    for argument, value in given.items():
        wrong: list[Any] = ["x", [None], object()]
        if isinstance(value, torch.Tensor) and argument not in ("x_T", "prompts"):
            wrong += [value.to("meta"), value.to_sparse()]
        elif isinstance(value, int | float):
            wrong += ["1", float("nan")]
        for other in wrong:
            with pytest.raises(InputError, match=rf"^(p\(t\)|{argument})(\[0\])?: expected "):
                function(**given | {argument: other})
