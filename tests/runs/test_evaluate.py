# SPDX-License-Identifier: Apache-2.0
"""A student compared with its teacher, for the pipelines of every family."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import runs
from fastdistill.cli import main
from fastdistill.errors import InputError, StorageError
from fastdistill.models import Student, make_student
from fastdistill.train import checkpoint
from fastdistill.train.config import to_yaml
from tests.harness import EPS, EPS64
from tests.models import tiny_pipelines as tiny
from tests.runs.conftest import cached, quickly, run_config

Folders = Callable[[str], Path]
QUICK = ("sd", "dit")
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in tiny.PIPELINES]


ADAPTED = {"student": {"lora": {"rank": 2}}, "objective": {"weights": {"task": 1.0}}}


def config(folder: Path, directory: Path, **changes: Any) -> runs.RunConfig:
    settings = {"prompts": 3, "images_per_prompt": 2, "batch": 6} | changes.pop("evaluate", {})
    return run_config(folder, directory, evaluate=settings, **changes)


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdistill.evaluate.measures._RESAMPLES", 5)


@pytest.fixture
def unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without figures, which take most of the time."""
    monkeypatch.setattr(sys.modules["fastdistill.runs.evaluate"], "_write", lambda *_: None)


def student_of(run: runs.Run) -> Student:
    return make_student(run.pipeline.model(), run.student_spec)


def colors(images: Tensor) -> Tensor:
    return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_student_of_every_family(name: str, saved: Folders, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"prompts": {"file": None, "seen": 1}} if name == "dit" else {}
    given = config(saved(name), tmp_path, cache={"guidance_scale": 1.0} if name in ("lcm", "flux") else {}, **changes)
    done: list[tuple[int, int]] = []
    report = runs.evaluate(given, student=student_of(runs.opened(given)), progress=lambda *n: done.append(n))
    folder = tmp_path / "run" / "evaluation"
    assert json.loads((folder / "report.json").read_text()) == {"schema": 1} | report
    assert sorted(file.name for file in folder.iterdir()) == ["report.html", "report.json", "run.yaml", "samples.png"]
    prompts = 2 if name == "dit" else 3
    assert done[-1] == (4 * prompts, 4 * prompts)
    assert [prompt["seen"] for prompt in report["prompts"]] == (
        [True, False] if name == "dit" else [True, False, False]
    )
    student, teacher = report["student"], report["teacher"]
    assert student["parameters"] < teacher["parameters"]
    assert student["images_per_second"] > 0 and teacher["images_per_second"] > 0
    measures = student["measures"]
    for key in ("images_distance", "latents_distance", "output_loss", "feature_loss"):
        if key == "feature_loss" and name in ("sd", "sdxl", "lcm"):  # for students with other channels
            continue
        low, high = measures[key]["interval"]
        assert 0 < low <= measures[key]["value"] <= high, key
    assert measures["vendi_ratio"]["value"] > 0 and measures["variance_ratio"]["value"] > 0
    assert set(report["left_out"]) <= {"precision", "recall", "density", "coverage", "feature_loss"}  # too few images


def test_a_student_that_is_the_teacher(saved: Folders, tmp_path: Path, unwritten: None) -> None:
    """The distance and the losses are 0, and the diversity is equal."""
    given = config(saved("sd"), tmp_path, evaluate={"images_per_prompt": 3})
    run = runs.opened(given)
    model = run.pipeline.model()
    names = ("down_blocks.0", "up_blocks.1")
    same = runs.evaluate(given, student=Student(model, names, names, ((8, 8),) * 2, None), features=colors)
    measures = same["student"]["measures"]
    for key in ("images_distance", "latents_distance", "output_loss", "feature_loss"):
        assert measures[key] == {"value": 0.0, "interval": [0.0, 0.0]}
    for key in ("precision", "recall", "coverage", "vendi_ratio", "variance_ratio", "class_separation"):
        assert measures[key]["value"] == pytest.approx(1, rel=64 * EPS64)
    assert same["teacher"]["measures"]["images_distance"]["value"] > 0 and same["features"] == "colors"
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("changes", [{"teacher_dtype": "bfloat16"}, ADAPTED])
def test_both_compute_in_the_teachers_dtype(
    changes: dict[str, Any], saved: Folders, tmp_path: Path, unwritten: None
) -> None:
    """The given student does not change; new adapters change nothing."""
    if "student" in changes:
        pytest.importorskip("peft")
    given = config(saved("sd"), tmp_path, **changes)
    run = runs.opened(given)
    made = student_of(run)
    report = runs.evaluate(given, student=made)
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}
    assert report["sampling"]["dtype"] == changes.get("teacher_dtype", "float32")
    distance = report["student"]["measures"]["images_distance"]["value"]
    assert (distance == 0) == ("student" in changes)


def test_what_is_compared_is_what_was_asked_for(saved: Folders, tmp_path: Path, unwritten: None) -> None:
    """Prompts of a file, another number of steps and another guidance; the distance is that of the two samples."""
    (tmp_path / "own.txt").write_text("a cat\na house\n")
    given = config(saved("sd"), tmp_path, evaluate={
        "prompts": str(tmp_path / "own.txt"), "steps": 3, "guidance_scale": 1.5, "seed": 7, "images_per_prompt": 1,
    })  # fmt: skip
    run = runs.opened(given)
    student = student_of(run).model.eval()
    report = runs.evaluate(given, student=student)
    assert [(p["text"], p["seen"]) for p in report["prompts"]] == [("a cat", True), ("a house", False)]
    bank = run.pipeline.encode(["a cat", "a house"])
    options: dict[str, Any] = {"steps": 3, "guidance_scale": 1.5, "seed": 7}
    own, theirs = (run.pipeline.sample(m, bank, torch.arange(2), **options) for m in (student, run.pipeline.model()))
    wanted = (own - theirs).double().square().mean((1, 2, 3)).sqrt()
    found = report["student"]["measures"]["latents_distance"]["value"]
    assert found == pytest.approx(float(wanted.mean()), rel=64 * EPS)
    assert report["sampling"]["steps"] == 3 and report["sampling"]["guidance_scale"] == 1.5
    assert report["left_out"]["variance_ratio"] == "there is one image of each prompt"
    assert "feature_loss" in report["left_out"]  # a plain model has no taps


def test_stored_prompts_are_those_of_the_encoders(
    saved: Folders, tmp_path: Path, unwritten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(saved("sd"), tmp_path)
    made = student_of(runs.opened(given))
    encoded = runs.evaluate(given, student=made)
    runs.cache(given, only="prompts")
    monkeypatch.setattr(sys.modules["fastdistill.runs.evaluate"], "_encoded", lambda *_: pytest.fail("encoded again"))
    stored = runs.evaluate(given, student=made)
    for name in ("latents_distance", "output_loss"):  # the batch size of the text encoder changes the last bits
        found, wanted = (report["student"]["measures"][name]["value"] for report in (stored, encoded))
        assert abs(found - wanted) <= 1024 * EPS * wanted


def test_scores_with_features_and_images_of_ones_own(saved: Folders, tmp_path: Path, unwritten: None) -> None:
    pytest.importorskip("torchmetrics")
    from PIL import Image

    (tmp_path / "real" / "deeper").mkdir(parents=True)
    for place in range(4):
        shade = Image.new("RGB" if place else "L", (40 + place, 32), 60 * place if not place else (60 * place, 9, 9))
        shade.save(tmp_path / "real" / ("deeper" if place == 3 else "") / f"{place}.png")
    given = config(saved("sd"), tmp_path, evaluate={"metrics": ["fid", "kid"], "reference": str(tmp_path / "real")})
    report = runs.evaluate(given, student=student_of(runs.opened(given)), features=colors)
    for model in ("teacher", "student"):
        assert report[model]["measures"]["fid"]["value"] > 0 and "kid" in report[model]["measures"]
    assert report["reference"] == str(tmp_path / "real")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ["clip"]}, "evaluate.clip: expected the folder of a CLIP model"),
        ({"features": "nowhere"}, "nowhere: expected the folder of a model of transformers"),
        ({"metrics": ["fid"], "inception": "nowhere.pth"}, "nowhere.pth: expected the weights of Inception-v3"),
        ({"prompts": "nowhere.txt"}, "nowhere.txt"),
        ({"reference": "nowhere"}, "nowhere: expected a folder of images"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_sampled(
    saved: Folders, tmp_path: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "metrics" in changes:
        pytest.importorskip("torchmetrics")
    monkeypatch.setattr(sys.modules["fastdistill.runs.evaluate"], "compared", lambda *_, **__: pytest.fail("sampled"))
    given = config(saved("sd"), tmp_path, evaluate=changes)
    with pytest.raises((InputError, StorageError), match=message):
        runs.evaluate(given, student=student_of(runs.opened(given)))
    assert not (tmp_path / "run").exists()


def test_a_file_in_its_place_is_said_before_anything_is_sampled(
    saved: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["fastdistill.runs.evaluate"], "compared", lambda *_, **__: pytest.fail("sampled"))
    given = config(saved("sd"), tmp_path)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "evaluation").touch()
    with pytest.raises(StorageError, match="evaluation: expected a directory, got a file"):
        runs.evaluate(given, student=student_of(runs.opened(given)))


@pytest.mark.parametrize("changes", [{}, pytest.param(ADAPTED, marks=pytest.mark.slow)])
def test_the_student_of_a_run(
    changes: dict[str, Any],
    saved: Folders,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The newest checkpoint or another one, with averaged weights and, if the channels differ, with its adapters."""
    if changes:
        pytest.importorskip("peft")
    given = cached(config(saved("sd"), tmp_path, cache={"sizes": [[32, 32]]}, **changes))
    runs.distill(given)
    (tmp_path / "run.yaml").write_text(to_yaml(given))
    read, whole = [], checkpoint.read
    monkeypatch.setattr(checkpoint, "read", lambda path: (read.append(path), whole(path))[1])
    main(["evaluate", str(tmp_path / "run.yaml"), "--json", "--evaluate.steps", "1"])
    report = json.loads(capsys.readouterr().out)
    assert report["sampling"]["steps"] == 1 and report["student"]["measures"]["feature_loss"]["value"] > 0
    assert json.loads((tmp_path / "run" / "evaluation" / "report.json").read_text()) == {"schema": 1} | report
    assert read == [tmp_path / "run" / "step-00000003.safetensors"]  # only once, also if the features have adapters
    again = runs.load(tmp_path / "run" / "evaluation" / "run.yaml")
    assert again.evaluate.steps == 1
    monkeypatch.setattr(sys.modules["fastdistill.runs.evaluate"], "evaluate", lambda *_, **__: report)
    main(["evaluate", str(tmp_path / "run.yaml")])
    shown = capsys.readouterr().out
    assert "Distance of images" in shown and "evaluation/report.html" in shown
    monkeypatch.setattr(sys.modules["fastdistill.runs.evaluate"], "_write", lambda *_: None)
    last, before = report["student"]["measures"], runs.evaluate(again, step=2)["student"]["measures"]
    assert before["output_loss"] != last["output_loss"] and before["feature_loss"] != last["feature_loss"]
    with pytest.raises(InputError, match=r"^step: expected a checkpoint of .*: 2, 3, got 1"):
        runs.evaluate(given, step=1)


@pytest.mark.parametrize("name", quickly(("sd", "sdxl"), "sd"))
def test_each_of_several_sizes(name: str, saved: Folders, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Each size is evaluated as if it were the only one; report and pictures have it by name."""
    few = {"prompts": 2, "images_per_prompt": 1, "steps": 1}
    both, alone = (
        config(saved(name), tmp_path, cache={"sizes": sizes}, evaluate=few)
        for sizes in ([[32, 32], [48, 32]], [[48, 32]])
    )
    student, done = student_of(runs.opened(both)), list[tuple[int, int]]()
    report = runs.evaluate(both, student=student, progress=lambda *n: done.append(n))
    names = {file.name for file in (tmp_path / "run" / "evaluation").iterdir()}
    assert names == {"report.html", "report.json", "run.yaml", "samples-32x32.png", "samples-48x32.png"}
    assert report["sampling"]["pixels"] == "32 x 32, 48 x 32" and [*report["sizes"]] == ["48 x 32"]
    assert done == [(2, 8), (4, 8), (6, 8), (8, 8)]
    request.getfixturevalue("unwritten")
    other, wanted = report["sizes"]["48 x 32"], runs.evaluate(alone, student=student)
    for key in ("images_distance", "latents_distance", "output_loss"):
        found, first = (each["student"]["measures"][key]["value"] for each in (other, report))
        assert abs(found - wanted["student"]["measures"][key]["value"]) <= 1024 * EPS * found and found != first
    assert wanted["sizes"] == {} and other["left_out"] == wanted["left_out"]


def test_students_that_are_none(saved: Folders, tmp_path: Path) -> None:
    given = config(saved("sd"), tmp_path)
    with pytest.raises(InputError, match=r"^student: expected a model, or a Student, got 'student'"):
        runs.evaluate(given, student="student")
    with pytest.raises(StorageError, match=r"expected a checkpoint of the run \(fastdistill distill\), got none"):
        runs.evaluate(given)
    with pytest.raises(InputError, match=r"^features: expected a function of images, got 3"):
        runs.evaluate(given, student=torch.nn.Identity(), features=3)  # type: ignore[arg-type]
