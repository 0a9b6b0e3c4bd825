# SPDX-License-Identifier: Apache-2.0
"""The page about a training, from its directory."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fastdistill import cli, runs
from fastdistill.errors import InputError
from fastdistill.evaluate.figures import curves, png
from fastdistill.evaluate.training import _shortened, finding
from fastdistill.files import locked
from fastdistill.runs import RunConfig
from fastdistill.train.config import TrainSettings, to_yaml

LINE = {"output": 0.5, "feature": 0.2, "feature/mid_block": 0.2, "gradient_norm": 1.0, "skipped": 0}
WAITS = {"waited_data": 0.5, "waited_checkpoint": 0.25}
ABOUT = {"command": "fastdistill distill my.yaml", "versions": {"torch": "2.12.0"}, "device": "a card", "ended": None,
         "lines": ["teacher: of some size"], "flops": 3e12, "ceiling": 5e13, "source": "measured"}  # fmt: skip


def training(folder: Path, lines: int = 6, **last: float) -> list[dict[str, Any]]:
    """The metrics of a training; a kill has cut the last line."""
    folder.mkdir(exist_ok=True)
    found = [{"step": 10 * i, "loss": 1 / i, "seconds": 2.0 * i} | LINE for i in range(1, lines + 1)]
    found[-1] |= last
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found) + '{"step": 7')
    return found


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without figures, which take seconds."""
    monkeypatch.setattr("fastdistill.evaluate.training.write_training", lambda *_: None)


def test_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = training(tmp_path / "run", loss=40.0)
    settings = TrainSettings(steps=100, batch=8, lr=2e-3, warmup=19)
    config = RunConfig(directory=str(tmp_path / "run"), teacher="task:digits", train=settings)
    (tmp_path / "run" / "run.yaml").write_text(to_yaml(config))
    (tmp_path / "run" / "previews").mkdir()
    picture = png(curves({"a": ([1, 2], [1.0, 2.0])}, "a"), dpi=30)
    for step in range(0, 70, 10):
        (tmp_path / "run" / "previews" / f"step-{step:08d}.png").write_bytes(picture)
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "on its way: step 60 of 100" in said and "loss is 40, 120 times its median of 0.333." in said
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert report["metrics"] == lines and report["batch"] == 8 and report["steps"] == 100
    assert report["rates"] == pytest.approx([1e-3, *[2e-3] * 5])
    page = (tmp_path / "run" / "report" / "report.html").read_text()
    assert [f"after step {step}" in page for step in range(0, 70, 10)] == [True, False, True, True, True, False, True]
    for heading in ("Feature loss of each tap", "Norm of the gradient", "Learning rate", "Images per second"):
        assert heading in page
    assert "teacher: task:digits" in page and "4\u202fimages" not in page and ">4.00</strong>" not in page
    assert "40.0</strong> <span>images per second" in page  # 8 per step, 10 steps in 2 s
    assert "Waiting" not in page and "Spread" not in page  # older versions did not log these
    assert "on its way" in page and report["seed"] == 0 and "waiting_for_data" not in report["seconds"]


def test_of_what_a_run_says_of_itself(tmp_path: Path) -> None:
    """Waits and spreads are shown if the metrics have them; the versions are those of the training."""
    lines = training(tmp_path / "run", **WAITS, **{"spread/mid_block": 0.0})
    lines[4] |= WAITS | {"spread/mid_block": 0.5}
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "run" / "about.json").write_text(json.dumps(ABOUT))
    (tmp_path / "run" / "run.yaml").write_text(to_yaml(RunConfig(seed=17, train=TrainSettings(steps=100, batch=8))))
    found = runs.report(tmp_path / "run")
    assert found["seconds"] == {"total": 12.0, "waiting_for_data": 1.0, "waiting_for_checkpoint": 0.5}
    assert found["mfu"] == pytest.approx(0.3)  # 5 steps of 3 TFLOP in a second; the peak is 50
    assert found["versions"] == ABOUT["versions"] and found["device"] == "a card" and found["seed"] == 17
    page = (tmp_path / "run" / "report" / "report.html").read_text()
    for words in ("my.yaml", "of some size", "30.0\u202f%", "12.5\u202f%", "Waiting", "Spread of the student", "seed"):
        assert words in page
    again = f"fastdistill distill {tmp_path}/run/run.yaml --directory {tmp_path}/run-again"
    assert again in page
    assert "the student&#39;s feature at mid_block has collapsed" in page


@pytest.mark.parametrize(
    ("ended", "held", "said"),
    [
        (None, True, "is on its way: step 60 of 100, loss from 1.00 to 0.167."),
        (None, False, "is over: step 60 of 100, loss from 1.00 to 0.167. It ended early (without a word: killed, or"),
        ("stopped after step 61 of 100", True, "It ended early (stopped after step 61 of 100)."),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_how_a_training_ended(tmp_path: Path, ended: str | None, held: bool, said: str) -> None:
    """A running training holds the lock of its directory, and the report does not change that."""
    folder = tmp_path / "run"
    training(folder)
    (folder / "run.yaml").write_text(to_yaml(RunConfig(train=TrainSettings(steps=100))))
    (folder / "about.json").write_text(json.dumps(ABOUT | {"ended": ended}))
    with locked(folder) if held else contextlib.nullcontext():
        (folder / ".lock").touch()
        assert said in finding(runs.report(folder))
    with locked(folder):
        pass


@pytest.mark.usefixtures("undrawn")
def test_what_cannot_be_read_of_itself_is_left_out(tmp_path: Path) -> None:
    training(tmp_path / "run")
    damaged = ({"lines": 3}, {"versions": ["a"]}, {"flops": "x"}, {"ceiling": -1.0}, {"flops": float("nan")})
    for content in ("[1]", '{"lines', "", "[" * 10**5, *(json.dumps(ABOUT | each) for each in damaged)):
        (tmp_path / "run" / "about.json").write_text(content)
        assert runs.report(tmp_path / "run")["about"] == {}


@pytest.mark.usefixtures("undrawn")
def test_lines_that_no_training_has_written_are_left_out(tmp_path: Path) -> None:
    lines = training(tmp_path / "run")
    odd: list[dict[str, Any]] = [{"loss": None}, {"loss": float("nan")}, {"seconds": "2"}, {"skipped": [0]}]
    odd += [{"step": step} for step in (0, -10, True, 5.5, 10**400)]
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        for each in [*(lines[-1] | each for each in odd), *({"step": 9, name: 1.0} for name in ("loss", "skipped"))]:
            file.write("\n" + json.dumps(each))
    assert runs.report(tmp_path / "run")["metrics"] == lines


def test_modules_are_told_apart_by_as_few_parts_as_do() -> None:
    names = ["down_blocks.0.conv", "down_blocks.1.resnets.0", "down_blocks.1.resnets.1", "mid.out", "up", "up.1"]
    short = ["down_blocks.0", "down_blocks.1.resnets.0", "down_blocks.1.resnets.1", "mid", "up", "up.1"]
    assert list(_shortened(names).items()) == list(zip(names, short, strict=True))


def test_of_a_directory_without_a_run_file(tmp_path: Path) -> None:
    training(tmp_path / "fit")
    found = runs.report(tmp_path / "fit", tmp_path / "page")
    assert found["steps"] == 60 and found["settings"] is None and (tmp_path / "page" / "report.html").exists()
    head = {"fingerprint": {"config": {"batch": 4, "lr": 0.1, "lr_schedule": "cosine", "warmup": 0, "steps": 60}}}
    content = safetensors.torch.save({"a": torch.ones(1)}, metadata={"fastdistill": json.dumps(head)})
    (tmp_path / "fit" / "step-00000060.safetensors").write_bytes(content)
    (tmp_path / "fit" / "step-00000070.safetensors").write_bytes(content[:50])  # damaged
    found = runs.report(tmp_path / "fit")
    assert found["batch"] == 4 and found["rates"][0] > found["rates"][-1] > 0


@pytest.mark.usefixtures("undrawn")
def test_damaged_files_are_left_out_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    training(folder)
    (folder / "previews" / "step-00000010.png").mkdir(parents=True)
    (folder / "previews" / "step-00000020.png").write_bytes(b"")
    head = {"fingerprint": {"config": {"batch": 4, "lr_schedule": "cosine", "warmup": 0, "steps": 600}}}
    content = safetensors.torch.save({"a": torch.ones(1)}, metadata={"fastdistill": json.dumps(head)})
    (folder / "step-00000060.safetensors").write_bytes(content)
    contents = (b"train: {steps: [", b"\xff\xfe", b"[1]", b"train: {steps: -1, batch: x}", b"schema: 99", b"a: b")
    for damaged in contents:
        (folder / "run.yaml").write_bytes(damaged)
        found = runs.report(folder)
        assert (found["steps"], found["batch"], found["settings"]) == (600, 4, None), "those of the checkpoint"
        told, preview = found["concerns"]
        assert told.startswith("run.yaml could not be read and is left out (") and "\n" not in told
        assert preview == "previews/step-00000010.png could not be read and is left out (Is a directory)."
    (folder / "run.yaml").unlink()
    (folder / "run.yaml").mkdir()
    assert "Is a directory" in runs.report(folder)["concerns"][0]

    head["fingerprint"]["config"]["gone"] = 1
    content = safetensors.torch.save({"a": torch.ones(1)}, metadata={"fastdistill": json.dumps(head)})
    (folder / "step-00000060.safetensors").write_bytes(content)
    found = runs.report(folder)
    assert (found["steps"], found["rates"]) == (60, [None] * 6)
    assert found["concerns"][1].startswith("the settings in the checkpoint of step 60 could not be read")


@pytest.mark.usefixtures("undrawn")
def test_of_several_directories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(tmp_path / name) for name in ("a", "b", "c", "d")]
    for folder in (folders[0], folders[2], folders[3]):
        training(Path(folder))
    (tmp_path / "a" / "run.yaml").write_bytes(b"\xff")
    (tmp_path / "c" / "metrics.jsonl").write_text("gone")
    assert cli.main(["report", *folders]) == 2
    told = capsys.readouterr()
    assert [f"Report: {folder}/report/report.html" in told.out for folder in folders] == [True, False, False, True]
    assert "run.yaml could not be read and is left out" in told.out
    first, second, last = told.err.splitlines()
    for line, folder in ((first, folders[1]), (second, folders[2])):
        assert line.startswith("fastdistill: directory: expected the directory of a training") and folder in line
    assert last == f"fastdistill: report: no page of 2 of 4: {folders[1]}, {folders[2]}"
    assert cli.main(["report", folders[0], folders[3], "--json"]) == 0
    assert [json.loads(line)["title"] for line in capsys.readouterr().out.splitlines()] == [
        f"Training in {folder}" for folder in (folders[0], folders[3])
    ]
    assert cli.main(["report", *folders, "--output", "page"]) == 2
    assert capsys.readouterr().err == "fastdistill: --output: expected none for several directories, got page\n"


def test_what_is_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "about.json").write_text(json.dumps(ABOUT | {"ended": "FastdistillError: a tap is nan"}))
    with pytest.raises(InputError, match=r"early, whose training ended before it \(FastdistillError: a tap is nan\)"):
        runs.report(tmp_path / "early")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match=r"directory: expected the directory of a training \(metrics.jsonl with"):
            runs.report(folder)
    assert cli.main(["report"]) == 2
    assert capsys.readouterr().err == "fastdistill: report: expected the directory of a training, got nothing\n"
