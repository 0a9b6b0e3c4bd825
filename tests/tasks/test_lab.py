# SPDX-License-Identifier: Apache-2.0
"""The guidance lab: its rows, its picture, and that an interrupted run is continued."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from fastdistill.cli import main
from fastdistill.diffusion.guidance import Guidance
from fastdistill.diffusion.guided import sample
from fastdistill.errors import InputError, StorageError
from fastdistill.evaluate.phase import phase_picture
from fastdistill.files import locked
from fastdistill.tasks.guidance import lab
from fastdistill.tasks.guidance.config import WORLDS, LabConfig
from fastdistill.tasks.guidance.lab import Point
from fastdistill.tasks.guidance.measure import measure
from fastdistill.tasks.guidance.worlds import RandomCentres, TwoClass

FIELDS = (
    "schedule method grid dimension classes alpha mean variance shift variance_ratio standard_error expected source"
)


def phase(kind: str, samples: int, **chosen: Any) -> list[dict[str, Any]]:
    """The rows for the phase plot of a world."""
    config = LabConfig(samples=samples)
    points = [point for point in lab.points(kind, True) if point.phase]  # type: ignore[arg-type]
    return [
        lab.row(kind, point, config)[0]  # type: ignore[arg-type]
        for point in points
        if all(getattr(point, name) in values for name, values in chosen.items())
    ]


def test_two_classes_feel_less_guidance_the_further_they_are_apart() -> None:
    """The distribution along the line between them, by quantiles: shift ~ 1 / sqrt(d), constant variance."""
    found = []
    for d in (4, 64, 1024):
        grid = Point("1", (100 * math.sqrt(d), 0.02), "heun").levels()
        world = TwoClass(grid, 1, math.sqrt(d), 0.7)
        x = torch.special.ndtri((torch.arange(200, dtype=torch.float64) + 0.5) / 200)[:, None]
        end = sample(world, x, torch.ones(200, 1), torch.zeros(1), grid, guidance=1.0, method="heun",
                     prediction_type=world.prediction_type)  # fmt: skip
        found.append((math.log(d), float(end.mean()) / math.sqrt(d) - 1, float(end.var())))
    d, shift, variance = np.array(found).T
    assert np.polyfit(d, np.log(shift), 1)[0] == pytest.approx(-0.5, abs=0.05)
    assert variance == pytest.approx(variance.mean(), rel=0.02) and variance.mean() < 0.6 * 0.49


def test_the_corners_of_a_cube_feel_the_same_in_any_dimension() -> None:
    rows = phase("hypercube", 512)
    for name in ("mean", "variance"):
        values = np.array([float(row[name]) for row in rows])
        errors = np.array([row["standard_error"][name] for row in rows])
        assert (abs(values - values[-1]) < 4 * np.hypot(errors, errors[-1])).all()
    assert all(row["shift"] > 0.3 and row["variance_ratio"] < 0.7 for row in rows)


@pytest.mark.slow
def test_the_phase_picture_as_a_whole() -> None:
    worlds = {}
    for kind in ("two_class", "hypercube", "random_centres"):
        rows = phase(kind, 2048)
        worlds[kind] = lab._fits(kind, rows)  # type: ignore[arg-type]
    assert worlds["two_class"]["shift"]["slope"] == pytest.approx(-0.5, abs=0.05)
    assert all(abs(fit["slope"]) < 0.02 for fit in worlds["hypercube"].values())
    assert all(fit["collapse"] < 0.2 for fit in worlds["random_centres"].values())


def test_random_centres_depend_on_alpha() -> None:
    """With the same alpha in two dimensions the shift is equal; with a larger alpha it is larger."""
    few, same, many = (
        measure(RandomCentres(grid, d, k, m=1.0, s=0.7), grid, 1.0, method="heun", samples=1024)
        for d, k in ((5, 5), (10, 25), (10, 400))
        for grid in [Point("1", (100.0, 0.02)).levels()]
    )
    assert abs(few.shift - same.shift) < 0.25 * many.shift < 0.5 * (many.shift + same.shift)
    assert many.shift > 1.2 * same.shift > 0 and many.variance_ratio < same.variance_ratio < 1


def test_windows_give_variance_back_at_equal_separation() -> None:
    """The corners of a cube with the classes of the shades, computed exactly: 0.605 by quadrature."""
    schedules = ("0", "0.5", "1", "1.5", "2", "4@8,-1@2,0")
    points = [Point(s, dimension=3, m=lab._INK) for s in schedules]
    kept = [lab.row("hypercube", point, LabConfig(samples=4096)) for point in points]
    separation, accuracy = lab._recovered(kept)
    assert (separation["schedule"], separation["at"], accuracy["at"]) == ("4@8,-1@2,0", "separation", "accuracy")
    low, high = separation["interval"]
    assert 0.55 < low < separation["value"] < high < 0.66 and abs(separation["value"] - 0.605) < 0.02
    assert 0.2 < accuracy["value"] < 0.35


@pytest.fixture
def config(tmp_path: Path) -> LabConfig:
    return LabConfig(str(tmp_path / "lab"), quick=True, world=("two_class",), samples=64)


def test_a_run_goes_on_where_it_was_interrupted(config: LabConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    made, done = lab.row, []

    def interrupted(*arguments: Any) -> Any:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(arguments)
        return made(*arguments)

    quiet = Console(quiet=True)
    monkeypatch.setattr(lab, "row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lab.run(config, quiet)
    assert not (Path(config.output) / "report.json").exists()
    monkeypatch.setattr(lab, "row", lambda *arguments: done.append(arguments) or made(*arguments))
    report = json.loads(lab.run(config, quiet).read_text())
    rows = report["worlds"]["two_class"]["rows"]
    assert len(done) == len(rows) == len(lab.points("two_class", True))
    assert all(list(row) == FIELDS.split() for row in rows)
    exact = [row for row in rows if row["schedule"] == "0"]
    assert [row["source"] for row in exact] == ["recursion"] and exact[0]["expected"]["mean"] is not None
    assert {row["source"] for row in rows if row["schedule"] != "0"} == {None}
    assert report["worlds"]["two_class"]["fits"]["shift"]["slope"] < 0
    for name in ("phase.png", "phase-dark.png"):
        assert (Path(config.output) / name).read_bytes().startswith(b"\x89PNG")

    lab.run(config, quiet)
    assert len(done) == len(rows)
    lab.run(dataclasses.replace(config, seed=1), quiet)
    assert len(done) == 2 * len(rows)
    with locked(Path(config.output)), pytest.raises(StorageError, match="another process is writing here"):
        lab.run(config, quiet)


def test_every_world_has_points_that_its_grid_takes() -> None:
    for kind in WORLDS:
        for quick in (True, False):
            found = lab.points(kind, quick)
            assert len(set(found)) == len(found)
            for point in found:
                grid = point.levels()
                Guidance.parse(point.schedule).weights(grid)
                assert point.world(kind, grid, 0).dimension == point.dimension


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guidance", "lab", "--quick", "--world", "gaussian", "hypercube", "--dry-run"]) == 0
    assert "quick: true" in capsys.readouterr().out
    assert main(["guidance", "lab", "--samples", "3"]) == 2
    assert "samples: input should be greater than or equal to 64, got 3" in capsys.readouterr().err


def test_pictures_of_other_worlds_are_refused() -> None:
    with pytest.raises(InputError, match="worlds: expected rows of two_class, hypercube, random_centres, got torus"):
        phase_picture({"torus": [{}]})
    with pytest.raises(InputError, match="got none"):
        phase_picture({})
    assert lab.pictures({"gaussian": {"rows": [], "phase": []}}) == {}
