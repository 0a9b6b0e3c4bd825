# SPDX-License-Identifier: Apache-2.0
"""The commands of canonical latents on the context task."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.cli import main
from fastdistill.data.shards import load_rows
from fastdistill.distill.canonical_set import KIND
from fastdistill.evaluate.canonical_figures import canonical_figure
from fastdistill.evaluate.figures import png

pytest.importorskip("sklearn")
SWEEP = ["canonical", "sweep", "--t-e", "650", "--k", "0", "2", "--tap", "down_blocks.1", "--per-class", "3"]


def test_a_sweep_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows are kept, rows of another teacher are refused, and the output names the choice."""
    monkeypatch.chdir(tmp_path)

    def searched(taps: Any, x: Tensor, k: int, **_: object) -> list[Any]:  # any directions are sufficient here
        vectors = torch.eye(192)[:, :k].expand(len(x), -1, -1)
        return [SimpleNamespace(vectors=vectors, settled=torch.ones(len(x), dtype=torch.bool)) for _ in taps]

    monkeypatch.setattr("fastdistill.distill.sweep_level.top_subspaces", searched)
    few = [*SWEEP, "--steps", "2", "--json"]
    assert main(few) == 0
    found = json.loads(capsys.readouterr().out)
    kept = json.loads(Path("runs/canonical-sweep/sweep.json").read_text())
    assert [row["k"] for row in found["sweep"]] == [0, 2] and kept["sweep"] == found["sweep"]
    assert found["chosen"]["k"] == 2 and kept["chosen"] == found["chosen"]
    none, some = found["sweep"]
    assert none["irrelevant_removed"] == none["selectivity"] == none["energy"] == 0 and some["energy"] > 0
    monkeypatch.setattr("fastdistill.distill.sweep_level.top_subspaces", None)  # no new search
    assert main(few[:-1]) == 0
    out = capsys.readouterr().out
    assert "selectivity" in out and "chosen: t_e 650, k 2, down_blocks.1: " in out
    assert json.loads(Path("runs/canonical-sweep/sweep.json").read_text()) == kept
    assert main([*SWEEP, "--steps", "3"]) == 2
    assert "its rows were made differently (steps: expected 3, got 2)" in capsys.readouterr().err
    Path("runs/canonical-sweep/sweep.json").write_text("{}")
    assert main(few) == 2 and "sweep.json: damaged, no rows of a sweep" in capsys.readouterr().err


def test_extract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--k", "1", "--tap", "down_blocks.1", "--steps", "2", "--per-class", "1"]
    assert main(["canonical", "extract", *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    manifest, rows = load_rows("runs/canonical", kind=KIND)
    assert report["rows"] == len(rows["rows"]) == 10 and manifest.fingerprint["clarid"]["k"] == 1
    assert rows["prompt_index"].tolist() == list(range(10))
    assert report["energy"] == pytest.approx(float(rows["energy"].mean()))
    assert main(["canonical", "extract", *options, "--t-e", "500"]) == 2
    assert "clarid.t_e: expected 500, got 400" in capsys.readouterr().err
    assert main(["canonical", "extract", "none.yaml", *options]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["canonical", "show", "3", "--k", "2", "--tap", "down_blocks.1", "--steps", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["row"] == 3 and len(report["values"]) == 2 and 0 < report["energy"] < 1
    assert Path(report["png"]).read_bytes().startswith(b"\x89PNG")
    assert main(["canonical", "show", "--k", "0", "--steps", "2", "--png", "None", "--part", "swapped"]) == 0
    assert "row 0 of swapped: 0.0% of the latent projected out\n  singular values none" in capsys.readouterr().out
    assert main(["canonical", "show", "2000", "--k", "0"]) == 2
    assert "row: expected a scene of students, 0 to 1436, got 2000" in capsys.readouterr().err
    assert main(["canonical", "show", "--tap", "mid_blok"]) == 2
    assert "mid_block" in capsys.readouterr().err


def test_the_figure_in_words() -> None:
    pytest.importorskip("matplotlib")
    images = {"image": torch.rand(3, 4, 4), "canonical": torch.rand(1, 4, 4)}
    figure = canonical_figure(images, torch.randn(9, 3, 4, 4), [float(9 - i) for i in range(9)], "Row 1")
    assert figure.get_label() == "Row 1. image, canonical. Singular values: 9, 8, 7, 6, 5, 4, 3, 2."
    assert png(figure, dark=True).startswith(b"\x89PNG")
    assert canonical_figure(images, torch.zeros(0, 3, 4, 4), []).get_label().endswith("Singular values: none.")
