# SPDX-License-Identifier: Apache-2.0
"""``fastdistill guidance solve``: windows for the latents of a run, for a cache, and for given variances."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastdistill.cli import main
from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.diffusion.spectrum import Spectrum, variance_neutral
from fastdistill.models.pipelines import open_pipeline
from fastdistill.train.config import to_yaml
from tests.runs.conftest import cached, run_config

GIVEN = ("guidance", "solve", "--c", "0.4", "0.1", "--u", "2", "0.3", "--w-plus", "2")


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, error = capsys.readouterr()
    return code, out, error


def test_given_variances(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, *GIVEN, "--grid", "karras:20", "--noise", "cosine", "--json")
    found = json.loads(out)
    grid = Grid.karras(NoiseSchedule.cosine(), 20)
    wanted = variance_neutral(Spectrum.of([0.4, 0.1], [2.0, 0.3]), grid, 2.0)
    assert code == 0 and found["schedule"] == str(wanted.schedule) and found["reachable"] is True
    assert found["variance_ratio"] == wanted.ratio == pytest.approx(1) and found["constant_variance_ratio"] < 0.6
    assert found["evaluations"] == wanted.schedule.evaluations(grid) <= found["constant_evaluations"] == 2 * len(grid)
    code, out, _ = said(capsys, *GIVEN, "--grid", "flow:8", "--switch", "0.3", "--method", "heun")
    assert (
        code == 0
        and "the nearest: all of the variance needs w = -" in out
        and "with -1 no number of steps is enough" in out
    )


def test_a_run_and_its_cache(saved: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved("sd")
    config = cached(run_config(folder, tmp_path))
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    latents = tmp_path / "cache" / "latents"
    measured = Spectrum.beside(latents, 2)
    assert measured.c.shape == (3, 3)  # the teacher was never trained; the other checks use given variances
    c, u = torch.tensor([[0.4, 0.1]]), torch.tensor([2.0, 0.3])
    given = Spectrum(c, u, torch.ones(2), torch.zeros(1).long(), measured.fingerprint)
    given.save(latents.with_name("latents.spectrum.json"))
    options = ("--grid", "trailing:10", "--w-plus", "1", "--switch", "1", "--rank", "2", "--json")
    for arguments, noise in (
        ((str(tmp_path / "run.yaml"),), open_pipeline(folder).schedule()),
        (("--cache", str(latents), "--noise", "cosine"), NoiseSchedule.cosine()),
    ):
        code, out, _ = said(capsys, "guidance", "solve", *arguments, *options)
        wanted = variance_neutral(given, Grid.trailing(noise, 10), 1.0, 1.0)
        assert code == 0 and json.loads(out)["schedule"] == str(wanted.schedule)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "guidance solve: expected one of a run file, --cache, or --c and --u, got none"),
        (("--cache", "x", "--c", "1", "--u", "2"), "expected one of a run file, --cache, or --c and --u, got several"),
        (("--c", "1", "2", "--u", "2"), "guidance solve: expected as many variances in --c as in --u, got 2 and 1"),
        (("--c", "2", "--u", "1"), "u: expected a variance above c in some direction (guidance widens what"),
        (("--c", "1", "--u", "2", "--grid", "karras"), "grid: expected trailing:20, karras:30"),
        (("--c", "1", "--u", "2", "--floor", "1"), "floor: input should be less than or equal to 0, got 1.0"),
        (("--cache", "nowhere"), "nowhere"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, error = said(capsys, "guidance", "solve", *arguments)
    assert code == 2 and not out and message in error and "Traceback" not in error


def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, *GIVEN, "--dry-run")
    assert code == 0 and "w_plus: 2.0" in out
