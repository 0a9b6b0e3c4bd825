# SPDX-License-Identifier: Apache-2.0
"""The task as the teacher of a run: the same functions as for a pipeline folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from fastdistill import runs
from fastdistill.diffusion.sampler import ddim, initial_noise
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.errors import InputError, StorageError
from fastdistill.runs import RunConfig
from fastdistill.tasks.digits import data
from fastdistill.tasks.digits.sampling import SCHEDULE, Sampling
from fastdistill.tasks.digits.text_encoder import encode, prompt_bank
from fastdistill.train.config import from_mapping
from fastdistill.train.yaml_text import parsed
from tests.harness import EPS
from tests.processes import once


def run_config(place: Path, **changes: Any) -> RunConfig:
    """The run file that ``init`` writes, for a small run in ``place``; ``changes`` by section."""
    values = parsed(runs.init("task:digits"))
    small: dict[str, Any] = {
        "directory": str(place / "run"),
        "device": "cpu",
        "cache": {"directory": str(place / "cache"), "images_per_prompt": 1, "steps": 1},
        "student": {"channels": [8, 16]},
        "train": {"steps": 2, "batch": 4, "warmup": 0, "log_every": 1, "fuse": False},
        "preview": {"every": None},
        "evaluate": {"prompts": 2, "steps": 1},
    }
    for given in (small, changes):
        for name, value in given.items():
            values[name] = {**values[name], **value} if isinstance(value, dict) else value
    return from_mapping(RunConfig, values)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    def make(place: Path) -> None:
        config = run_config(place)
        runs.cache(config)
        runs.distill(config)

    return run_config(once(tmp_path_factory, "digits-run", make))


def test_the_run_file() -> None:
    """``init`` writes the settings of the experiment."""
    config = from_mapping(RunConfig, parsed(runs.init("task:digits")))
    run = runs.opened(dataclasses.replace(config, device="cpu"))
    assert run.pool.seen == 48 and len(run.pool.texts) == 80
    assert run.pool.texts[:48] == [prompt.text for prompt in data.PROMPTS if prompt.seen]
    assert len(run.prompt_index) == 1536 and config.train.steps == 1500
    with pytest.raises(InputError, match="teacher: expected one of task:digits, got 'task:cats'"):
        runs.init("task:cats")


def test_from_the_task_to_a_model(ended: RunConfig, tmp_path: Path) -> None:
    files = runs.sample(ended, ["a red seven", "white"], tmp_path / "images", seeds=(0, 1), steps=1)
    assert [Image.open(file).size for file in files] == [(8, 8)] * 4
    folder = runs.export(ended, tmp_path / "student", dtype="float16")
    model = UNet2DConditionModel.from_pretrained(folder)
    for key, value in runs.trained_student(runs.opened(ended)).state_dict().items():
        assert torch.equal(model.state_dict()[key], value.half().float()), key
    assert 'UNet2DConditionModel.from_pretrained("this folder")' in (folder / "README.md").read_text()
    runs.export(ended, folder, overwrite=True)
    with pytest.raises(InputError, match="link: expected False, as of the digits task a model alone is exported"):
        runs.export(ended, tmp_path / "linked", link=True)
    with pytest.raises(InputError, match=r"to: expected a model folder to overwrite, got .* without config.json"):
        runs.export(ended, tmp_path / "images", overwrite=True)
    with pytest.raises(InputError, match="words of a, red"):
        runs.sample(ended, ["a red cat"], tmp_path / "cats")
    assert not (tmp_path / "linked").exists() and not (tmp_path / "cats").exists()


def test_it_is_planned(ended: RunConfig) -> None:
    plan = runs.plan(ended, card="h100")
    assert plan.memory["teacher"] == 4 * 984_867
    assert plan.disk["latents"] == 48 * (4 * 3 * 8 * 8 + 8)


def test_it_is_evaluated(ended: RunConfig) -> None:
    report = runs.evaluate(ended)
    assert report["teacher"]["parameters"] == 984_867 and report["sampling"]["pixels"] == "8 x 8"
    assert [prompt["seen"] for prompt in report["prompts"]] == [False, False]
    assert (Path(ended.directory) / "evaluation" / "report.html").exists()


def test_adapters(ended: RunConfig, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    changes: dict[str, Any] = {
        "cache": {"directory": ended.cache.directory},
        "student": {"channels": None, "init": "teacher", "lora": {"rank": 2}},
        "objective": {"weights": {"task": 1.0, "feature": 0.0}},
    }
    config = run_config(tmp_path, **changes)
    runs.distill(config)
    card = (runs.export(config, tmp_path / "adapters") / "README.md").read_text()
    assert 'model = load_teacher()\nmodel.load_lora_adapter("this folder")' in card


def test_prompts_are_the_shipped_embeddings(ended: RunConfig) -> None:
    """Other words are encoded with the task's encoder."""
    pipeline, shipped = runs.opened(ended).pipeline, prompt_bank()
    bank = pipeline.encode([" A red  seven", "seven"])
    assert torch.equal(bank.embeddings[0], shipped.embeddings[7]) and torch.equal(bank.null, shipped.null)
    assert torch.equal(bank.embeddings[1], encode(["seven"])[0])


def test_sampling_is_ddim_with_the_noise_of_the_clipped_image(ended: RunConfig) -> None:
    """At the noise levels of the task, except for rounding in float32 of a product of 1000 numbers."""
    run, rows = runs.opened(ended), torch.tensor([3, 40, 77])
    schedule = run.pipeline.schedule()
    assert isinstance(schedule, NoiseSchedule)
    assert float((schedule.alphas_cumprod / SCHEDULE.alphas_cumprod - 1).abs().max()) <= 1000 * EPS
    model, bank, few = run.pipeline.model(), prompt_bank(), Sampling(steps=4)
    noise = initial_noise(5, rows, data.SHAPE)
    options = {"steps": few.steps, "guidance_scale": few.guidance_scale, "clip_sample": few.clip_sample}

    def direct(dtype: torch.dtype) -> torch.Tensor:
        prompts, null = bank.embeddings[rows].to(dtype), bank.null.to(dtype)
        return ddim(model.to(dtype), noise.to(dtype), prompts, null, schedule, **options).double()

    found = run.pipeline.sample(model, bank, rows, rows, steps=few.steps, guidance_scale=few.guidance_scale, seed=5)
    alike, truth = direct(torch.float32), direct(torch.float64)
    rounding = max(2 * float((alike - truth).abs().max()), 4 * EPS * float(truth.abs().max()))
    assert float((found.double() - truth).abs().max()) <= rounding


def test_runs_of_several_seeds_share_a_cache(ended: RunConfig, tmp_path: Path) -> None:
    """With ``cache.seed``; without it, another seed needs another cache."""
    other = dataclasses.replace(ended, seed=1, directory=str(tmp_path / "other"))
    with pytest.raises(StorageError, match=r"latents: made differently \(seed: expected 1, got 0\)"):
        runs.cache(other)
    assert runs.cache(dataclasses.replace(other, cache=dataclasses.replace(other.cache, seed=0))).made == 0
