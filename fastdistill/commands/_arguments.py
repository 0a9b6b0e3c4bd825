# SPDX-License-Identifier: Apache-2.0
"""Parses a command line into dataclasses with tyro, which also prints the help; an error is one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
from typing import Any, get_args, get_type_hints

from fastdistill.errors import FastdistillError


def parsed(kinds: list[Any], arguments: list[str], name: str, *, own: Any = None, **options: Any) -> Any:
    """The result of ``tyro.cli`` for the arguments.

    Args:
        kinds: the dataclasses whose fields are options of this command; if two have the same option, the first gets it.
        name: the command's name in the usage line.
        own: the dataclass to parse, if there are several; the options of the others are returned too.
        options: further arguments of ``tyro.cli``.

    Raises:
        FastdistillError: an unknown option, or a value that is invalid for its field.
    """
    import tyro

    types: dict[str, Any] = {}
    for kind in reversed(kinds):
        types |= _options(kind)
    arguments = _checked(arguments, types, name)
    more: dict[str, Any] = {"return_unknown_args": True} if own else {}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(own or kinds[0], args=arguments, prog=name, **more, **options)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise FastdistillError(_line(said.getvalue(), arguments, types, name)) from None


def _options(kind: Any, prefix: str = "--") -> dict[str, Any]:
    """The options of a dataclass and of nested ones, with their types; without the ``--x.no-y`` of booleans."""
    found: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        option = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[field.name]):
            found |= _options(hints[field.name], f"{option}.")
        else:
            found[option] = hints[field.name]
    return found


def _checked(arguments: list[str], types: dict[str, Any], name: str) -> list[str]:
    """The arguments; YAML's ``null``, ``true`` and ``false`` become None, True and False if the field allows these."""
    names = {*types, *(_negated(option) for option, kind in types.items() if kind is bool), "--help"}
    result = []
    option = ""
    for argument in arguments:
        if argument.startswith("--"):
            option, equals, value = argument.partition("=")
            option = option.replace("_", "-")
            if option not in names:
                near = difflib.get_close_matches(option, names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"{name} --help lists them"
                raise FastdistillError(f"{option}: no such option ({hint})")
            result.append(f"{option}={_spelled(value, types.get(option))}" if equals else argument)
        elif (
            option
            and types.get(option, bool) is bool
            and argument.lower() in ("true", "false", "yes", "no", "on", "off")
        ):
            raise FastdistillError(_without_value(option, argument, types))
        else:
            result.append(_spelled(argument, types.get(option)) if option else argument)
    return result


def _negated(option: str) -> str:
    place, dot, last = option.rpartition(".")
    return f"{place}.no-{last}" if dot else f"--no-{last[2:]}"


def _without_value(option: str, value: str, types: dict[str, Any]) -> str:
    """The line for a switch with a value."""
    switch = option if option in types else option.replace(".no-", ".").replace("--no-", "--")
    return f"{option}: expected {switch} or {_negated(switch)} without a value, got {value}"


def _spelled(value: str, kind: Any) -> str:
    if value in ("null", "none", "~") and type(None) in get_args(kind):
        return "None"
    return value.title() if value in ("true", "false") and bool in get_args(kind) else value


def _line(text: str, arguments: list[str], types: dict[str, Any], name: str) -> str:
    """Reduces an error of tyro to one line. tyro prints a title, the message, the option's help and a hint, separated
    by lines of dashes, or in a box with the title in its upper edge, depending on the encoding."""
    text = re.sub(r"^╭─ (.+?) ─*╮$", r"\1\n─────────", text.strip(), flags=re.MULTILINE)
    text = re.sub(r"[│╭╮╰╯]", " ", text)
    parts = re.split(r"\n\W*(?:-{9,}|─{9,})\W*(?:\n|$)", text)
    message = " ".join((parts[1] if len(parts) > 1 else text).split())
    if found := re.match(r"Error parsing (--\S+):", message):
        option = found[1]
        kind = re.search(rf"{re.escape(option)} (.+)", "\n".join(parts[2:]))
        expected = kind[1].strip().replace("{None}|", "null or ") if kind else "another value"
        return f"{option}: expected {expected}, got {_given(option, arguments)}"
    if found := re.match(r"[Ii]nvalid choice .+ for argument '(--\S+)'", message):
        option = found[1].replace("_", "-")
        return f"{option}: expected one of {_choices(types[option])}, got {_given(option, arguments)}"
    if found := re.match(r"Missing value for argument '(--\S+)'\. Expected (\d+) value", message):
        return f"{found[1]}: expected {found[2]} value{'s' * (found[2] != '1')}, got {_given(found[1], arguments)}"
    if found := re.match(r"Unrecognized options: (.+)", message):
        for before, value in itertools.pairwise(arguments):
            option = before.replace("_", "-")
            if option.startswith("--") and types.get(option, bool) is bool and found[1].split()[0] == value:
                return _without_value(option, value, types)
        return f"{name.removeprefix('fastdistill ')}: expected options (--...), got {found[1]}"
    return f"{name.removeprefix('fastdistill ')}: {message}"


def _choices(kind: Any) -> str:
    """The values of a type that consists of literals and booleans, in their order."""
    switches = ["True", "False"] * (bool in get_args(kind))
    literals = switches + [value for value in get_args(kind) if isinstance(value, str)]
    literals += [value for inner in get_args(kind) for value in get_args(inner) if isinstance(value, str)]
    return ", ".join(literals + ["null"] * (type(None) in get_args(kind)))


def _given(option: str, arguments: list[str]) -> str:
    """The values after an option on the command line."""
    values: list[str] = []
    taking = False
    for argument in arguments:
        if argument.startswith("--"):
            here, equals, value = argument.partition("=")
            taking = here.replace("_", "-") == option
            values = ([value] if equals else []) if taking else values
        elif taking:
            values.append(argument)
    return " ".join(values) or "nothing"
