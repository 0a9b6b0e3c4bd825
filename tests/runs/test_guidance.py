# SPDX-License-Identifier: Apache-2.0
"""Models that read the guidance scale themselves get it with the prompt, and no guidance besides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastdistill import runs
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


@pytest.mark.parametrize(("name", "wanted"), [("lcm", 1.0), ("sd", 2.0)])
def test_previews(name: str, wanted: float, saved: Saved, tmp_path: Path) -> None:
    run = runs.opened(run_config(saved(name), tmp_path, prompts={"file": None}))
    assert train_config(run, None).preview.guidance_scale == wanted  # type: ignore[arg-type]
