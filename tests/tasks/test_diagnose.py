# SPDX-License-Identifier: Apache-2.0
"""Diagnosis of the shipped teachers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from fastdistill.cli import main
from fastdistill.errors import InputError
from fastdistill.evaluate.frontier import Diagnosis, Recovered
from fastdistill.tasks.digits import data
from fastdistill.tasks.guidance import diagnose
from fastdistill.tasks.guidance.diagnose import CONFIGS, ShadesDiagnosis, finding, subject


@pytest.mark.parametrize("task", ["shades", pytest.param("digits", marks=pytest.mark.slow)])
def test_a_short_diagnosis(tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks its report, and that stored samples are used again."""
    kind = CONFIGS[task]
    schedules = ("0", "1", "cads:0.6..0.9,0.25,1:2@8,0")
    config = kind(schedules=schedules, grid="karras:3@30..0.09", seeds=1, images_per_prompt=1, draws=8, clip_sample=1.2)
    config = dataclasses.replace(config, output=str(tmp_path))
    shown: list[tuple[int, int]] = []
    found, report = diagnose.run(task, config, lambda *done: shown.append(done))
    assert shown[-1] == (240, 240) and [row.evaluations_per_image for row in found.rows] == [3, 6, 4]
    written = json.loads((tmp_path / "report.json").read_text())
    assert written == {"schema": 1} | json.loads(json.dumps(report))
    assert [row["schedule"] for row in written["models"][task]["rows"]] == list(schedules)
    assert {given["at"] for given in written["models"][task]["recovered"]} == {"separation", "accuracy"}
    assert (tmp_path / "report.html").stat().st_size > 10_000

    def never(*_: object, **__: object) -> torch.Tensor:
        raise AssertionError

    monkeypatch.setattr(diagnose, "sample", never)
    again = diagnose.run(task, config)[0]
    assert again.to_json() == found.to_json()


@pytest.mark.parametrize("task", CONFIGS)
def test_real_images_are_the_reference_of_themselves(task: str) -> None:
    known = subject(task, torch.nn.Linear(1, 1))
    images, classes = known.reference
    features = known.features(images[:500])
    assert features.dtype == torch.float64 and len(features) == 500 and features.isfinite().all()
    assert set(known.classes.tolist()) == set(classes.tolist())
    assert len(known.classes) == len(data.PROMPTS)


def test_quick_keeps_constants_and_windows() -> None:
    for kind in CONFIGS.values():
        quick = dataclasses.replace(kind(), quick=True).resolved()
        assert quick.schedules[:2] == ("0", "1") and sum("@" in text for text in quick.schedules) == 2
        assert quick.output == kind.output + "-quick" and quick.seeds == 1
    elsewhere = dataclasses.replace(ShadesDiagnosis(), quick=True, output="there").resolved()
    assert elsewhere.output == "there"


def test_the_finding_names_what_is_beyond_its_error() -> None:
    given = [
        Recovered("a", "separation", 0.5, (0.4, 0.6)),
        Recovered("b", "separation", 0.7, (-0.1, 1.0)),
        Recovered("a", "accuracy", 0.2, (-0.2, 0.6)),
    ]
    text = finding(Diagnosis([], given)).replace("\u202f", " ")
    assert "At equal separation, a gives back 50 % [40 %, 60 %]" in text
    assert "At equal accuracy, no window" in text


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["guidance", "diagnose", "shades", "--seeds", "2", "--dry-run"]) == 0
    assert "seeds: 2" in capsys.readouterr().out
    for arguments, message in (
        (("letters",), "guidance diagnose: expected digits or shades, got letters"),
        ((), "guidance diagnose: expected digits or shades, got nothing"),
        (("digits", "--schedules", "0", "2@9e9,-1"), "schedules: expected thresholds of sigma from 0 to below"),
        (("digits", "--schedules", "0", "2@x"), "schedules: expected a schedule such as"),
        (("digits", "--grid", "karas:30"), "grid"),
        (("digits", "--schedules", "1", "1.0"), "schedules: expected each once, got '1' twice"),
    ):
        extra = ("--output", str(tmp_path / "none")) if arguments[1:] else ()
        assert main(["guidance", "diagnose", *arguments, *extra]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_task_that_is_not_there() -> None:
    with pytest.raises(InputError, match="task: expected digits or shades, got 'letters'"):
        subject("letters", torch.nn.Linear(1, 1))
