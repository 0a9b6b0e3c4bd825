# SPDX-License-Identifier: Apache-2.0
"""The commands of ``fastdistill``, one file each; a new command needs only its file.

``demo_digits.py`` is ``fastdistill demo digits``. The first line of its docstring is its help, and its
``run(arguments)`` does the work. Files are read for the list of commands, not imported, so that help is fast.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

_RUN = ("init", "plan", "cache", "distill", "evaluate", "sample", "export")  # in the order of a run


def listed() -> dict[str, str]:
    """The help of each command by its name: those of a run first, in its order."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("[!_]*.py")):
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        found[file.stem.replace("_", " ")] = text.split("\n")[0].rstrip(".")
    return {name: found.pop(name) for name in _RUN if name in found} | found


def find(arguments: Sequence[str]) -> tuple[str, list[str]] | None:
    """The command that these arguments begin with, and the rest of them; None for no command."""
    for length in (2, 1):
        name = " ".join(arguments[:length])
        if len(arguments) >= length and name in listed():
            return name, list(arguments[length:])
    return None


def module(name: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f"{__name__}.{name.replace(' ', '_')}")
