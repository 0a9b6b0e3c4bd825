# SPDX-License-Identifier: Apache-2.0
"""Guidance distillation with a run file: plan, training, sampling in one pass per step, export."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistill import runs
from fastdistill.distill import GuidanceDistillation, RandomConditioning
from fastdistill.errors import InputError
from fastdistill.models.calling import Predictor
from fastdistill.models.families import family_named
from fastdistill.models.pipelines import open_pipeline
from fastdistill.runs.config import EvaluateSettings
from fastdistill.runs.models import trained_student
from fastdistill.runs.objective import objective_of
from tests.runs.conftest import cached, run_config

Saved = Callable[[str], Path]
GUIDED: dict[str, Any] = {"guidance": {"schedule": "8@2,-1@0.5,0", "grid": "trailing:10"}, "weights": {"feature": 0.0}}
READS: dict[str, Any] = {"guidance": {"schedule": 1, "scale": [0, 7]}, "weights": {"feature": 0.0}}


@pytest.mark.parametrize("reads", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_from_the_file_to_the_exported_student(
    reads: bool, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = READS if reads else GUIDED
    config = cached(
        run_config(
            saved("sd"),
            tmp_path,
            objective=objective,
            student={"spec": "whole"},
            preview={"every": None if reads else 3},
        )
    )
    runs.distill(config)
    student = trained_student(runs.opened(config))
    assert student.config["time_cond_proj_dim"] == (256 if reads else None)
    seen: list[tuple[int, Any]] = []
    call = Predictor.__call__

    def spied(self: Any, x: Any, time: Any, rows: Any, *others: Any) -> Any:
        seen.append((len(x), rows.get("timestep_cond")))
        return call(self, x, time, rows, *others)

    monkeypatch.setattr(Predictor, "__call__", spied)
    runs.sample(config, ["a cat"], tmp_path / "images", steps=2)  # where the teacher's scale is 2
    if reads:
        runs.sample(config, ["a cat"], tmp_path / "other", steps=2, guidance_scale=6.0)
        told = family_named("unet").guidance_rows(student.config, torch.tensor([1.0, 5.0]))
        assert torch.equal(torch.cat([seen[0][1], seen[-1][1]]), told)
    assert {count for count, _ in seen} == {1}
    monkeypatch.undo()
    if not reads:
        report = runs.evaluate(dataclasses.replace(config, evaluate=EvaluateSettings(prompts=2, batch=2)))
        loss = report["student"]["measures"]["output_loss"]
        assert loss["value"] > 0
    runs.export(config, tmp_path / "student")
    assert open_pipeline(tmp_path / "student").family.reads_guidance(student.config) is reads


def test_settings_become_the_objective(saved: Saved, tmp_path: Path) -> None:
    for guided, objective in ((False, {"weights": {"feature": 0.0}}), (True, GUIDED)):
        run = runs.opened(run_config(saved("sd"), tmp_path, objective=objective))
        made = objective_of(run.config.objective, run.student(run.pipeline.model(device="meta")))
        assert isinstance(made, GuidanceDistillation) is guided and isinstance(made, RandomConditioning)
        assert made.loss_weighting == (None if guided else "uniform") and made.probability == "exp"
        assert run.student_guidance({"guidance_scale": 7.5}) == {"guidance_scale": 1.0 if guided else 7.5}


@pytest.mark.slow
def test_a_plan_counts_both_passes_of_the_teacher(saved: Saved, tmp_path: Path) -> None:
    plain, guided = (
        runs.plan(run_config(saved("sd"), tmp_path, objective=objective)).flops["teacher"]
        for objective in ({"weights": {"feature": 0.0}}, GUIDED)
    )
    assert guided == pytest.approx(2 * plain, rel=1e-2)


def test_bad_input(saved: Saved, tmp_path: Path) -> None:
    for objective, message in (
        ({"guidance": {"scale": [0, 4]}}, r"objective\.guidance\.schedule: expected one, beside scale, grid or weight"),
        ({"guidance": {"schedule": "2@x"}}, "^objective.guidance.schedule: expected a schedule such as"),
        ({"guidance": {"schedule": "2@50%,0"}}, "^objective.guidance.schedule: expected thresholds as sigma or t"),
        ({"guidance": {"schedule": "2", "grid": "leading:4"}}, "^objective.guidance.grid: .*, got 'leading:4'"),
        ({"guidance": {"schedule": "2", "grid": "trailing:9999"}}, "^objective.guidance.grid: .*, got 9999"),
        ({"guidance": {"schedule": "2", "scale": [4, 1]}}, r"^objective.guidance.scale: .*, got \(4.0, 1.0\)"),
    ):
        with pytest.raises(InputError, match=message):
            runs.opened(run_config(saved("sd"), tmp_path, objective=objective))
    with pytest.raises(InputError, match=r"^objective.guidance.scale \(guidance_embedding\): expected False for a DiT"):
        runs.opened(run_config(saved("dit"), tmp_path, objective=READS))
