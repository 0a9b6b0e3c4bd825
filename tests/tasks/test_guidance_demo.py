# SPDX-License-Identifier: Apache-2.0
"""The small guidance experiment from the command line: its report, continuing it, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastdistill.cli import main
from fastdistill.diffusion.guidance import Guidance
from fastdistill.files import locked
from fastdistill.tasks.digits.text_encoder import prompt_bank
from fastdistill.tasks.guidance import worker
from fastdistill.tasks.guidance.demo_config import DemoConfig
from fastdistill.tasks.guidance.diagnose import DigitsDiagnosis
from fastdistill.tasks.guidance.report import band, student_row
from fastdistill.tasks.guidance.students import sampler, students, trained
from fastdistill.tasks.processes import Job, Processes
from fastdistill.tasks.shades import data
from fastdistill.tasks.shades.teacher import load_teacher
from fastdistill.train.config import from_mapping, from_yaml
from tests.processes import once

SMALL: dict[str, Any] = {
    "constants": [0, 1],
    "windows": ["4@8,-1@2,0"],
    "student": "4@8,-1@2,0",
    "scales": [0, 1],
    "grid": "karras:6@30..0.09",
    "images_per_prompt": 1,
    "cache_images": 80,
    "worlds": ["gaussian"],
    "quick": True,
    "train": {"steps": 2, "batch": 4, "warmup": 1, "checkpoint_every": 2, "log_every": 1},
}
PARTS = {"shades", "digits", "worlds", "scale-0", "window-0", "speed"}


def arguments(output: Path, changes: dict[str, Any]) -> list[str]:
    config = output.parent / f"{output.name}.yaml"
    config.write_text(yaml.safe_dump(SMALL | changes))
    return ["demo", "guidance", "--config", str(config), "--output", str(output)]


@contextlib.contextmanager
def in_this_process() -> Iterator[list[str]]:
    """Parts run in this process, which has imported everything; yields their names as they begin."""
    begun: list[str] = []

    def work(_: Processes, job: Job, *__: object) -> None:
        begun.append(job.directory.name)
        worker.run(job.directory / "job.json", lambda **fields: None)

    few = DigitsDiagnosis(schedules=("0", "1"), grid="trailing:4", images_per_prompt=1, seeds=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Processes, "run", work)
        patch.setattr(DemoConfig, "digits", lambda self: dataclasses.replace(few, seeds=self.seeds))
        yield begun


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""

    def make(output: Path) -> None:
        with in_this_process() as begun:
            assert main(arguments(output, {"workers": 1})) == 0
        assert set(begun) == PARTS

    return once(tmp_path_factory, "guidance/whole", make)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


def test_report(whole: Path) -> None:
    report = json.loads((whole / "report.json").read_text())
    assert [row["schedule"] for row in report["models"]["shades"]["rows"]] == ["0", "1", "4@8,-1@2,0"]
    assert {given["at"] for given in report["models"]["shades"]["recovered"]} == {"separation", "accuracy"}
    assert set(report["students"]) == {"scale_0", "scale_1", "window"}
    evaluations = {name: row["evaluations_per_image"] for name, row in report["students"].items()}
    steps = report["models"]["shades"]["rows"][0]["evaluations_per_image"]
    assert evaluations["window"] == evaluations["scale_1"] == steps
    assert report["worlds"]["gaussian"]["rows"] and report["seconds"]["total"] > 0
    (line,) = report["reproduce"]
    assert line.startswith("fastdistill demo guidance --quick ") and "--train.steps 2" in line
    assert (whole / "report.html").read_text().count("data:image/png;base64,") == 6


def test_the_command_of_a_report_gives_its_configuration(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = json.loads((whole / "report.json").read_text())["reproduce"]
    capsys.readouterr()
    assert main([*shlex.split(line)[1:], "--dry-run"]) == 0
    (tmp_path / "given.yaml").write_text(capsys.readouterr().out)
    (tmp_path / "wanted.yaml").write_text(yaml.safe_dump(SMALL))
    given, wanted = (from_yaml(DemoConfig, tmp_path / f"{name}.yaml").resolved() for name in ("given", "wanted"))
    assert given == wanted


def test_parts_that_are_there_are_not_done_again(copy: Path) -> None:
    (copy / "parts" / "shades" / "samples.safetensors").write_bytes(b"")
    seconds = json.loads((copy / "report.json").read_text())["seconds"]["total"]
    with in_this_process() as begun:
        assert main(arguments(copy, {"workers": 1})) == 0
    assert begun == ["shades"]
    assert json.loads((copy / "report.json").read_text())["seconds"]["total"] > seconds


@pytest.mark.slow
def test_further_seeds_and_students(copy: Path) -> None:
    with in_this_process() as begun:
        assert main(arguments(copy, {"workers": 1, "seeds": 2, "full": True})) == 0
    more = "window_noised", "cache_constant", "cache_window"
    names = {f"{name}-{seed}" for name in more for seed in (0, 1)}
    assert set(begun) == {"shades", "digits", "scale-1", "window-1", "speed"} | names
    students = json.loads((copy / "report.json").read_text())["students"]
    assert students["window"]["seeds"] == 2 and students["window"]["right_std"] >= 0
    assert students["cache_window"]["evaluations_per_image"] > students["window"]["evaluations_per_image"]


def test_a_part_depends_on_its_own_settings() -> None:
    config = from_mapping(DemoConfig, SMALL).resolved()
    parts = ("shades", "digits", "worlds", "speed", "scale", "window")

    def changed(**settings: Any) -> set[str]:
        other = dataclasses.replace(config, **settings)
        return {part for part in parts if len({worker.fingerprint(c, part, 0, {}) for c in (config, other)}) == 2}

    assert changed(output="elsewhere", workers=1, threads=2) == set()
    assert changed(train=dataclasses.replace(config.train, lr=2e-3)) == {"scale", "window"}
    assert changed(constants=(0.0, 2.0)) == {"shades", "speed"}
    assert changed(scales=(0.0, 2.0)) == {"speed", "scale"}
    assert changed(worlds=("two_class",)) == {"worlds"}
    assert changed(seeds=2) == {"shades", "digits"}
    assert changed(images_per_prompt=2) == {"shades", "digits", "scale", "window"}


def report(told: list[dict[str, Any]], **fields: Any) -> None:
    told.append(fields)


@pytest.mark.slow
def test_a_student_of_each_kind_learns(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL | {"full": True, "output": str(tmp_path)}))
    config = from_yaml(DemoConfig, tmp_path / "small.yaml").resolved()
    teacher, bank = load_teacher(), prompt_bank()
    for name, student in students(dataclasses.replace(config, device="cpu")).items():
        told: list[dict[str, Any]] = []
        model, fitted = trained(config, name, 0, teacher, bank, tmp_path / name, functools.partial(report, told))
        assert fitted.steps == (6 if student.conditioned else 2)
        assert {fields["phase"] for fields in told} == {"cache", "training"}
        whole = sum(p.numel() for p in teacher.parameters())
        own = sum(p.numel() for p in model.parameters())
        assert own < whole if student.conditioned else own == whole + 256 * 32 * bool(student.scales)
        make = sampler(config, student, model, bank, 1.0)
        images = make(Guidance.parse(config.student), torch.tensor([0, 7]), torch.tensor([3, 4]), 1)
        assert images.shape == (2, 3, 8, 8) and images.isfinite().all()
    assert len(list((tmp_path / "cache").iterdir())) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"constants": [1, 2]}, "constants: expected weights among which is 0, got (1.0, 2.0)"),
        ({"windows": ["8@90,-1"]}, "windows: expected thresholds of sigma from 0 to below"),
        ({"student": "8@"}, "student: expected"),
        ({"grid": "karras:3@9..0.09"}, "windows: expected stretches in each of which a step of the grid starts"),
        ({"scales": [1]}, "scales: "),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert main(arguments(tmp_path / "run", changes)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_two_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"):
        assert main(arguments(tmp_path / "run", {})) == 2
    assert "another process is writing here" in capsys.readouterr().err


def test_the_band_has_four_fifths_of_the_loss() -> None:
    c = (data.SPREAD * data.norm()) ** 2
    u = c + data.norm() ** 2
    low, high = band()
    lost = [math.log((u + sigma**2) / (c + sigma**2)) for sigma in (0.0, low, high)]
    assert (lost[1] - lost[2]) / lost[0] == pytest.approx(0.8)


def test_a_row_of_several_seeds() -> None:
    first = {"schedule": "1", "seeds": 1, "images": 80, "right": 0.5, "separation": 1.0, "variance_ratio": 0.5}
    second = first | {"right": 1.0, "right_interval": [0.9, 1.0]}
    row = student_row([first, second])
    assert row["right"] == 0.75 and row["right_std"] == pytest.approx(0.5**0.5 / 2)
    assert row["seeds"] == 2 and row["images"] == 160 and row["separation_std"] == 0 and "right_interval" not in row
    assert student_row([second]) == second


def test_quick_keeps_what_is_given() -> None:
    short = DemoConfig(quick=True, grid="karras:8@20..0.1").resolved()
    assert short.grid == "karras:8@20..0.1" and short.output == "runs/guidance-quick" and len(short.constants) == 2
