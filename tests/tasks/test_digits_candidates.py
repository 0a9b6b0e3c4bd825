# SPDX-License-Identifier: Apache-2.0
"""The script that measures options for unseen prompts on the digits, and the page with its results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("candidates", ROOT / "docs" / "digits" / "candidates.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_candidate_is_a_run_file(script: Any, tmp_path: Path) -> None:
    files = {name: script.run_file(name, 1, tmp_path)[1] for name in script.CANDIDATES}
    plain = files["random conditioning"]
    assert plain.seed == 1 and plain.objective.random_conditioning.rolling.every is None
    assert all(own.objective != plain.objective or own.train != plain.train for own in list(files.values())[1:])
    assert len({own.directory for own in files.values()}) == len(files)


def test_the_page_has_the_figures(script: Any) -> None:
    report = json.loads(script.FIGURES.read_text(encoding="utf-8"))
    rows = {
        script.label(name, device): options for name, options in script.CANDIDATES.items() for device in ("cpu", "cuda")
    }
    assert list(report) == [row for row in rows if row in report]
    assert all(one["options"] == rows[row] for row, one in report.items())
    assert script.table(report) in script.PAGE.read_text(encoding="utf-8")
