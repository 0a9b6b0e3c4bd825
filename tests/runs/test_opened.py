# SPDX-License-Identifier: Apache-2.0
"""A run file is checked before anything is loaded or written."""

from __future__ import annotations

import dataclasses
import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistill import runs
from fastdistill.errors import FastdistillError, InputError, StorageError
from fastdistill.models import BLOCK_SPECS, SPECS, BlockSpec, StudentSpec
from fastdistill.runs.student import student_spec_of
from tests.models import tiny_pipelines as tiny
from tests.runs.conftest import quickly, run_config


@pytest.mark.parametrize("name", quickly(tiny.PIPELINES, "sd", "dit"))
def test_every_family_opens(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    run = runs.opened(run_config(saved(name), tmp_path))
    assert run.config.device == "cpu" and run.teacher_dtype == torch.float32
    assert run.pool == runs.Pool(["a cat", "a dog", "two cats", "a red bird", "the sea"], 3)
    assert run.sizes == (None,) and run.latents_place() == tmp_path / "cache" / "latents"
    assert not (tmp_path / "cache").exists() and not (tmp_path / "run").exists()


def rolling(every: int, steps: int = 20, **objective: Any) -> dict[str, Any]:
    return {"objective": {"random_conditioning": {"rolling": {"every": every, "steps": steps}}, **objective}}


def conditioned(**options: Any) -> dict[str, Any]:
    return {"objective": {"random_conditioning": options}}


def guided(schedule: str | None = "1", objective: Any = None, **options: Any) -> dict[str, Any]:
    own = {name: options.pop(name) for name in ("min_snr_gamma",) if name in options}
    return {"objective": {"guidance": {"schedule": schedule, **options}, **own, **(objective or {})}}


def regions(**objective: Any) -> dict[str, Any]:
    return {"objective": {"random_conditioning": {"regions": {"count": 2}}, **objective}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": ""}, "teacher: expected a pipeline folder of diffusers, got none"),
        ({"family": "unit"}, r"family: expected auto, or unet, which .* holds, got unit \(families: unet, .*call\)"),
        ({"family": "sd3"}, "family: expected auto, or unet, which .* holds, got sd3$"),
        ({"call": "my_model:call"}, "call: expected no code of your own unless .*--allow-code.*, got call of my_model"),
        ({"call": "my_model"}, "call: expected module:function, got 'my_model'"),
        ({"cache": {"sizes": [[32, 31]]}}, "^cache.sizes: width: expected a multiple of 2 pixels, got 31"),
        ({"cache": {"sizes": [[16, 16], [32, 16], [16, 16]]}}, r"cache.sizes: expected different sizes, .* got \(\("),
        ({"cache": {"sizes": [[2**40, 16]]}}, "cache.sizes: height: expected at most 65,536 pixels, got 1099511627776"),
        ({"student": {}}, "student: expected one of spec, .*, got none"),
        ({"student": {"spec": "bk_small", "lora": {"rank": 4}}}, "student: .*, got spec and lora.rank .*spec null"),
        ({"cache": {"steps": 1001}}, r"cache.steps: expected at most the 1000 timesteps of the scheduler .*, got 1001"),
        ({"cache": {"steps": 1000}}, r"cache.steps: .* timesteps up to 999, got 1000, .* 1000 \(steps_offset 1\)"),
        ({"preview": {"every": 1, "steps": 5000}}, "preview.steps: expected at most the 1000 timesteps .*, got 5000"),
        ({"evaluate": {"steps": 5000}}, "evaluate.steps: expected at most the 1000 timesteps of .*, got 5000"),
        ({"student": {"lora": {"rank": 4}}}, "objective.weights.task: expected above 0 for a student with adapters"),
        ({"student": {"spec": "bk_smal"}}, "student.spec: expected one of bk_base, bk_small, .*, got 'bk_smal'"),
        ({"student": {"every": 2}}, r"student.every: expected none, as the teacher is a U-Net \(spec\), got 2"),
        ({"student": {"channels": [4, 4, 4, 4, 4]}}, "^student.channels: expected one value for each of 2 stages"),
        ({"student": {"spec": "bk_small", "lora": {"alpha": 8.0}}}, "^student.lora.rank: expected a number, as other"),
        ({"student": {"width": 0.001}}, "^student.width: expected one and the same part of the teacher"),
        (rolling(3), r"rolling.every: expected a divisor of train.batch, 4, got 3"),
        (rolling(4) | {"train": {"micro_batch": 2}}, "a divisor of train.micro_batch, 2, got 4"),
        (rolling(2, steps=1001), "random_conditioning.rolling.steps: expected at most the 1000 timesteps .*, got 1001"),
        (rolling(2) | {"cache": {"sizes": [[16, 16], [32, 16]]}}, "expected none for latents of several sizes"),
        (rolling(2, weights={"task": 1.0}), "objective.weights.task: expected 0 with rolling states, .*, got 1.0"),
        (rolling(2, guidance={"schedule": "4"}), "expected none with objective.guidance.schedule"),
        (regions() | {"cache": {"encodings": "on_demand"}}, r"regions.count: .* \(cache.encodings: stored\), got on"),
        (regions() | {"cache": {"read": "disk"}}, r"regions.count: expected none .* \(cache.read: memory\), got d"),
        (regions() | {"train": {"banks": "pinned"}}, r"regions.count: .* \(train.banks: device\), got pinned"),
        (regions() | {"cache": {"sizes": [[16, 16], [32, 16]]}}, "regions.count: expected none for latents of several"),
        (regions(weights={"output": 0.0}), "objective.weights.output: expected above 0 with regions, .*, got 0.0"),
        (
            conditioned(probability="measured", parameters={"rate": 5.0}),
            r"^objective.random_conditioning.parameters: p\(t\) measured: expected parameters among poi",
        ),
        (
            conditioned(probability="const", parameters={"value": 2.0}),
            r"^objective.random_conditioning.parameters: p\(t\) const: expected probabilities, within .*, got 2.0",
        ),
        (conditioned(probability="expp"), "^objective.random_conditioning.probability: expected .*; did you mean exp"),
        (conditioned(rolling={"null": 0.5}), "^objective.random_conditioning.rolling.every: expected a number, as ot"),
        (
            conditioned(probability="const", regions={"count": 2}),
            "^objective.random_conditioning.regions.count: expected None, as no prompt is drawn at random: .*, got 2",
        ),
        ({"objective": {"min_snr_gamma": 4.0}}, "^objective.min_snr_gamma: expected its default 5.0 where"),
        (guided(min_snr_gamma=4.0), "^objective.min_snr_gamma: expected its default 5.0, as the loss has no weight"),
        (
            guided(schedule="1", weight_limit=2.0, objective={"loss_weighting": "snr"}),
            "^objective.guidance.weight_limit: expected its default 5.0, as the loss has the weighting snr, got 2.0",
        ),
        (guided(schedule=None, weight_limit=2.0), "^objective.guidance.schedule: expected one, beside .* or weight_li"),
        (guided(schedule="1e300"), r"^objective.guidance.schedule: expected a weight within float32, got 1e\+300"),
        (guided(schedule="power:1e300^1"), "^objective.guidance.schedule: expected a weight within float32, got 1e"),
        (guided(schedule="linear:0+3e38"), r"^objective.guidance.schedule: .* within float32 at every level \(linear"),
        (guided(schedule="1e30", scale=[0, 1e30]), r"^objective.guidance.scale: .*, up to 1e\+30, are within float32"),
        ({"cache": {"guidance": "1e300", "guidance_scale": None}}, "^cache.guidance: expected a weight within float32"),
        ({"train": {"teacher_null_once": True}}, "^train.teacher_null_once: .* there is no objective.guidance.sched"),
        (guided() | {"train": {"teacher_null_once": True}}, "^train.teacher_null_once: .*, and train.fuse is false"),
        (rolling(2) | {"train": {"teacher_ahead": True}}, "^train.teacher_ahead: .*, and the states of the next step"),
        (regions() | {"train": {"teacher_ahead": True}}, "^train.teacher_ahead: .*, and the prompts of the next step"),
        (
            {"cache": {"sizes": [[16, 16], [32, 16]]}, "train": {"teacher_ahead": True}},
            "^train.teacher_ahead: expected false, got true, and there are latents of several shapes",
        ),
        ({"train": {"teacher_fp8": True}}, "^teacher: expected a transformer of .*, for float8, got UNet"),
    ],
)  # fmt: skip
def test_what_does_not_fit(changes: dict[str, Any], message: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        runs.opened(run_config(saved("sd"), tmp_path, **changes))


def test_values_that_are_none(saved: Callable[[str], Path], tmp_path: Path) -> None:
    config = run_config(saved("sd"), tmp_path)
    with pytest.raises(InputError, match=r"run: 1 problem\n  train.lr: input should be greater than 0, got -1"):
        runs.opened(dataclasses.replace(config, train=dataclasses.replace(config.train, lr=-1)))


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="expected a pipeline folder of diffusers, got no folder"):
        runs.opened(run_config(tmp_path / "nothing", tmp_path))
    with pytest.raises(InputError, match=r"config: expected a RunConfig \(fastdistill.runs.load reads"):
        runs.opened({"teacher": "x"})  # type: ignore[arg-type]


def test_paths_are_named_by_their_field(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing, table = tmp_path / "nothing", tmp_path / "p.csv"
    table.write_text("a,b\n1,2\n")
    with pytest.raises(StorageError, match=r"^teacher: .*nothing: expected a pipeline folder"):
        runs.opened(run_config(nothing, tmp_path))
    once = runs.opened(run_config(saved("sd"), tmp_path))

    def opened(config: runs.RunConfig, **options: Any) -> runs.Run:
        return dataclasses.replace(once, config=config)

    for field, rule, changes in (
        ("prompts.file", "could not be read", {"prompts": {"file": str(nothing)}}),
        ("prompts.column", "expected the name of", {"prompts": {"file": str(table)}}),
        (
            "cache.images",
            "expected a folder",
            {"prompts": {"seen": None}, "cache": {"images_per_prompt": 1, "images": str(nothing)}},
        ),
    ):
        with pytest.raises(FastdistillError, match=rf"^{field}: .*{rule}"):
            _ = opened(run_config(saved("sd"), tmp_path, **changes)).pool
    monkeypatch.setattr(importlib.import_module("fastdistill.runs.evaluate"), "opened", opened)
    for field, others in (
        ("features", {}),
        ("reference", {}),
        ("prompts", {}),
        ("clip", {"metrics": ["clip"]}),
        ("inception", {"metrics": ["fid"]}),
    ):
        with pytest.raises(StorageError, match=rf"^evaluate\.{field}: .*nothing: "):
            runs.evaluate(run_config(saved("sd"), tmp_path, evaluate={field: str(nothing), **others}))


def test_a_model_of_the_hub(saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its local copy is used; without a copy and without a connection, the message states both."""
    hub = tmp_path / "hub"
    snapshot = hub / "models--someone--tiny-sd" / "snapshots" / "0123"
    shutil.copytree(saved("sd"), snapshot)
    (hub / "models--someone--tiny-sd" / "refs").mkdir()
    (hub / "models--someone--tiny-sd" / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_OFFLINE", True)
    run = runs.opened(dataclasses.replace(run_config(saved("sd"), tmp_path), teacher="someone/tiny-sd"))
    assert run.pipeline.path == snapshot
    with pytest.raises(
        StorageError, match=r"someone/other: expected a pipeline folder, or a model of the Hub, got nei"
    ):
        runs.opened(dataclasses.replace(run_config(saved("sd"), tmp_path), teacher="someone/other"))


def test_more_seen_prompts_than_there_are(saved: Callable[[str], Path], tmp_path: Path) -> None:
    run = runs.opened(run_config(saved("sd"), tmp_path, prompts={"seen": 6}))
    with pytest.raises(InputError, match=r"prompts\.seen: expected at most the 5 prompts that there are, got 6"):
        _ = run.pool


def test_more_latents_than_draws_can_number(saved: Callable[[str], Path], tmp_path: Path) -> None:
    message = r"cache\.images_per_prompt: expected at most 1,431,655,765 of each of the 3 seen prompts, got 1431655766"
    with pytest.raises(InputError, match=message):
        runs.cache(run_config(saved("sd"), tmp_path, cache={"images_per_prompt": 2**32 // 3 + 1}))
    with pytest.raises(StorageError, match="free disk space"):
        runs.cache(run_config(saved("sd"), tmp_path, cache={"images_per_prompt": 2**32 // 3}))
    assert not (tmp_path / "cache" / "latents").exists()


def test_classes_need_no_file(saved: Callable[[str], Path], tmp_path: Path) -> None:
    run = runs.opened(run_config(saved("dit"), tmp_path, prompts={"file": None, "seen": None}))
    assert run.pool == runs.Pool(["white cat", "dog"], 2)
    run = runs.opened(run_config(saved("sd"), tmp_path, prompts={"file": None}))
    with pytest.raises(InputError, match=r"prompts\.file: expected a file of prompts, got none"):
        _ = run.pool


def test_call(saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_of_mine.py").write_text("def call(model, x_t, timestep, rows):\n    return 3\n")
    monkeypatch.chdir(tmp_path)
    config = run_config(saved("sd"), tmp_path, call="module_of_mine:call")
    run = runs.opened(config, allow_code=True)
    assert run.call is not None and run.call(None, None, None, None) == 3  # type: ignore[arg-type]
    with pytest.raises(InputError, match="call: expected a function cal of module_of_mine, got None"):
        runs.opened(dataclasses.replace(config, call="module_of_mine:cal"), allow_code=True)


@pytest.mark.parametrize(
    ("settings", "transformer", "spec"),
    [
        ({"spec": "bk_tiny"}, False, SPECS["bk_tiny"]),
        ({"width": 0.5}, False, StudentSpec(width=0.5)),
        ({"channels": (24, 48)}, False, StudentSpec(block_out_channels=(24, 48))),
        ({"spec": "half_depth"}, True, BLOCK_SPECS["half_depth"]),
        ({"every": 3, "width": 0.5}, True, BlockSpec(every=3, width=0.5)),
        ({"blocks": (0, 5)}, True, BlockSpec(blocks=(0, 5))),
        ({"width": 0.5}, True, BlockSpec(width=0.5)),
        (
            {"lora": runs.LoraSettings(rank=4, targets=("to_q",))},
            True,
            {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["to_q"]},
        ),
    ],
)
def test_students(settings: dict[str, Any], transformer: bool, spec: object) -> None:
    assert student_spec_of(runs.StudentSettings(**settings), transformer) == spec
