# SPDX-License-Identifier: Apache-2.0
"""Everything that the README and the pages name exists; ``tests/pages`` executes their code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastdistill

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_what_it_links_to_is_there() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(((?!https?:)[^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)


@pytest.mark.parametrize("target", re.findall(r"`?make ([a-z-]+)", README))
def test_make_targets_exist(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_its_figures_are_the_committed_measurements() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import tables
    finally:
        sys.path.pop(0)
    made = tables.pages()
    assert [file for file, text in made.items() if tables._read(file) != text] == [], "run python docs/tables.py"
    assert "| random conditioning |" in README and "Not measured on a GPU: " in README
    assert all("\n<!-- /" in text or file == tables.FULL for file, text in made.items())


def test_the_table_of_canonical_latents_has_four_students() -> None:
    from tests.evaluate.test_context_report import made_up

    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import tables
    finally:
        sys.path.pop(0)
    report = made_up()
    lines = tables.context(report).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:6]] == [f"| {name}" for name in tables.CONTEXT.values()]
    assert lines[5].startswith("| CaDistill | 98.0 ± 0.6 | 92.0 ± 0.6 | 82.0 ± 0.6 | 34.0 ± 0.6 |")
    assert (
        lines[7].startswith("5 seeds (mean ± standard deviation), 360 held-out images") and "at most 0.1 " in lines[7]
    )
    report["masking"]["plain"]["failed"] = ["seed 0: the loss falls"]
    assert "| gradients are masked |" in tables.context(report)


def test_the_public_names_are_there() -> None:
    assert all(getattr(fastdistill, name) is not None for name in fastdistill.__all__)
    differentiable = {"attention", "cross_attention", "feature_match", "geglu", "group_norm_silu", "output_match"}
    assert differentiable <= set(fastdistill.__all__)


def test_the_loop_of_ones_own_runs_on_public_names() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "loop.md").read_text(encoding="utf-8"), re.DOTALL)
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom | ast.Import)]
    ours = [node for node in imports if isinstance(node, ast.ImportFrom) and node.module == "fastdistill"]
    assert {name.name for node in ours for name in node.names} <= set(fastdistill.__all__)
    assert "fastdistill" not in "".join(ast.unparse(node) for node in imports if node not in ours)
