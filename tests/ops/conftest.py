# SPDX-License-Identifier: Apache-2.0
"""Fixtures for tests of ``attention``: an empty cache for each test, and a record of the measurements."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

module = importlib.import_module("fastdistill.ops.attention")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FASTDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(module.VARIABLE, raising=False)
    yield tmp_path / "cache" / "attention.json"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The measurements that were made: (shape, backward, candidates)."""
    made: list[tuple[Any, ...]] = []
    measure = module.measure

    def counted(q: Tensor, k: Tensor, v: Tensor, scale: float, backward: bool, names: list[str]) -> dict[str, Any]:
        made.append((tuple(q.shape), backward, names))
        result: dict[str, Any] = measure(q, k, v, scale, backward, names)
        return result

    monkeypatch.setattr(module, "measure", counted)
    return made
