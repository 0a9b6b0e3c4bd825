# SPDX-License-Identifier: Apache-2.0
"""Problems that the metrics of a run show."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdistill.train.health import concerns
from tests import tiny


def lines(**last: float) -> list[dict[str, Any]]:
    """Six normal lines, a hundred steps each, and a last one with these values."""
    quiet = {"loss": 1.0, "output": 0.5, "feature/mid_block": 0.2, "gradient_norm": 1.0, "skipped": 2, "seconds": 1.0}
    found: list[dict[str, Any]] = [{"step": 100 * i} | quiet for i in range(1, 7)]
    return [*found, {"step": 700} | quiet | last]


def test_a_quiet_run_is_of_no_concern() -> None:
    assert concerns(lines()) == {} and concerns(lines()[:2]) == {} and concerns([]) == {}
    assert concerns(lines(loss=9.0, gradient_norm=50.0, skipped=12)) == {}  # the norm is not a term of the loss


@pytest.mark.parametrize("name", ["loss", "output", "feature/mid_block"])
def test_a_term_that_grows_is_named(name: str) -> None:
    usual = lines()[-1][name]
    found = concerns(lines(**{name: 12 * usual}))
    assert found == {name: f"{name} is {12 * usual:.3g}, 12 times its median of {usual:.3g}"}


def test_skipped_updates_are_told() -> None:
    found = concerns(lines(skipped=32))
    assert found == {"skipped": "30 of 100 updates were skipped, as their gradients were not finite"}


def test_a_feature_that_collapses_is_named() -> None:
    """Compared with its earlier spread, with the teacher's spread if that is larger, or if it never had a spread."""
    spread = "spread/mid_block"
    quiet = [line | {spread: 0.5} for line in lines()]
    assert concerns([*quiet, quiet[-1] | {spread: 0.002}]) == {}
    found = concerns([*quiet, quiet[-1] | {spread: 4e-4}])
    text = "between samples it differs by 0.0004 of the teacher's, at most 0.5 before"
    assert found == {spread: f"the student's feature at mid_block has collapsed: {text}"}
    wide = [line | {spread: 400.0} for line in lines()]
    assert concerns([*wide, wide[-1] | {spread: 0.002}]) == {} and concerns([*wide, wide[-1] | {spread: 9e-4}])
    small = [line | {spread: 1e-4} for line in lines()]  # before an adapter, any scale is normal
    assert concerns(small) == {} and concerns([*small, small[-1] | {spread: 0.9e-7}])
    assert spread in concerns([line | {spread: 0.0} for line in lines()])
    slow = [line | {spread: 0.99**i} for i, line in enumerate(lines() * 200)]
    assert spread in concerns(slow)  # compared with its first lines, not only with the previous ones


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_a_planted_collapse_is_told_once(micro_batch: int | None) -> None:
    """The input of the tap becomes constant. The losses that include this tap are those of a normal run."""
    run = tiny.trainer(steps=9, lr=1e-6, micro_batch=micro_batch)

    def plant(done: int, _: object) -> None:
        if done == 6:
            with torch.no_grad():
                for layer in (run.student.first, run.student.time, run.student.prompt):
                    layer.weight.zero_()
                    layer.bias.fill_(0.3)

    with pytest.warns(UserWarning, match="^step 7: the student's feature at mid has collapsed: between sam") as told:
        history = run.fit(progress=plant).history
    assert [str(w.message) for w in told if "collapsed" in str(w.message)] == [str(told[0].message)]
    assert all(line["spread/mid"] > 1e-2 for line in history[:6]) and history[6]["spread/mid"] < 1e-6


def test_a_quiet_run_tells_nothing(recwarn: pytest.WarningsRecorder) -> None:
    tiny.trainer(steps=9).fit()
    assert not recwarn.list


def test_a_teacher_whose_feature_is_constant() -> None:
    """The teacher's feature is constant, so a constant feature is no collapse, and the metrics are finite."""
    teacher = tiny.Net()
    with torch.no_grad():
        teacher.mid.weight.zero_()
    assert [line["spread/mid"] for line in tiny.trainer(teacher).fit().history] == [1e6, 1e6]
    student = tiny.Net(seed=1)
    with torch.no_grad():
        student.mid.weight.zero_()
    assert tiny.trainer(teacher, student, lr=1e-30).fit().history[0]["spread/mid"] == 1
