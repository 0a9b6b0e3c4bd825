# SPDX-License-Identifier: Apache-2.0
"""The targets of fuzzing, and the minimum number of calls for each."""

from __future__ import annotations

import functools
import importlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st

GIB = 2**30


@dataclass(frozen=True)
class Target:
    """``function`` in ``module``: for ops a function that draws a call (``calls.py``), else one that returns (strategy,
    check)."""

    name: str
    wanted: int  # minimum number of calls, over all kernels
    module: str
    function: str
    examples: int = 100  # per round
    memory: int = 2 * GIB  # additional memory that a child may use after its imports

    @property
    def group(self) -> str:
        return self.name.partition(".")[0]

    def prepare(self) -> None:
        """Import everything before the memory is limited."""
        self._parts()

    def strategy(self) -> st.SearchStrategy[Any]:
        return self._parts()[0]

    def check(self, example: Any, counts: Counter[str]) -> None:
        self._parts()[1](example, counts)

    @functools.cache  # noqa: B019  the targets live as long as the process
    def _parts(self) -> tuple[st.SearchStrategy[Any], Callable[[Any, Counter[str]], None]]:
        function = getattr(importlib.import_module(f"tests.fuzz.{self.module}"), self.function)
        if self.group in ("others", "planted"):
            return function()
        calls = importlib.import_module("tests.fuzz.emulated" if self.group == "emulated" else "tests.fuzz.calls")
        return calls.calls(function), calls.check


#: By op: its module, the function that draws its arguments, how many calls of reference and C++, and of kernels for a
#: GPU. (The draw's reference makes random numbers in integers of torch, some milliseconds a call.)
OPS = {
    "geglu": ("norms", "geglu_call", 230_000, 1_300),
    "group_norm_silu": ("norms", "group_norm_call", 120_000, 1_300),
    "layer_norm_modulate": ("norms", "layer_norm_call", 170_000, 1_300),
    "residual_layer_norm_modulate": ("norms", "residual_call", 100_000, 1_300),
    "feature_match": ("losses", "feature_match_call", 120_000, 1_300),
    "output_match": ("losses", "output_match_call", 25_000, 1_000),
    "grad_square_sum": ("updates", "square_sum_call", 170_000, 1_000),
    "adamw_ema": ("updates", "adamw_call", 20_000, 800),
    "cross_attention": ("attentions", "cross_attention_call", 40_000, 700),
    "attention": ("attentions", "attention_call", 10_000, 0),
    "noise_gather": ("draws", "noise_gather_call", 4_000, 600),
    "quantize_rows": ("rows", "quantize_rows_call", 100_000, 1_300),
}
OTHERS = {
    "configurations": ("configurations", "mappings", 20_000),
    "yaml": ("configurations", "texts", 16_000),
    "manifests": ("stored", "manifests", 12_000),
    "shards": ("stored", "shards", 12_000),
    "checkpoints": ("stored", "checkpoints", 10_000),
    "kept calls": ("stored", "kept_calls", 10_000),
    "prompt files": ("prompts", "texts", 12_000),
    "tables": ("prompts", "tables", 12_000),
}
TARGETS = [
    *(Target(f"ops.{op}", wanted, module, function) for op, (module, function, wanted, _) in OPS.items()),
    *(
        Target(f"emulated.{op}", wanted, module, function, examples=20)
        for op, (module, function, _, wanted) in OPS.items()
        if wanted
    ),
    *(Target(f"others.{name}", wanted, m, f, 200, GIB) for name, (m, f, wanted) in OTHERS.items()),
]


#: Faults, each in its third example: what the parent has to find.
PLANTED = [
    Target(f"planted.{name}", 1, "planted", name, 10, GIB // 4) for name in ("crash", "hang", "memory", "unclear")
]


def named(name: str) -> Target:
    """The target of this name."""
    found = [target for target in (*TARGETS, *PLANTED) if target.name == name]
    if not found:
        raise SystemExit(f"tests.fuzz: no target {name!r}; there are {', '.join(t.name for t in TARGETS)}")
    return found[0]


def calls_of(counts: Counter[str], target: Target) -> int:
    """How many of the counted outcomes count for the target: calls that were accepted or refused; of emulated kernels
    those that ran."""
    total = 0
    for outcome, count in counts.items():
        *_, kernel, kind = outcome.rsplit(" ", 2)
        if target.group == "emulated":
            total += count * (kernel in ("triton", "cuda") and kind == "accepted")
        else:
            total += count * (kind in ("accepted", "refused"))
    return total
