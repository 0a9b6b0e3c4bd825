# SPDX-License-Identifier: Apache-2.0
"""Run files and settings: valid ones are written and read back unchanged, invalid ones are refused field by field."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from typing import Any, get_type_hints

import hypothesis.strategies as st
import yaml

from fastdistill.runs.config import RunConfig
from fastdistill.train.config import TrainConfig, from_mapping, from_yaml, to_yaml, validated
from tests.fuzz.calls import Fault
from tests.fuzz.damage import BYTES, VALUES, damaged, read
from tests.fuzz.stored import Parts, folder

KINDS = (RunConfig, TrainConfig)


@functools.cache
def fields(kind: type) -> st.SearchStrategy[dict[str, Any]]:
    """Some fields of a configuration, also nested, with their own values, other values of their types, or any
    values."""
    hints = get_type_hints(kind)
    choices: list[st.SearchStrategy[tuple[str, Any]]] = []
    for field in dataclasses.fields(kind):
        value = getattr(kind(), field.name)
        hint = hints[field.name]
        own = (
            fields(hint) if dataclasses.is_dataclass(hint) else st.just(list(value) if type(value) is tuple else value)
        )
        near = st.sampled_from((True, 1, 0, -1, 2.0, 0.5, "1", "1e-3", "auto", 10**9, [], ["a"], [1, 2], {}, None))
        choices.append(st.tuples(st.just(field.name), st.one_of(own, near, VALUES)))
    unknown = st.tuples(st.text(max_size=6), VALUES)
    return st.lists(st.one_of(*choices, unknown), max_size=5).map(dict)


def mappings() -> Parts:
    """Nested mappings of random types."""
    drawn = st.sampled_from(KINDS).flatmap(lambda kind: st.tuples(st.just(kind), fields(kind)))

    def check(example: Any, counts: Counter[str]) -> None:
        kind, values = example
        made = read("mapping", lambda: from_mapping(kind, values), counts, f"{kind.__name__} {values}")
        if made is not None:
            _kept(kind, made)

    return drawn, check


def _kept(kind: Any, made: Any) -> None:
    """A valid configuration passes its own check and is read back as written."""
    validated(made)
    path = folder() / "kept.yaml"
    try:
        path.write_text(to_yaml(made), encoding="utf-8")
    except UnicodeEncodeError:
        return
    if (again := from_yaml(kind, path)) != made:
        raise Fault(f"{kind.__name__}: {made} is read back as {again}")


PIECES = st.sampled_from((
    "a: 1\n", "train:\n", "  steps: 3\n", "  steps: 1e3\n", "- x\n", "? [a]\n", ": b\n", "&a ", "*a", "<<: *a\n",
    "!!python/object:os.system", "!!binary aGk=", "!!timestamp 2020-13-45", "2020-01-01", "0x1F", ".inf", "-.nan",
    "1_000", "0o7", "1:30", "{", "}", "[", "]", ",", '"', "'", "|\n", ">\n", "#", "%YAML 1.1\n",
    "---\n", "...\n", "\t", "\r\n",
    "\ufeff", "\0", "é", "\U0001f600", "lr: ", "seed: ", "prompts: ", "cache: ", "student: ", "null", "~", "yes",
    "on", "9" * 30, "1e400", "\x85", "\u2028",
))  # fmt: skip


def texts() -> Parts:
    """YAML texts: written from random values, with changed bytes, or composed of YAML syntax."""
    some = st.lists(st.one_of(PIECES, st.text(max_size=3)), max_size=12).map("".join)
    drawn = st.tuples(st.sampled_from(KINDS), st.one_of(some, fields(RunConfig)), st.none() | BYTES)

    def check(example: Any, counts: Counter[str]) -> None:
        kind, content, change = example
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        data = text.encode("utf-8", "surrogatepass")
        path = folder() / "run.yaml"
        path.write_bytes(data if change is None else damaged(data, change))
        made = read("yaml", lambda: from_yaml(kind, path), counts, f"{example}")
        if made is not None:
            _kept(kind, made)

    return drawn, check
