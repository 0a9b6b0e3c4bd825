# SPDX-License-Identifier: Apache-2.0
"""Arguments with a wrong type: each is refused by name before a kernel gets it."""

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
from fastdistill.ops import AdamWGroup, adamw_ema, empty_draw, noise_gather, use
from tests.ops.test_noise_gather import banks

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


def test_an_array_is_no_text_number_or_switch() -> None:
    for op, given in CALLS:
        for argument, value in given.items():
            if not isinstance(value, torch.Tensor | list):
                with pytest.raises(InputError, match=rf"^{argument}: expected "):
                    op(**given | {argument: np.ones(2)})
    with pytest.raises(InputError, match=r"^kernel: expected one of"), use(np.ones(2)):  # type: ignore[arg-type]
        pass


def test_numbers_beyond_float32_are_refused_by_name() -> None:
    for op, given in CALLS:
        for argument in given.keys() & {"eps", "scale", "delta", "output_weight", "task_weight"}:
            if isinstance(given[argument], float):
                with pytest.raises(InputError, match=rf"^{argument}: expected .*float32, got 1e\+300"):
                    op(**given | {argument: 1e300})


@pytest.mark.parametrize("name", ["params", "exp_avgs", "exp_avg_sqs", "averages", "grads"])
def test_what_is_written_to_has_memory_of_its_own(name: str) -> None:
    def lists() -> dict[str, list[torch.Tensor]]:
        names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "averages")
        return {name: [torch.ones(3, 2)] for name in names} | {"steps": [torch.zeros(())]}

    options = {"groups": [AdamWGroup(torch.tensor(0.1))], "square_sum": torch.ones((), dtype=torch.float64)}
    options |= {"skipped": torch.tensor(0), "ema_weight": torch.tensor(0.1), "zero_grads": True}
    adamw_ema(**lists(), **options)  # type: ignore[arg-type]
    parameter = torch.ones(3, 2, requires_grad=True)
    adamw_ema(**lists() | {"params": [parameter]}, **options)  # type: ignore[arg-type]
    assert parameter.requires_grad and (parameter < 1).all()
    with pytest.raises(InputError, match=rf"^{name}\[0\]: expected memory of its own for each element, got strides"):
        adamw_ema(**lists() | {name: [torch.ones(1, 2).expand(3, 2)]}, **options)  # type: ignore[arg-type]
    for other in (None, torch.ones(3, 2), {"x": torch.ones(3)}):
        with pytest.raises(InputError, match=rf"^{name}: expected a list of tensors"):
            adamw_ema(**lists() | {name: other}, **options)  # type: ignore[arg-type, operator]


def test_a_draw_is_written_to_memory_of_its_own() -> None:
    latents, own, prompts, coefficients, replace, counter = banks()
    draw = empty_draw(latents, prompts, 3)
    shared = draw._replace(x_t=draw.x_t[:1].expand_as(draw.x_t))
    with pytest.raises(InputError, match=r"^out\.x_t: expected memory of its own"):
        noise_gather(latents, own, prompts, coefficients, replace, counter, null_index=8, out=shared)
    with pytest.raises(InputError, match=r"^null_probability: expected a probability"):
        given = (latents, own, prompts, coefficients, replace, counter)
        noise_gather(*given, batch=2, null_index=8, null_probability=None)  # type: ignore[arg-type]


def test_groups_of_no_channels() -> None:
    assert group_norm_silu(torch.ones(2, 0, 3), None, None, 1).shape == (2, 0, 3)
    with pytest.raises(InputError, match=r"^groups: expected a divisor"):
        group_norm_silu(torch.ones(2, 0, 3), None, None, 2**63)


def test_attention_of_queries_that_share_their_memory() -> None:
    """One token for all queries: torch's fused attention would give its result the strides of the queries."""
    g = torch.Generator().manual_seed(0)
    line, k = torch.randn(60, generator=g), torch.randn(1, 7, 2, 8, generator=g)
    q = line.as_strided((1, 5, 2, 8), (1, 1, 1, 1))
    for op in (attention, cross_attention):
        torch.testing.assert_close(op(q, k, k), op(q.contiguous(), k, k))
