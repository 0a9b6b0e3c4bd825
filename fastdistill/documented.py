# SPDX-License-Identifier: Apache-2.0
"""Field docstrings of a dataclass in ``help()``: Python itself drops a string that follows a field."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from typing import TypeVar

Class = TypeVar("Class", bound=type)


def documented(cls: Class) -> Class:
    """Class decorator: appends the docstrings of the fields, inherited ones first, to the class docstring as a section
    ``Attributes``.

    The command line uses the same strings as help for its options. If the source cannot be read (a frozen application,
    an interactive session), the class is not changed.
    """
    if texts := field_texts(cls):
        lines = [f"    {name}: {text}" for name, text in texts.items()]
        cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Attributes:", *lines])
    return cls


def field_texts(cls: type) -> dict[str, str]:
    """The docstrings of a class's fields by name, inherited ones first."""
    texts: dict[str, str] = {}
    for owner in reversed(cls.__mro__[:-1]):
        texts |= _own_texts(owner)
    return texts


def _own_texts(cls: type) -> dict[str, str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return {}
    found = {}
    for statement, following in itertools.pairwise(getattr(tree.body[0], "body", [])):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    return found
