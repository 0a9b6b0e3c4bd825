# SPDX-License-Identifier: Apache-2.0
"""Random numbers that a student draws itself: the same in a run that goes on, others in each step and part."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.train.ranks import Interrupted, Tiny, make, stop_after
from tests.train.test_resume import same, state


class Dropping(Tiny):
    """Dropout as a module, by a function, and by Python's and NumPy's generators."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.dropout = nn.Dropout(0.3)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output = self.dropout(super().forward(*args, **kwargs))
        if not self.training:
            return output
        output = nn.functional.dropout(output, 0.1)
        return output * (1 + random.random() + np.random.rand())  # noqa: NPY002


def test_a_student_that_draws_random_numbers_resumes_exactly(tmp_path: Path) -> None:
    """Whatever else draws from the generators meanwhile, and without a change to these."""
    torch.manual_seed(1)
    whole = make(student=Dropping(6))
    before = torch.get_rng_state()
    whole.fit()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    with pytest.raises(Interrupted):
        make(student=Dropping(6)).fit(tmp_path, progress=stop_after(3))
    again = make(student=Dropping(6))
    again.fit(tmp_path, progress=lambda *_: torch.rand(3))
    assert same(state(again), state(whole))
    other = make(student=Dropping(6), seed=1)
    other.fit()
    assert not same(state(other), state(whole))


def test_draws_differ_from_step_to_step_and_from_part_to_part_of_a_batch() -> None:
    trainer, seen = make(), []
    for number, first_sample in ((0, 0), (1, 0), (0, 2), (0, 0)):
        trainer.step.prepare(number)
        trainer.step._first_sample = first_sample
        with trainer.step.randomness():
            seen.append(torch.rand(2).tolist())
    assert seen[0] == seen[3] and len({tuple(pair) for pair in seen}) == 3
