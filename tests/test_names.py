# SPDX-License-Identifier: Apache-2.0
"""The names of the package: available after ``import fastdistill``, and loaded at first use."""

from __future__ import annotations

import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import fastdistill

MODULES = sorted(p.parent.name for p in Path(fastdistill.__file__).parent.glob("*/__init__.py"))


def test_every_public_name_is_there() -> None:
    pytest.importorskip("diffusers")
    assert {*fastdistill.__all__, *MODULES, "errors", "__doc__", "__path__"} <= set(dir(fastdistill))
    for name in fastdistill.__all__:
        assert getattr(fastdistill, name) is not None


@pytest.mark.parametrize("name", [*MODULES, "errors"])
def test_a_module_is_an_attribute(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.delattr(fastdistill, name, raising=False)  # as in a process that has not used it
    module = getattr(fastdistill, name)
    assert module is sys.modules[f"fastdistill.{name}"]
    assert f"fastdistill.{name} - " in pydoc.plain(pydoc.render_doc(module))


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'fastdistill' has no attribute 'op'"):
        fastdistill.op  # noqa: B018


def test_the_import_loads_nothing_heavy() -> None:
    code = "import sys, fastdistill; dir(fastdistill); print(*{'torch', 'numpy', 'diffusers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
