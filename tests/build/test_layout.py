# SPDX-License-Identifier: Apache-2.0
"""The rule of the repository: an op's name is its path everywhere; kernels do not use torch; files stay short."""

from __future__ import annotations

import re
from pathlib import Path

from fastdistill.ops import OPS

ROOT = Path(__file__).parents[2]
CSRC = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
PYTHON = [p for part in ("fastdistill", "benchmarks", "tests") for p in (ROOT / part).rglob("*.py")]


def test_kernels_are_free_of_torch() -> None:
    assert len(CSRC) > 8
    for path in CSRC:
        assert not re.search(r'#include\s*[<"](torch|ATen|c10)/', path.read_text()), path


def test_an_op_has_one_name_everywhere() -> None:
    folders = {path.parent.name for path in (ROOT / "fastdistill" / "ops").glob("*/__init__.py")}
    compiled = {path.parent.name for path in (ROOT / "csrc").glob("*/math.h")}
    assert compiled == {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()}
    assert compiled <= folders
    for name in folders:
        assert name in OPS
        assert (ROOT / "fastdistill" / "ops" / name / "reference.py").exists()
        assert (ROOT / "tests" / "ops" / f"test_{name}.py").exists()
        assert (ROOT / "csrc" / name / "cpu.cpp").exists() == (ROOT / "fastdistill" / "ops" / name / "cpp.py").exists()
        assert f"``{name}``" in (ROOT / "fastdistill" / "ops" / "__init__.py").read_text()


def test_files_are_short_and_licensed() -> None:
    for path in [*CSRC, *PYTHON]:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 450, f"{path}: {len(lines)} lines"
        assert not lines or "SPDX-License-Identifier: Apache-2.0" in lines[0], path
