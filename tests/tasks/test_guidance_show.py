# SPDX-License-Identifier: Apache-2.0
"""``fastdistill guidance show``: a schedule step by step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastdistill.cli import main
from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Guidance
from fastdistill.diffusion.schedule import NoiseSchedule


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["guidance", "show", *arguments])
    out, error = capsys.readouterr()
    return code, out, error


def test_every_step_and_the_cost(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "w.png"
    options = ["--grid", "karras:12@12..0.1", "--method", "heun", "--png", str(file), "--json"]
    code, out, _ = said(capsys, "8@10,-1@2,0", *options)
    report = json.loads(out)
    grid, schedule = Grid.karras(NoiseSchedule.scaled_linear(), 12, 12, 0.1), Guidance.window(8, -1, 10, 2)
    assert code == 0 and file.read_bytes().startswith(b"\x89PNG") and report["png"] == str(file)
    columns = {name: [row[name] for row in report["steps"]] for name in report["steps"][0]}
    assert columns == {
        "step": list(range(len(grid))),
        "t": grid.times.tolist(),
        "sigma": grid.sigma[:-1].tolist(),
        "w": schedule.weights(grid).tolist(),
        "g": schedule.scales(grid).tolist(),
        "passes": schedule.passes(grid).tolist(),
    }
    assert report["evaluations"] == schedule.evaluations(grid, 2) < report["constant_evaluations"] == 4 * len(grid) - 2


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "-1@2,0", "--grid", "flow:4", "--png", "None")
    assert code == 0 and "w = -1 while sigma > 2, then 0" in out and "4 evaluations per image (8 of a constant" in out
    assert [line.split() for line in out.splitlines()[4:6]] == [
        ["0", "1000", "inf", "-1", "0", "1"],
        ["1", "750", "3", "-1", "0", "1"],
    ]
    assert all(len(line) <= 100 for line in out.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "guidance show: expected a schedule such as 8@10,-1@2,0, got none"),
        (("8@",), "column 3 should be a number"),
        (("8@99,0",), "the ends of the levels, got 99 in"),
        (("power:2^1",), "a weight for each sample"),
        (("2", "--grid", "karas:3"), "got 'karas:3'"),
    ],
)
def test_bad_input(
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, error = said(capsys, *arguments)
    assert code != 0 and message in error and not out and not list(tmp_path.iterdir())
