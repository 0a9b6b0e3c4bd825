# SPDX-License-Identifier: Apache-2.0
"""Run files created from pipeline folders, and the recipes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdistill import runs
from fastdistill.errors import InputError
from fastdistill.models import make_student
from fastdistill.models.families import family_named
from fastdistill.runs.init import RECIPES
from fastdistill.runs.student import student_spec_of
from fastdistill.train.config import from_mapping
from fastdistill.train.yaml_text import parsed
from tests.models import tiny_pipelines as tiny
from tests.models.real import teacher
from tests.runs.conftest import quickly

#: The recipes, by the published configuration that they belong to.
OF_REAL = {"sd15": "sd15", "sdxl": "sdxl", "pixart": "pixart_sigma", "dit": "dit_xl_2", "sd3": "sd3_medium"}


@pytest.mark.parametrize("name", quickly(tiny.PIPELINES, "sd3", "dit"))
def test_a_run_file_of_every_family(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    text = runs.init(saved(name))
    (tmp_path / "run.yaml").write_text(text)
    config = runs.load(tmp_path / "run.yaml")
    assert config.teacher == str(saved(name)) and config.directory == f"runs/{name}" == config.cache.directory.replace(
        "caches", "runs"
    )
    assert runs.opened(config).student_spec is not None  # it fits the teacher
    assert (config.prompts.file is None) == (name == "dit")
    kind = tiny.PIPELINES[name][0]
    assert text.startswith(f"# {kind}, family {runs.opened(config).pipeline.family.name}: ")
    assert all(len(line) <= 120 for line in text.splitlines())


def test_what_the_pipeline_samples_with_is_the_default(saved: Callable[[str], Path], tmp_path: Path) -> None:
    for name, (steps, scale) in {"sd": (50, 7.5), "dit": (50, 4.0), "flux": (28, 3.5)}.items():
        cache = parsed(runs.init(saved(name)))["cache"]
        assert (cache["steps"], cache["guidance_scale"]) == (steps, scale)


def test_a_recipe_is_laid_over_it(saved: Callable[[str], Path], tmp_path: Path) -> None:
    text = runs.init(saved("sd3"), recipe="sd3-half-depth")
    values = parsed(text)
    assert values["student"]["spec"] == "half_depth" and values["train"]["steps"] == 100_000
    assert values["objective"]["feature_distance"] == "normalized_mse"
    assert "Recipe sd3-half-depth" in text
    with pytest.raises(InputError, match=r"recipe: expected one of .*, got 'sd3-half' \(did you mean sd3-half-depth"):
        runs.init(saved("sd3"), recipe="sd3-half")
    with pytest.raises(InputError, match=r"recipe: expected one for a sd3 model, .*, got sd15-bk-base, for unet"):
        runs.init(saved("sd3"), recipe="sd15-bk-base")


@pytest.mark.parametrize(
    "name", quickly(sorted(file.stem for file in RECIPES.glob("*.yaml")), "sd15-bk-tiny", "dit-xl2-half-depth")
)
def test_a_recipe_fits_the_published_model(name: str) -> None:
    values: dict[str, Any] = parsed((RECIPES / f"{name}.yaml").read_text())
    family = family_named(values.pop("family"))
    config = from_mapping(runs.RunConfig, values)
    spec = student_spec_of(config.student, bool(family.blocks))
    real = next(real for prefix, real in OF_REAL.items() if name.startswith(prefix))
    student = make_student(teacher(real), spec)
    own, theirs = (sum(p.numel() for p in model.parameters()) for model in (student.model, teacher(real)))
    assert own < theirs or (config.student.spec == "whole" and config.objective.guidance.schedule is not None)
    assert runs.recipes()[name].count("(arXiv") >= 1
