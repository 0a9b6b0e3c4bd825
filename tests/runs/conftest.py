# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from fastdistill import runs
from fastdistill.runs import RunConfig
from fastdistill.train.config import from_mapping, to_yaml
from tests.models import tiny_pipelines as tiny
from tests.processes import once

#: A student that is smaller than every tiny teacher.
STUDENTS = {"unet": {"width": 0.5}, "transformer": {"every": 2}}


def quickly(names: Iterable[str], *quick: str) -> list[Any]:
    """Parameters of a test; all except ``quick`` are slow tests."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the tiny pipeline with this name."""
    return tiny.saver(tmp_path_factory)


def run_config(folder: Path, directory: Path, **changes: Any) -> RunConfig:
    """A run of a few steps with this teacher, with all files in ``directory``; ``changes`` replace fields by
    section."""
    file, texts = directory / "prompts.txt", "a cat\na dog\ntwo cats\na red bird\nthe sea\n"
    if not file.exists() or file.read_text() != texts:  # another process may be reading it
        file.write_text(texts)
    values: dict[str, Any] = {
        "directory": str(directory / "run"),
        "teacher": str(folder),
        "device": "cpu",
        "prompts": {"file": str(file), "seen": 3},
        "cache": {"directory": str(directory / "cache"), "steps": 2, "guidance_scale": 2.0, "images_per_prompt": 2,
                  "dtype": "float32", "batch": 4},
        "student": STUDENTS["unet" if (folder / "unet").exists() else "transformer"],
        "train": {"steps": 3, "batch": 4, "log_every": 1, "checkpoint_every": 2},
    }  # fmt: skip
    for name, value in changes.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) and name != "student" else value
    return from_mapping(RunConfig, values)


def cached(config: RunConfig) -> RunConfig:
    """Encode the prompts and sample the teacher; returns the configuration."""
    runs.cache(config)
    return config


@pytest.fixture(scope="session")
def ended(saved: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A run of Stable Diffusion that has ended, and its run file."""

    def make(place: Path) -> None:
        place.mkdir()
        preview = {"every": 2, "prompts": ["a cat", "no prompt of the pool"]}
        config = cached(run_config(saved("sd"), place, preview=preview))
        runs.distill(config)
        (place / "run.yaml").write_text(to_yaml(config))

    place = once(tmp_path_factory, "ended", make)
    return runs.load(place / "run.yaml"), place / "run.yaml"


@pytest.fixture
def again(ended: tuple[RunConfig, Path], tmp_path: Path) -> Path:
    """The run file of a copy of that run, for tests that go on with it: a process at a time may."""
    config = dataclasses.replace(ended[0], directory=str(tmp_path / "again"))
    shutil.copytree(ended[0].directory, config.directory)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    return tmp_path / "run.yaml"
