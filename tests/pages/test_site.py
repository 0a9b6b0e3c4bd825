# SPDX-License-Identifier: Apache-2.0
"""What the site changes in docstrings and links before it shows them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_parameter_has_an_entry() -> None:
    pytest.importorskip("griffe")
    text = (
        "Attention.\n\nArgs:\n    q: [B, N]; of any\n        dtype. scale: of the scores. other: no parameter.\n"
        "    k, v: keys and values.\n    Other arguments are those of ``f``.\n\nReturns:\n    A tensor."
    )
    assert loaded("docstrings").separated(text, {"q", "k", "v", "scale"}).splitlines() == [
        "Attention.",
        "",
        "Args:",
        "    q: [B, N]; of any dtype.",
        "    scale: of the scores. other: no parameter.",
        "    k: keys and values.",
        "    v: keys and values.",
        "",
        "Other arguments are those of ``f``.",
        "",
        "Returns:",
        "    A tensor.",
    ]


def test_fields_in_the_text_of_a_class_are_attributes() -> None:
    pytest.importorskip("griffe")
    text = "A card.\n\nmemory: bytes. copy: bytes per\nsecond.\n\nAnd more: text."
    assert loaded("docstrings").separated(text, {"memory", "copy"}).splitlines() == [
        "A card.",
        "",
        "Attributes:",
        "    memory: bytes.",
        "    copy: bytes per second.",
        "",
        "",
        "And more: text.",
    ]


@pytest.mark.parametrize(
    ("page", "text", "shown"),
    [
        ("a.md", "[the report](../benchmarks/report.csv)", "the report (`benchmarks/report.csv`)"),
        ("a.md", "[benchmarks/results](../benchmarks/results).", "`benchmarks/results`."),
        ("a.md", "[CONTRIBUTING.md](../CONTRIBUTING.md#tolerances)", "`CONTRIBUTING.md`"),
        ("api/a.md", "[a page](../ops.md)", "[a page](../ops.md)"),
        ("api/a.md", "[code](../../csrc)", "code (`csrc`)"),
    ],
)
def test_links_out_of_the_site_become_paths(page: str, text: str, shown: str) -> None:
    found = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    assert loaded("links").on_page_markdown(text, found) == shown
