# SPDX-License-Identifier: Apache-2.0
"""Callbacks: when they are called, that they change no step, and how a run ends if one of them fails."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdistill.errors import InputError
from fastdistill.train.checkpoint import steps
from fastdistill.train.state import state_of
from tests.train.ranks import make
from tests.train.test_randomness import Dropping


def state(run: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state_of(run.step, run.student).items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def globals_of_torch() -> tuple[Any, ...]:
    return (
        random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(),  # noqa: NPY002
        torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device(),
    )  # fmt: skip


def disturb(run: Any) -> None:
    """Side effects that a validation function may have."""
    x, rows = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 12)
    run.student(x, torch.tensor([1, 2]), rows).sum().backward()
    run.teacher(x, torch.tensor([1, 2]), rows)
    run.student.eval()
    run.teacher.train()
    run.student.inner.requires_grad_(False)
    for module in run.step.objective.trained:
        module.eval().requires_grad_(False)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")


def test_callbacks_change_no_step() -> None:
    alone, watched = (make(student=Dropping(6)) for _ in range(2))
    alone.fit()
    before = globals_of_torch()
    watched.fit(progress=lambda *_: disturb(watched), callbacks=[(2, lambda *_: disturb(watched))])
    assert same(state(watched), state(alone)) and globals_of_torch() == before
    assert watched.student.training and not watched.teacher.training
    assert all(p.requires_grad and p.grad is None for p in watched.student.parameters())


def test_the_features_of_what_a_callback_ran_are_let_go() -> None:
    run = make()
    taps = run.step.objective._knowledge._taps  # type: ignore[attr-defined]
    kept = []
    run.fit(callbacks=[(1, lambda *_: disturb(run)), (1, lambda *_: kept.extend(t._outputs for t in taps))])
    assert len(kept) == 8 and all(outputs == [[]] for outputs in kept)


def test_when_callbacks_are_called_and_what_they_draw(tmp_path: Path) -> None:
    """A continued run draws the same numbers as an uninterrupted one."""
    calls: list[tuple[int, bool, float]] = []

    def validate(done: int, metrics: Any) -> None:
        calls.append((done, metrics is None, torch.rand(()).item() + random.random()))

    make(steps=5, log_every=2).fit(callbacks=[(3, validate)])
    assert [call[:2] for call in calls] == [(3, True), (5, False)]
    drawn = [call[2] for call in calls]
    make(steps=3).fit(tmp_path, callbacks=[(3, validate)])
    make(steps=5).fit(tmp_path, callbacks=[(3, validate)])
    make(steps=5).fit(tmp_path, callbacks=[(3, validate)])  # already finished
    assert [call[0] for call in calls[2:]] == [3, 5] and [call[2] for call in calls[2:]] == drawn
    assert drawn[0] != drawn[1]


def test_a_callback_that_raises_ends_a_run_that_is_saved(tmp_path: Path) -> None:
    def validate(done: int, _: object) -> None:
        raise ZeroDivisionError("of one's own")

    with pytest.raises(ZeroDivisionError, match="of one's own") as caught:
        make(checkpoint_every=100).fit(tmp_path, callbacks=[(3, validate)])
    note = f"fastdistill: raised by a callback after step 3; saved in {tmp_path}"
    assert caught.value.__notes__ == [note] and list(steps(tmp_path)) == [3]
    again, whole = make(checkpoint_every=100), make(checkpoint_every=100)
    again.fit(tmp_path)
    whole.fit()
    assert same(state(again), state(whole))
    with pytest.raises(ZeroDivisionError) as caught:
        make().fit(progress=validate)
    assert caught.value.__notes__[0].endswith("after step 0; nothing is saved without a directory")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (print, "callbacks: expected pairs"),
        ([print], r"callbacks\[0\]: expected pairs"),
        ([(0, print)], r"callbacks\[0\]\[0\]: expected a number of steps, at least 1, got 0"),
        ([(1, print), (2, "validate")], r"callbacks\[1\]\[1\]: expected a function"),
    ],
)
def test_what_is_no_callback_is_refused(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        make().fit(tmp_path / "run", callbacks=given)
    assert not (tmp_path / "run").exists()
