# SPDX-License-Identifier: Apache-2.0
"""The page of a training, from its directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fastdistill import cli, runs
from fastdistill.errors import InputError
from fastdistill.evaluate.figures import curves, png
from fastdistill.runs import RunConfig
from fastdistill.train.config import TrainSettings, to_yaml

LINE = {"output": 0.5, "feature": 0.2, "feature/mid_block": 0.2, "gradient_norm": 1.0, "skipped": 0}


def training(folder: Path, lines: int = 6, **last: float) -> list[dict[str, Any]]:
    """The metrics of a training, the last line cut by a kill."""
    folder.mkdir(exist_ok=True)
    found = [{"step": 10 * i, "loss": 1 / i, "seconds": 2.0 * i} | LINE for i in range(1, lines + 1)]
    found[-1] |= last
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found) + '{"step": 7')
    return found


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
    assert "40.0</strong> <span>images per second" in page  # 8 a step, 10 steps in 2 s


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


def test_what_is_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match=r"directory: expected the directory of a training \(metrics.jsonl with"):
            runs.report(folder)
    assert cli.main(["report"]) == 2
    assert capsys.readouterr().err == "fastdistill: report: expected the directory of a training, got nothing\n"
