# SPDX-License-Identifier: Apache-2.0
"""Configuration: all errors are reported at once, and YAML is read back unchanged."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fastdistill.errors import InputError
from fastdistill.runs import RunConfig
from fastdistill.tasks.digits.config import DigitsConfig
from fastdistill.tasks.digits.teacher import TeacherConfig
from fastdistill.train.config import TrainConfig, from_mapping, from_yaml, to_yaml, validated


@pytest.mark.parametrize("kind", [TrainConfig, DigitsConfig, TeacherConfig, RunConfig])
def test_defaults_are_valid_and_yaml_reads_back(kind: type, tmp_path: Path) -> None:
    config = validated(kind())
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert from_yaml(kind, tmp_path / "config.yaml") == config


def test_all_problems_at_once() -> None:
    with pytest.raises(InputError) as error:
        from_mapping(DigitsConfig, {"train": {"stepz": 3, "lr": -1, "betas": [0.9, 2]}, "sead": 2, "seeds": "many"})
    lines = str(error.value).splitlines()
    assert lines[0] == "config: 5 problems"
    assert "  train.stepz: no such field (did you mean steps?)" in lines
    assert "  sead: no such field (did you mean seeds?)" in lines
    assert "  train.lr: input should be greater than 0, got -1" in lines
    assert any(line.startswith("  train.betas.1: input should be less than 1, got 2") for line in lines)
    assert any(line.startswith("  seeds: input should be a valid integer") and "'many'" in line for line in lines)


def test_an_unknown_field_with_nothing_near_shows_what_there_is() -> None:
    with pytest.raises(InputError, match=r"zzz: no such field \(its fields: steps, batch, micro_batch"):
        from_mapping(TrainConfig, {"zzz": 1})


def test_fields_that_are_not_named_keep_their_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"train": {"steps": 7}}))
    config = from_yaml(DigitsConfig, tmp_path / "c.yaml")
    assert config.train.steps == 7 and config.train.lr == DigitsConfig().train.lr != TrainConfig().lr


def test_names_of_fields_are_what_is_written(tmp_path: Path) -> None:
    """In YAML, null is not a string, and on is true."""
    (tmp_path / "c.yaml").write_text("objective: {random_conditioning: {probability: exp, null: 0.25}}")
    assert from_yaml(RunConfig, tmp_path / "c.yaml").objective.random_conditioning.null == 0.25
    (tmp_path / "c.yaml").write_text("on: 1\n3: 2\n")
    with pytest.raises(InputError, match=r"(?s)on: no such field.*3: no such field"):
        from_yaml(TrainConfig, tmp_path / "c.yaml")


def test_a_merged_field_may_be_given_anew(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: {b: {c: &c {x: 1, y: 2}, d: &d {<<: *c, x: 3}}}\ne: {<<: *d, y: 4}\n")

    @dataclass(frozen=True)
    class Free:
        a: dict[str, Any] = field(default_factory=dict)
        e: dict[str, int] = field(default_factory=dict)

    found = from_yaml(Free, tmp_path / "c.yaml")
    assert found.a["b"]["d"] == {"x": 3, "y": 2} and found.e == {"x": 3, "y": 4}


def test_numbers_in_scientific_notation(tmp_path: Path) -> None:
    """As in YAML 1.2; PyYAML alone reads 1e-4 as a string."""
    (tmp_path / "c.yaml").write_text("lr: 1e-4\neps: 1.E-8\nclip: 2e0\nweight_decay: .5e-1\nbatch: 3\n")
    config = from_yaml(TrainConfig, tmp_path / "c.yaml")
    assert (config.lr, config.eps, config.clip, config.weight_decay, config.batch) == (1e-4, 1e-8, 2.0, 0.05, 3)
    (tmp_path / "c.yaml").write_text("objective: {value: 1e-4, name: '1e-4', other: 1e-4x}\n")

    @dataclass(frozen=True)
    class Free:
        objective: dict[str, Any] = field(default_factory=dict)

    assert from_yaml(Free, tmp_path / "c.yaml").objective == {"value": 1e-4, "name": "1e-4", "other": "1e-4x"}


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("train: {lr: 1e300}", r"train.lr: input should be within float32, got 1e\+300"),
        ("preview: {guidance_scale: 4.0e38}", r"preview.guidance_scale: input should be within float32, .* 4e\+38"),
        ("train: {lr: 1e-50}", r"train.lr: input should be greater than 0 in float32, got 1e-50"),
        ("train: {betas: [0.9, 0.99999999999]}", r"train.betas.1: input should be less than 1 in float32, got 0.9999+"),
        ("student: {lora: {rank: 1000000}}", r"student.lora.rank: input should be less than or equal to 32768,.*"),
        ("train: {best: highest}", r"train.best: expected lowest .* no effect without keep_best, got highest"),
        ("train: {batch: 6, micro_batch: 4}", r"train.micro_batch: expected a divisor of batch, 6, got 4"),
        ("train: {keep_best: ''}", r"train.keep_best: input should be a text that is not empty, got ''"),
        ("directory: ' '", r"directory: input should be a text that is not empty, got ' '"),
        ("cache: {images: ''}", r"cache.images: input should be a text that is not empty, got ''"),
        ("evaluate: {prompts: ''}", r"evaluate.prompts: input should be a text that is not empty, got ''"),
        ("student: {lora: {targets: [to_q, '']}}", r"student.lora.targets.1: input should be a text that is not .*"),
        ("train: {steps: true}", r"train.steps: input should be a valid integer, got True"),
        ("train: {steps: 20.0}", r"train.steps: input should be a valid integer, got 20.0"),
        ("train: {steps: 4e5}", r"train.steps: input should be a valid integer, got 400000.0"),
        ("train: {lr: '1e-4'}", r"train.lr: input should be a valid number, got '1e-4'"),
        ("train: {lr: true}", r"train.lr: input should be a valid number, got True"),
        ("train: {betas: [0, false]}", r"train.betas.1: input should be a valid number, got False"),
        ("train: {fuse: 1}", r"train.fuse: input should be a valid boolean, got 1"),
        ("train: {fuse: 'yes'}", r"train.fuse: input should be a valid boolean, got 'yes'"),
        ("seed: 010", r"seed: input should be a valid integer.*, got '010'"),
        ("preview: {prompts: true}", r"preview.prompts: input should be a valid integer, got True"),
        ("cache: {guidance: true}", r"cache.guidance: input should be a valid number, got True"),
        ("cache: {sizes: [[32, 1:04]]}", r"cache.sizes.0.1: input should be a valid integer.*, got '1:04'"),
        (
            "objective: {random_conditioning: {parameters: {lambda: true}}}",
            r"objective.random_conditioning.parameters.lambda: input should be a valid number, got True",
        ),
    ],
)
def test_numbers_and_switches_are_what_is_written(text: str, got: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=rf"1 problem\n  {got}$"):
        from_yaml(RunConfig, tmp_path / "c.yaml")


def test_texts_that_may_be_empty() -> None:
    """The null prompt among texts to preview, and defaults."""
    made = from_mapping(RunConfig, {"preview": {"every": 1, "prompts": ["", "a cat"]}})
    assert made.preview.prompts == ("", "a cat") and made.teacher == ""


@pytest.mark.parametrize("kind", [TrainConfig, DigitsConfig, TeacherConfig, RunConfig])
def test_no_text_is_empty(kind: Any) -> None:
    names = [name for name, value in dataclasses.asdict(kind()).items() if isinstance(value, str) and value]
    for name in names:
        with pytest.raises(InputError, match=f"{name}: input should be"):
            validated(dataclasses.replace(kind(), **{name: ""}))


def test_numbers_in_code() -> None:
    """Numbers of NumPy are valid too; a whole number is valid as a float, and 6.5 as the text of a schedule."""
    made = validated(TrainConfig(lr=np.float64(0.5), clip=1, seed=2**63 - 1))
    assert (made.lr, made.clip, made.seed) == (0.5, 1.0, 2**63 - 1)
    assert from_mapping(RunConfig, {"objective": {"guidance": {"schedule": 6.5}}}).objective.guidance.schedule == "6.5"
    with pytest.raises(
        InputError, match=r"2 problems\n  steps: .* integer, got True\n  gradient_checkpointing: .*got 0"
    ):
        validated(TrainConfig(steps=True, gradient_checkpointing=0))  # type: ignore[arg-type]


def test_what_is_no_mapping_or_path() -> None:
    for value in (None, 3, "x", [1]):
        with pytest.raises(InputError, match=r"config: expected a mapping of fields, got"):
            from_mapping(TrainConfig, value)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"config: expected the path of a file or directory, got 3"):
        from_yaml(TrainConfig, 3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"config: 1 problem\n  lr: input should be a valid number, got Tensor$"):
        validated(TrainConfig(lr=torch.zeros(30)))  # type: ignore[arg-type]


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config: expected a readable YAML file, got .*nothing\.yaml"):
        from_yaml(TrainConfig, tmp_path / "nothing.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match="expected a mapping of fields, got list"):
        from_yaml(TrainConfig, tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(InputError, match=r"config: expected YAML, got .*broken.yaml: expected .* in line 2, column 1$"):
        from_yaml(TrainConfig, tmp_path / "broken.yaml")
    for text, got in (
        ("steps: 3\nlr: 1\nsteps: 4\n", "steps is there a second time in line 3, column 1"),
        ("preview: {every: 3, every: 3}\n", "every is there a second time in line 1, column 21"),
        ("a: &a {b: 1}\nc: {<<: *a, b: 2, b: 3}\n", "b is there a second time in line 2, column 19"),
        ("seed: " + "9" * 5000, "ValueError: Exceeds the limit .*"),
        ("seed: 2026-13-45", "ValueError: month must be in 1..12.*"),
        ("a: " + "[" * 3000, "RecursionError: .*"),
    ):
        (tmp_path / "broken.yaml").write_text(text)
        with pytest.raises(InputError, match=rf"config: expected YAML, got .*broken.yaml: {got}$"):
            from_yaml(TrainConfig, tmp_path / "broken.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xf9")
    with pytest.raises(InputError, match=r"expected YAML in UTF-8, got .*bytes.yaml: invalid start byte at byte 3$"):
        from_yaml(TrainConfig, tmp_path / "bytes.yaml")


def test_a_field_of_several_kinds_is_one_line() -> None:
    """The message shows the field as in the file, without pydantic's names of the kinds."""
    with pytest.raises(InputError, match=r"1 problem\n  preview.prompts: .* integer, .*, or .* tuple, got 'x'$"):
        from_mapping(TrainConfig, {"preview": {"prompts": "x"}})
    with pytest.raises(InputError, match=r"1 problem\n  micro_batch: .* greater than or equal to 1, got 0$"):
        from_mapping(TrainConfig, {"micro_batch": 0})
    with pytest.raises(InputError, match=r"1 problem\n  preview.seeds.0: input should be greater than .* 0, got -1$"):
        from_mapping(TrainConfig, {"preview": {"seeds": [-1]}})
    with pytest.raises(InputError, match=r"1 problem\n  betas.1: input should be less than 1, got 2$"):
        from_mapping(TrainConfig, {"betas": [0, 2]})


def test_settings_of_the_other_average() -> None:
    """Refused, unless they are a task's defaults."""
    rule = "(its default), as it has no effect with ema_schedule"
    with pytest.raises(InputError, match=re.escape(f"  ema_width: expected 0.1 {rule} constant, got 0.2")):
        validated(TrainConfig(ema_width=0.2))
    with pytest.raises(InputError, match=re.escape(f"  train.ema_decay: expected 0.9999 {rule} power, got 0.9")):
        from_mapping(RunConfig, {"train": {"ema_schedule": "power", "ema_decay": 0.9}})
    assert validated(TrainConfig(ema_schedule="power", ema_width=0.2)).ema_width == 0.2
    own = DigitsConfig()
    assert own.train.ema_decay != TrainConfig.ema_decay
    train = dataclasses.replace(own.train, ema_schedule="power")
    assert validated(dataclasses.replace(own, train=train)).train.ema_decay == TrainConfig.ema_decay
    assert from_mapping(DigitsConfig, {"train": {"ema_schedule": "power"}}).train.ema_decay == TrainConfig.ema_decay


def test_counts_that_no_run_has() -> None:
    """Tables and rows of this size would need all memory."""
    many = 10**20
    values = {"train": {"steps": many, "ahead": many}, "evaluate": {"images_per_prompt": many}}
    fields = (
        r"\n  train.steps: .*\n  train.ahead: .*\n  evaluate.images_per_prompt: .* less than or equal to 1048576, got"
    )
    with pytest.raises(InputError, match="3 problems" + fields):
        from_mapping(RunConfig, values)


def test_out_of_range_values_in_code() -> None:
    with pytest.raises(InputError, match=r"config: 2 problems\n  steps: .*\n  ema_decay: "):
        validated(TrainConfig(steps=0, ema_decay=1.0))


@pytest.mark.parametrize("text", ["1e-3", "010", "1:30", "null", "on", "0x1F", ".inf", "2020-01-01", "1_000", "é"])
def test_a_text_that_looks_like_something_else_stays_a_text(tmp_path: Path, text: str) -> None:
    path, config = tmp_path / "run.yaml", RunConfig(directory=text, device="cpu")
    path.write_text(to_yaml(config))
    assert from_yaml(RunConfig, path) == config


@pytest.mark.parametrize("text", ["!!timestamp x", "!!bool x", "!!int x", "!!binary x", "!!float x", "2020-13-45"])
def test_a_value_that_is_none_of_its_tag(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"directory: {text}\n")
    with pytest.raises(InputError, match=r"^config: expected YAML, got .*run\.yaml: "):
        from_yaml(RunConfig, path)


def test_aliases_stand_for_no_more_than_a_message_holds(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 20)]
    for text, words in (("\n".join(lines), "more than 100000 values"), ("lr: &a [*a]", "a part of itself")):
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            from_yaml(TrainConfig, path)
    path.write_text("preview: &a {every: 3}\n")
    assert from_yaml(TrainConfig, path).preview.every == 3
