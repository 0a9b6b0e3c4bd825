# SPDX-License-Identifier: Apache-2.0
"""The context experiment from the command line: its jobs, its report, continuing it, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from fastdistill.cli import main
from fastdistill.distill.canonical import Clarid
from fastdistill.files import locked
from fastdistill.tasks.context import demo, worker
from fastdistill.tasks.context.demo_config import DemoConfig
from fastdistill.tasks.context.report import masking, student
from fastdistill.tasks.context.students import KINDS, needed
from fastdistill.tasks.processes import Job, Processes
from fastdistill.train.config import from_yaml
from tests.processes import shared

SMALL: dict[str, Any] = {
    "t_e": [650],
    "k": [2],
    "taps": ["down_blocks.1"],
    "images": 30,
    "share": 0.02,
    "shares": [0.01, 0.02],
    "kinds": ["plain", "cadistill"],
    "steps": 2,
    "queries": 5,
    "square_images": 10,
    "student": {"train": {"steps": 4, "batch": 16, "warmup": 1, "checkpoint_every": 4, "log_every": 2}},
}
PARTS = {"sweep-650", "plain-0", "sets-canonical-0.02", "other", "cadistill-0", "cadistill-at-0.01-0"}
SETTING = Clarid(650, 40, "up_blocks.0")


def arguments(output: Path, changes: dict[str, Any]) -> list[str]:
    config = output.parent / f"{output.name}.yaml"
    config.write_text(yaml.safe_dump(SMALL | changes))
    return ["demo", "context", "--config", str(config), "--output", str(output)]


@contextlib.contextmanager
def in_this_process() -> Iterator[list[str]]:
    """Parts run in this process, which has imported everything; yields their names as they begin."""
    begun: list[str] = []

    def work(_: Processes, job: Job, *__: object) -> None:
        begun.append(job.directory.name)
        worker.run(job.directory / "job.json", lambda **fields: None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Processes, "run", work)
        yield begun


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. The processes of a parallel test run share it, so tests change only copies."""
    place = shared(tmp_path_factory)
    output = place / "context" / "whole"
    output.parent.mkdir(exist_ok=True)
    with FileLock(place / "context.lock"):
        if not (output / "report.html").exists():
            with in_this_process() as begun:
                assert main(arguments(output, {"workers": 1})) == 0
            assert set(begun) == PARTS
    return output


@pytest.mark.slow
def test_report(whole: Path) -> None:
    report = json.loads((whole / "report.json").read_text())
    assert set(report["students"]) == {"plain", "cadistill"} and report["teacher"]["kind"] == "broad"
    assert [row["share"] for row in report["fraction"]] == [0.01, 0.02]
    assert len(report["sweep"]) == 1 and report["chosen"]["reason"] and report["other_teacher"]["kind"] == "same"
    assert report["fraction"][1]["independent"] == report["students"]["cadistill"]["independent"]
    assert "transfer" in report["masking"]["cadistill"] and "transfer" not in report["masking"]["plain"]
    (line,) = report["reproduce"]
    assert line.startswith("fastdistill demo context ") and "--student.train.steps 4" in line
    assert (whole / "report.html").read_text().count("data:image/png;base64,") == 12


@pytest.mark.slow
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


@pytest.mark.slow
def test_parts_that_are_there_are_not_done_again(whole: Path, tmp_path: Path) -> None:
    """If attacks change, only these are repeated; classifiers are not trained again."""
    copy = shutil.copytree(whole, tmp_path / "copy")
    (weights,) = (copy / "parts" / "plain-0").glob("training-*/student.safetensors")
    weights.unlink()
    seconds = json.loads((copy / "report.json").read_text())["seconds"]["total"]
    with in_this_process() as begun:
        assert main(arguments(copy, {"workers": 1})) == 0
    assert begun == ["plain-0"] and json.loads((copy / "report.json").read_text())["seconds"]["total"] > seconds
    with in_this_process() as begun:
        assert main(arguments(copy, {"workers": 1, "queries": 6})) == 0
    assert set(begun) == {"plain-0", "cadistill-0", "cadistill-at-0.01-0"}
    assert len(list(copy.glob("parts/*/training-*"))) == 3
    wider = {"student": SMALL["student"] | {"width": 24}}
    with in_this_process() as begun:
        assert main(arguments(copy, {"workers": 1, "queries": 6} | wider)) == 0
    assert set(begun) == {"plain-0", "cadistill-0", "cadistill-at-0.01-0"}


def _jobs(config: DemoConfig, output: Path) -> dict[str, Job]:
    free = [kind for kind in config.kinds if kind not in demo.SET]
    jobs = [*demo._sweeps(config, output), *demo._images(config, output, SETTING)]
    for kinds, setting in ((free, None), ([kind for kind in config.kinds if kind not in free], SETTING)):
        jobs += demo._classifiers(config, output, kinds, setting)
    return {job.directory.name: job for job in jobs}


def test_a_result_depends_on_its_own_settings_alone(tmp_path: Path) -> None:
    """Which jobs of the experiment must be repeated if a field changes."""
    config = dataclasses.replace(DemoConfig(), device="cpu", seeds=2)
    jobs = _jobs(config, tmp_path)
    assert {f"{kind.replace(' ', '-')}-{seed}" for kind in KINDS for seed in (0, 1)} < set(jobs)

    def again(**changes: Any) -> set[str]:
        changed = _jobs(dataclasses.replace(config, **changes), tmp_path)
        return {n for n in jobs if changed[n].content["fingerprint"] != jobs[n].content["fingerprint"]}

    classifiers = {name for name in jobs if not name.startswith(("sweep", "sets", "other"))}
    assert again(output="elsewhere", workers=1, threads=1, seeds=3) == set()
    assert again(queries=7) == classifiers
    assert again(images=90) == {"sweep-400", "sweep-500", "sweep-650", "other"}
    own = {name for name in classifiers if not name.startswith(("plain", "augment", "cadistill-at"))}
    assert {name for name in own if name not in again(teacher="same")} == set()
    assert again(teacher="same").isdisjoint({"plain-0", "augment-1"})


def test_shares_and_sets() -> None:
    assert [worker.per_class(share) for share in (0.01, 0.03, 0.1, 0.3, 1.0, 0.001)] == [1, 4, 14, 43, None, 1]
    assert needed(["plain", "augment"]) == []
    assert needed(["logit_kd", "cadistill", "labels"]) == ["originals", "canonical", "posterior"]


def _figures(right: float) -> dict[str, Any]:
    attacks = {name: [right / 2, right / 4, right / 8] for name in ("pgd", "apgd", "square", "transfer")}
    attacks |= {"n": 360, "square_n": 100, "masking": {"failed": [f"a sentence of {right}"]}}
    shares = dict.fromkeys(("clean", "independent", "swapped", "clutter", "ece", "nll", "reliance", "saliency"), right)
    return {**shares, "seconds": 9.0, "attacks": attacks, "corruptions": {"noise": [right] * 5}}


def test_figures_over_seeds() -> None:
    config = dataclasses.replace(DemoConfig(), epsilon=(0.05, 0.1, 0.2))
    runs = [_figures(0.5), _figures(1.0)]
    found = student(runs, config)
    assert found["clean"]["mean"] == 0.75 and found["clean"]["each"] == [0.5, 1.0]
    assert found["apgd"]["mean"] == 0.75 / 4  # of the middle epsilon
    assert found["square"]["n"] == 100 and found["pgd"]["n"] == 360 and len(found["corruptions"]["noise"]) == 5
    told = masking(runs, config)
    assert told["failed"] == ["a sentence of 0.5", "a sentence of 1.0"] and told["transfer"][2]["mean"] == 0.75 / 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": ["cadistill"]}, "kinds: expected some with plain among them"),
        ({"kinds": ["plain", "other"]}, "kinds"),
        ({"t_e": [650, 650]}, "t_e: expected each once, got (650, 650)"),
        ({"epsilon": [0.2, 0.1]}, "epsilon: expected ascending radii, got (0.2, 0.1)"),
        ({"epsilon": [0.0]}, "epsilon"),
        ({"share": 0.01}, "share: expected one that gives two images of each digit or more, got 0.01"),
        ({"images": 20}, "images"),
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


def test_quick_and_full_keep_what_is_given() -> None:
    short = DemoConfig(quick=True, k=(3,)).resolved()
    assert short.k == (3,) and short.output == "runs/context-quick" and short.kinds == ("plain", "cadistill")
    long = DemoConfig(full=True, steps=30).resolved()
    assert long.steps == 30 and long.queries == 5000 and max(long.shares) == 1.0 and len(long.epsilon) == 3
