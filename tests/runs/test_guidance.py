# SPDX-License-Identifier: Apache-2.0
"""Guidance of a run: models that read the scale get it with the prompt and no other guidance; and schedules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdistill import runs
from fastdistill.data.manifest import read_manifest
from fastdistill.errors import FastdistillError, InputError
from fastdistill.runs.distill import train_config
from tests.runs.conftest import run_config

Saved = Callable[[str], Path]


def test_samples_are_of_the_scale_that_is_asked_for(saved: Saved, tmp_path: Path) -> None:
    config = run_config(saved("lcm"), tmp_path, cache={"sizes": [[32, 32]]})
    made = []
    for name, scale in (("run", None), ("same", 2.0), ("other", 14.0)):
        runs.sample(config, ["a cat"], tmp_path / name, teacher=True, guidance_scale=scale, steps=1)
        made.append((tmp_path / name / "00000-0.png").read_bytes())
    assert made[0] == made[1] != made[2]


def test_images_that_are_not_finite_are_not_written(saved: Saved, tmp_path: Path) -> None:
    config = run_config(saved("sd"), tmp_path)
    with pytest.raises(FastdistillError, match="sample: expected finite images, got NaN or infinity for 'a cat'"):
        runs.sample(config, ["a cat"], tmp_path / "none", teacher=True, guidance_scale=3e38, steps=2)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("name", "wanted"), [("lcm", 1.0), ("sd", 2.0)])
def test_previews(name: str, wanted: float, saved: Saved, tmp_path: Path) -> None:
    run = runs.opened(run_config(saved(name), tmp_path, prompts={"file": None}))
    assert train_config(run, None).preview.guidance_scale == wanted  # type: ignore[arg-type]


def test_a_schedule_makes_the_latents_the_previews_and_the_samples(saved: Saved, tmp_path: Path) -> None:
    window = {"guidance_scale": None, "guidance": "3@3,-1@1,0", "steps": 4}
    config = run_config(saved("sd"), tmp_path, cache=window)
    run = runs.opened(config)
    runs.cache(config)
    latents, model = run.latents(None, run.bank(), load=True), run.pipeline.model()
    options = {"steps": 4, "seed": 0}
    made = run.pipeline.sample(model, run.bank(), latents.prompt_index[:4], guidance="3@3,-1@1,0", **options)
    assert latents.latents[:4].equal(made)
    fingerprint = read_manifest(tmp_path / "cache" / "latents").fingerprint
    assert fingerprint["sampling"]["guidance"] == "3@3,-1@1,0" and "guidance_scale" not in fingerprint["sampling"]
    preview = train_config(run, None).preview  # type: ignore[arg-type]
    assert (preview.guidance, preview.guidance_scale) == ("3@3,-1@1,0", None)
    for name, scale in (("window", None), ("own", 4.0)):
        runs.sample(config, ["a cat"], tmp_path / name, teacher=True, guidance_scale=scale)
    assert (tmp_path / "window" / "00000-0.png").read_bytes() != (tmp_path / "own" / "00000-0.png").read_bytes()


@pytest.mark.parametrize(
    ("name", "cache", "message"),
    [
        (
            "sd",
            {"guidance": "2"},
            r"guidance: .* beside cache.guidance_scale 2 .*--cache.guidance-scale null, or .*got 2",
        ),
        ("lcm", {"steps": 51}, r"cache.steps: expected .*LCMScheduler.*, got 51 \(ValueError: "),
        ("lcm", {"guidance": "2", "guidance_scale": None}, "cache.guidance: expected none for models that read"),
        ("sd", {"guidance": "2@99,0", "guidance_scale": None}, "the ends of the levels, got 99 in"),
        ("sd", {"guidance": "2@", "guidance_scale": None}, "^cache.guidance: .*column 3 should be a number"),
    ],
)
def test_schedules_that_a_run_cannot_use(
    name: str, cache: dict[str, Any], message: str, saved: Saved, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        runs.cache(run_config(saved(name), tmp_path, cache=cache))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("name", "scale", "text"), [("sd", None, "6.5"), ("sd", 7.3, "6.3"), ("sd", 0.5, "0"), ("lcm", 0.5, "-0.5")]
)
def test_manifests_hold_w(name: str, scale: float | None, text: str, saved: Saved, tmp_path: Path) -> None:
    run = runs.opened(run_config(saved(name), tmp_path, cache={"guidance_scale": scale}))
    assert run.guidance_text == text  # of what leaves guidance out up to a scale of 1: 0
