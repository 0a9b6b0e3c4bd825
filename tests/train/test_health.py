# SPDX-License-Identifier: Apache-2.0
"""What the metrics of a run say about its course."""

from __future__ import annotations

from typing import Any

import pytest

from fastdistill.train.health import concerns


def lines(**last: float) -> list[dict[str, Any]]:
    """Six quiet lines, a hundred steps each, and a last one."""
    quiet = {"loss": 1.0, "output": 0.5, "feature/mid_block": 0.2, "gradient_norm": 1.0, "skipped": 2, "seconds": 1.0}
    found: list[dict[str, Any]] = [{"step": 100 * i} | quiet for i in range(1, 7)]
    return [*found, {"step": 700} | quiet | last]


def test_a_quiet_run_is_of_no_concern() -> None:
    assert concerns(lines()) == {} and concerns(lines()[:2]) == {} and concerns([]) == {}
    assert concerns(lines(loss=9.0, gradient_norm=50.0, skipped=12)) == {}  # a norm says nothing of a term


@pytest.mark.parametrize("name", ["loss", "output", "feature/mid_block"])
def test_a_term_that_grows_is_named(name: str) -> None:
    usual = lines()[-1][name]
    found = concerns(lines(**{name: 12 * usual}))
    assert found == {name: f"{name} is {12 * usual:.3g}, 12 times its median of {usual:.3g}"}


def test_skipped_updates_are_told() -> None:
    found = concerns(lines(skipped=32))
    assert found == {"skipped": "30 of 100 updates were skipped, as their gradients were not finite"}
