# SPDX-License-Identifier: Apache-2.0
"""YAML texts: read with the numbers of YAML 1.2 and within limits, written so that they are read back."""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Reads numbers like YAML 1.2. (PyYAML follows YAML 1.1, in which 1e-4 is a string, 010 is 8, and 1:30 is 90.)
    Names of fields are always strings, also ``null`` and ``on``, which YAML would convert. A field that occurs twice is
    an error (PyYAML would use the last one)."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        names = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
                if key.value in names:
                    raise yaml.composer.ComposerError(None, None, f"{key.value} is there a second time", key.start_mark)
                names.add(key.value)
        return node


_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$",
    "tag:yaml.org,2002:float": r"[-+]?(([\d_]+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf)$|\.nan$",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag not in _NUMBERS]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _rule in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_rule, re.IGNORECASE), list("-+.0123456789"))


class _Dumper(yaml.SafeDumper):
    """Quotes a text that PyYAML or ``_Loader`` would read as a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *rules]
    for first, rules in ({**yaml.SafeDumper.yaml_implicit_resolvers, **_Loader.yaml_implicit_resolvers}).items()
}
_MOST_VALUES = 10**5


def parsed(text: str) -> Any:
    """The values of a YAML text. ValueError if there are too many (aliases can turn a few lines into millions) or a
    value contains itself."""
    values = yaml.load(text, _Loader)
    if _count(values, {}) > _MOST_VALUES:
        raise ValueError(f"more than {_MOST_VALUES} values, those of aliases counted")
    return values


def _count(value: Any, known: dict[int, int | None]) -> int:
    """The number of values in it; a value that occurs several times is counted each time."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = None
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(part, known) for part in parts)
    if (count := known[id(value)]) is None:
        raise ValueError("a value that is a part of itself")
    return count


def dumped(values: Any) -> str:
    """The text of values, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def told(error: yaml.YAMLError) -> str:
    """The problem and its position, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem} in line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    return " ".join(str(error).split())
