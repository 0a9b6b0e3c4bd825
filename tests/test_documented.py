# SPDX-License-Identifier: Apache-2.0
"""Field docstrings of configurations appear in ``help()``."""

from __future__ import annotations

import ast
import functools
import itertools
import pydoc
from dataclasses import dataclass
from pathlib import Path

import pytest

import fastdistill
from fastdistill import runs
from fastdistill.commands.doctor import DoctorConfig
from fastdistill.documented import documented
from fastdistill.profile import ProfileConfig, ReplayConfig
from fastdistill.tasks.digits.config import DigitsConfig
from fastdistill.tasks.digits.sampling import Sampling
from fastdistill.tasks.digits.teacher import TeacherConfig
from fastdistill.tasks.guidance.demo_config import DemoConfig
from fastdistill.train import TrainConfig

CONFIGS = [
    *(DemoConfig, DigitsConfig, DoctorConfig, ProfileConfig, ReplayConfig, Sampling, TeacherConfig, TrainConfig),
    *(getattr(runs, name) for name in runs.__all__ if name.endswith(("Config", "Settings"))),
]


@documented
@dataclass
class Example:
    """What it is.

    More of it.
    """

    a: int = 1
    """First
    field."""
    b: int = 2
    c: int = 3
    """Third field: of three."""

    def method(self) -> None:
        """No field."""


@documented
@dataclass
class Heir(Example):
    """Another."""

    c: int = 4
    """Another third."""
    d: int = 5
    """Fourth."""


def test_fields_follow_the_docstring() -> None:
    wanted = "What it is.\n\nMore of it.\n\nAttributes:\n    a: First field.\n    c: Third field: of three."
    assert Example.__doc__ == wanted
    wanted = "Another.\n\nAttributes:\n    a: First field.\n    c: Another third.\n    d: Fourth."
    assert Heir.__doc__ == wanted


def test_a_class_without_source_or_fields_stays_as_it_is() -> None:
    names: dict[str, type] = {}
    exec("class Made:\n    '''Doc.'''\n    a: int = 1\n    '''Field.'''", names)
    assert documented(names["Made"]).__doc__ == "Doc."
    plain = type("Plain", (), {"__doc__": "Doc."})
    assert documented(plain).__doc__ == "Doc." and documented(int).__doc__ == int.__doc__


@pytest.mark.parametrize("kind", CONFIGS)
def test_help_of_a_configuration_has_its_fields(kind: type) -> None:
    shown = pydoc.plain(pydoc.render_doc(kind))
    own = classes().get(f"{kind.__module__}.{kind.__name__}", ([], {}))  # None for a class without its own fields
    for name, text in own[1].items():
        assert f"{name}: {text}" in shown


def test_every_class_with_field_docstrings_is_documented() -> None:
    assert [name for name, (decorators, _) in classes().items() if "documented" not in decorators] == []


@functools.cache
def classes() -> dict[str, tuple[list[str], dict[str, str]]]:
    """Classes of the package with field docstrings: name -> decorators, and field -> docstring."""
    found: dict[str, tuple[list[str], dict[str, str]]] = {}
    root = Path(fastdistill.__file__).parent
    for file in root.rglob("*.py"):
        parts = (root.name, *file.relative_to(root).with_suffix("").parts)
        module = ".".join(parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                pairs = [(a, b.value) for a, b in itertools.pairwise(node.body) if isinstance(b, ast.Expr)]
                fields = {
                    ast.unparse(field.target): value.value
                    for field, value in pairs
                    if isinstance(field, ast.AnnAssign) and isinstance(value, ast.Constant)
                }
                if fields:
                    found[f"{module}.{node.name}"] = [ast.unparse(d) for d in node.decorator_list], fields
    return found
