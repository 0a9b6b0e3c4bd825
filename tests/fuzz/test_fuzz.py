# SPDX-License-Identifier: Apache-2.0
"""Short forms of ``make fuzz``: a few examples for every target, and planted faults that the parent must detect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fuzz.__main__ import State, sit
from tests.fuzz.evidence import FOLDER, text
from tests.fuzz.rounds import run
from tests.fuzz.targets import PLANTED, TARGETS, calls_of, named

EMULATED = ("emulated.geglu", "emulated.feature_match", "emulated.adamw_ema")


@pytest.mark.parametrize("name", [t.name for t in TARGETS if t.group != "emulated" or t.name in EMULATED])
def test_a_few_examples(name: str) -> None:
    target = named(name)
    few = {"ops": 6, "emulated": 3}.get(target.group, 25)
    counts, fault = run(target, 1, 0, few)
    assert fault is None, fault
    assert calls_of(counts, target) > 0


def test_a_round_is_the_same_wherever_it_runs() -> None:
    target = named("ops.grad_square_sum")
    assert run(target, 1, 5, 5) == run(target, 1, 5, 5) != run(target, 1, 6, 5)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("crash", "a crash: status -11"),
        ("hang", "a hang: no round"),
        ("memory", "MemoryError"),
        ("unclear", "KeyError"),
    ],
)
def test_faults_are_found_and_told_how_to_repeat(
    name: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, target = State(tmp_path / "state.json", 0), named(f"planted.{name}")
    state.begin()
    sit(state, target, 1.0 if name != "hang" else 60.0, patience=60.0 if name != "hang" else 4.0)
    assert target in PLANTED
    fault, *_ = State(tmp_path / "state.json", 0).value["faults"]
    assert words in fault["fault"] and fault["round"] == 0
    assert f"--replay '{target.name}' 0" in capsys.readouterr().out
    assert state.of(target)["next"] >= 1  # a fault does not stop the other rounds


def test_the_evidence_is_what_was_counted() -> None:
    state = json.loads((FOLDER / "fuzz.json").read_text(encoding="utf-8"))
    assert (FOLDER / "fuzz.md").read_text(encoding="utf-8") == "\n".join(text(state, state["versions"])) + "\n"
