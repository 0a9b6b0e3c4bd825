# SPDX-License-Identifier: Apache-2.0
"""Every invalid argument of ``output_match`` is named, with the expected and the given value."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdistill.diffusion.matching import match_table
from fastdistill.errors import InputError
from fastdistill.ops import Task, output_match
from tests.ops.test_output_match import coefficients

S, TIME = torch.ones(2, 4, 3), torch.tensor([0, 1])
TABLE = match_table(coefficients("epsilon"))
TASK = Task(torch.ones(5, 4, 3), TIME, TIME, coefficients("epsilon"), TIME)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((S, S, TIME, None), {}, "table: expected a tensor, got NoneType"),
        ((S, S, TIME, TABLE), {"task": (S, TIME)}, "task: expected a Task, got tuple"),
        ((S, None, TIME, TABLE), {}, "teacher: expected an output, or a task beside it, got None"),
        ((S, S.requires_grad_(False).clone().requires_grad_(), TIME, TABLE), {}, "teacher: expected a tensor without"),
        ((S, torch.ones(2, 4, 5), TIME, TABLE), {}, r"teacher: expected 3 dimensions, 2 samples of size \(3,\), got"),
        ((S, torch.ones(2, 7, 3), TIME, TABLE), {}, r"teacher: expected the 4 channels of student or teacher or, with"),
        ((S, S, TIME, TABLE), {"channels": 3}, "student: expected the 3 channels of channels or, with a learned"),
        ((S.double(), S, TIME, TABLE), {}, "student: expected dtype float32 or bfloat16 or float16, got float64"),
        ((S, S, TIME[:1], TABLE), {}, r"timestep: expected one number a sample \(2,\), got \(1,\)"),
        ((S, S, TIME.int(), TABLE), {}, "timestep: expected dtype int64, got int32"),
        ((S, S, TIME, TABLE[:, :4]), {}, r"table: expected \[T, 5\], got \(50, 4\)"),
        ((S, S, TIME, TABLE), {"unconditional": S[:1]}, r"unconditional: expected the shape of teacher \(2, 4, 3\)"),
        (
            (S, S, TIME, TABLE),
            {"guidance": torch.ones(3), "unconditional": S},
            r"guidance: expected one number a sample \(2,\)",
        ),
        ((S, S, TIME, TABLE), {"guidance": torch.ones(2)}, "guidance: expected None without unconditional, got a te"),
        ((S, S, TIME, TABLE), {"guidance": 3.0}, "guidance: expected a tensor, got float"),
        ((S, S, TIME, TABLE), {"x_t": torch.ones(2, 4, 4)}, r"x_t: expected shape \(2, 4, 3\), got \(2, 4, 4\)"),
        ((S, S, TIME, TABLE), {"distance": "l1"}, "distance: expected one of mse, huber, got 'l1'"),
        ((S, S, TIME, TABLE), {"channels": {}}, "channels: expected a whole number, got {}"),
        ((S, S, TIME, TABLE), {"delta": 0.0}, "delta: expected a number > 0, got 0.0"),
        (
            (S, S, TIME, TABLE),
            {"task": TASK._replace(latents=torch.ones(5, 4, 2))},
            r"task.latents: expected \[N, 4, 3\]",
        ),
        ((S, S, TIME, TABLE), {"task": TASK._replace(latents=torch.ones(0, 4, 3))}, "task.latents: .* with N > 0, got"),
        ((S, S, TIME, TABLE), {"task": TASK._replace(first_sample=-1)}, "task.first_sample: expected at least 0"),
        ((S, S, TIME, TABLE), {"task": TASK._replace(first_sample=1.5)}, "task.first_sample: expected a whole number"),
        ((S, S, TIME, TABLE), {"task": TASK._replace(coefficients=TABLE)}, "task.coefficients: expected one row of 4"),
        ((S, S, TIME, TABLE), {"grad": torch.ones(2, 3, 4).mT}, "grad: expected a contiguous buffer like"),
        ((S, S.to("meta"), TIME, TABLE), {}, r"teacher: expected the device of student \(cpu\), got meta"),
    ],
)
def test_bad_input(arguments: Any, options: dict[str, Any], message: str) -> None:
    output_match(S, S, TIME, TABLE, grad=torch.ones(2, 4, 3))  # an earlier valid call does not make this one valid
    with pytest.raises(InputError, match=message):
        output_match(*arguments, **options)
