# SPDX-License-Identifier: Apache-2.0
"""The complete way: from a pipeline folder to an exported student with which a pipeline of diffusers samples."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from fastdistill import runs
from fastdistill.cli import main
from fastdistill.errors import InputError, StorageError
from fastdistill.runs import RunConfig
from fastdistill.train import checkpoint
from fastdistill.train.config import to_yaml
from fastdistill.train.metrics import read_metrics
from tests import small
from tests.models import tiny_pipelines as tiny
from tests.runs.conftest import cached, run_config

distilling: Any = importlib.import_module("fastdistill.runs.distill")
QUICK = ("sd", "sd3")
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in tiny.PIPELINES]
SMALL = {"cache": {"sizes": [[32, 32]]}}


@pytest.mark.parametrize("name", NAMES)
def test_from_a_folder_to_a_pipeline(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    config = run_config(saved(name), tmp_path, **SMALL)
    if name == "dit":
        Path(str(config.prompts.file)).write_text("dog\n3\n5\n2\n9\n")
    cached(config)
    told: list[str] = []
    result = runs.distill(config, tell=told.append)
    assert told[0].startswith("teacher: ") and told[-1].startswith("first step: eager (auto: 3 steps are too few")
    taps = [line for line in told if line.startswith("tap: ")]
    assert (
        len(taps) == sum(name.startswith("feature/") for name in result.history[0])
        and f"{len(taps)} taps carry" in told[-1]
    )
    assert result.steps == 3 and all(entry["loss"] > 0 for entry in result.history)
    files = runs.sample(config, ["3"] if name == "dit" else ["a cat"], tmp_path / "images", seeds=(0, 1))
    assert [Image.open(file).size for file in files] == [(32, 32)] * 2
    folder = runs.export(config, tmp_path / "exported", dtype="float16")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    model: Any = getattr(pipeline, runs.opened(config).pipeline.family.part)
    assert model.dtype == torch.float16
    student = runs.trained_student(runs.opened(config))
    for key, value in student.state_dict().items():
        assert torch.equal(model.state_dict()[key].float(), value.half().float()), key


def test_what_a_run_leaves(ended: tuple[RunConfig, Path]) -> None:
    config, _ = ended
    place = Path(config.directory)
    assert {"run.yaml", "metrics.jsonl", "step-00000002.safetensors", "step-00000003.safetensors"} <= {
        file.name for file in place.iterdir()
    }
    assert runs.load(place / "run.yaml") == config
    assert [file.name for file in sorted((place / "previews").iterdir())] == [
        f"step-{step:08d}.png" for step in (0, 2, 3)
    ]


def test_the_averages_are_what_is_sampled_and_exported(ended: tuple[RunConfig, Path]) -> None:
    config, _ = ended
    run = runs.opened(config)
    state = checkpoint.read(Path(config.directory) / "step-00000003.safetensors")[0].state
    averaged, last = (runs.trained_student(run, averaged=flag).state_dict() for flag in (True, False))
    assert averaged.keys() == last.keys()
    for key, value in averaged.items():
        assert torch.equal(value, state[f"optimizer.student.{key}.ema"]), key
        assert torch.equal(last[key], state[f"student.{key}"]), key
    with pytest.raises(InputError, match=r"step: expected a checkpoint of .*: 2, 3, got 7"):
        runs.trained_student(run, step=7)


@pytest.mark.parametrize("read", ["memory", "disk"])
def test_what_is_stored_is_read_once(ended: tuple[RunConfig, Path], read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(ended[0], cache=dataclasses.replace(ended[0].cache, read=read))
    files: list[Path] = []

    def counted(place: str, name: str) -> None:
        module: Any = importlib.import_module(f"fastdistill.data.{place}")
        whole = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda file, *rest, **more: (files.append(file), whole(file, *rest, **more))[1]
        )

    counted("prompt_bank", "load_attachment")
    counted("shards", "read_shard")
    counted("stored", "read_shard")
    bank, (latents,) = distilling.stored_sources(runs.opened(config))
    assert all(isinstance(rows, torch.Tensor) == (read == "memory") for rows in (bank.embeddings, latents.latents))
    assert len(files) == len(set(files)) == (3 if read == "memory" else 2)  # prompts on disk are not read


def test_a_run_goes_on(saved: Callable[[str], Path], tmp_path: Path, ended: tuple[RunConfig, Path]) -> None:
    """The bits are those of an uninterrupted run; with other settings it is refused."""
    whole = ended[0]
    parts = run_config(saved("sd"), tmp_path, cache={"directory": whole.cache.directory})

    class Enough(Exception):
        pass

    def enough(done: int, _: object) -> None:
        if done == 2:
            raise Enough

    with pytest.raises(Enough):
        runs.distill(parts, callbacks=[(1, enough)])
    runs.distill(parts)
    wanted, found = (runs.trained_student(runs.opened(config)).state_dict() for config in (whole, parts))
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    other = run_config(saved("sd"), tmp_path, cache={"directory": whole.cache.directory}, train={"lr": 0.5})
    with pytest.raises(StorageError, match="this run was started differently"):
        runs.distill(other)
    with pytest.raises(InputError, match=r"train.steps: expected at least the 3 that the run in .* has done, got 2"):
        runs.distill(dataclasses.replace(parts, train=dataclasses.replace(parts.train, steps=2)))
    assert runs.load(Path(parts.directory) / "run.yaml") == parts  # not those of the refused calls


def test_adapters_are_exported_alone(
    saved: Callable[[str], Path], tmp_path: Path, ended: tuple[RunConfig, Path]
) -> None:
    pytest.importorskip("peft")
    changes: dict[str, Any] = {
        "student": {"lora": {"rank": 2}},
        "cache": {"directory": ended[0].cache.directory},
        "train": {"lr": 0.1},
        "objective": {"weights": {"task": 1.0}},
    }
    config = run_config(saved("sd"), tmp_path, **changes)
    runs.distill(config)
    folder = runs.export(config, tmp_path / "adapters")
    assert {file.name for file in folder.iterdir()} == {"pytorch_lora_weights.safetensors", "README.md"}
    pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(saved("sd"), safety_checker=None)
    pipeline.load_lora_weights(folder)
    student = runs.trained_student(runs.opened(config))
    given = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 5, 8)
    with torch.no_grad():
        wanted, found = student(*given).sample, pipeline.unet(*given).sample
        bare = runs.opened(config).pipeline.model()(*given).sample
    assert torch.allclose(found, wanted, rtol=0, atol=16 * torch.finfo().eps * float(wanted.abs().max()))
    assert not torch.equal(bare, wanted)
    with pytest.raises(InputError, match="link: expected False for adapters"):
        runs.export(config, tmp_path / "other", link=True)


def test_an_image_depends_on_its_prompt_and_seed(ended: tuple[RunConfig, Path], tmp_path: Path) -> None:
    config, _ = ended
    runs.sample(config, ["a cat", "a dog"], tmp_path / "two", seeds=(3, 4))
    runs.sample(config, ["a dog"], tmp_path / "one", seeds=(4, 4))  # equal seeds count once
    lines = [json.loads(line) for line in (tmp_path / "two" / "metadata.jsonl").read_text().splitlines()]
    assert [(line["file_name"], line["text"], line["seed"]) for line in lines] == [
        ("00000-3.png", "a cat", 3), ("00000-4.png", "a cat", 4),
        ("00001-3.png", "a dog", 3), ("00001-4.png", "a dog", 4),
    ]  # fmt: skip
    assert len((tmp_path / "one" / "metadata.jsonl").read_text().splitlines()) == 1
    pair = [torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8).int() for file in (
        tmp_path / "two" / "00001-4.png", tmp_path / "one" / "00000-4.png")]  # fmt: skip
    assert int((pair[0] - pair[1]).abs().max()) <= 1  # rounding in a batch of two
    taught = runs.sample(config, ["a dog"], tmp_path / "taught", seeds=(4,), teacher=True)
    assert taught[0].read_bytes() != (tmp_path / "one" / "00000-4.png").read_bytes()
    for options, message in (
        ({"prompts": []}, "prompts: expected at least one, got none"),
        ({"seeds": ()}, "seeds: expected at least one, got none"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"size": (16, 33)}, "width: expected a multiple of 2 pixels, got 33"),
    ):
        arguments: dict[str, Any] = {"prompts": ["a"], "to": tmp_path / "never", **options}
        with pytest.raises(InputError, match=message):
            runs.sample(config, **arguments)
    with pytest.raises(StorageError, match="expected a new folder, got one that is there already"):
        runs.sample(config, ["a"], tmp_path / "one")
    assert not (tmp_path / "never").exists()


def test_the_card_says_what_it_is(ended: tuple[RunConfig, Path], tmp_path: Path) -> None:
    longer = dataclasses.replace(ended[0], train=dataclasses.replace(ended[0].train, steps=99))  # the current file
    folder = runs.export(longer, tmp_path / "exported", link=True)
    card = (folder / "README.md").read_text()
    head = card.split("---\n")[1]
    assert 'library_name: "diffusers"' in head and 'base_model: "sd"' in head
    assert "trained for 3 steps by fastdistill" in card and "| batch | 4 |" in card and "width: 0.5" in card
    assert "steps: 3\n" in card
    assert ended[0].directory not in card and ended[0].teacher not in card
    assert (folder / "vae").is_symlink()
    with pytest.raises(InputError, match="to: expected a folder that is not there"):
        runs.export(ended[0], tmp_path / "exported")


def test_a_checkpoint_of_another_student(ended: tuple[RunConfig, Path], saved: Callable[[str], Path]) -> None:
    config = run_config(saved("sd"), Path(ended[0].directory).parent, student={"width": 0.25, "init": "random"})
    with pytest.raises(StorageError, match=r"expected the student of the run file .*, got another one"):
        runs.export(config, "never")
    assert not Path("never").exists()


def test_nothing_is_there_yet(saved: Callable[[str], Path], tmp_path: Path) -> None:
    config = run_config(saved("sd"), tmp_path)
    with pytest.raises(StorageError, match=r"prompts: expected the encoded prompts \(fastdistill cache\), got none"):
        runs.distill(config)
    with pytest.raises(StorageError, match=r"expected a checkpoint of the run \(fastdistill distill\), got none"):
        runs.export(config, tmp_path / "exported")
    with pytest.raises(StorageError, match=r"expected a checkpoint of the run \(fastdistill distill\), got none"):
        runs.sample(config, ["a cat"], tmp_path / "images")
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_the_micro_batch_is_what_fits(
    ended: tuple[RunConfig, Path], saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same when the run is continued, whatever fits then."""
    monkeypatch.setattr(distilling.plans, "available", lambda device: 1_500_000)
    config = run_config(saved("sd"), tmp_path, cache={"directory": ended[0].cache.directory})
    runs.distill(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=1)))
    kept = runs.load(Path(config.directory) / "run.yaml").train.micro_batch
    assert kept in (1, 2)
    monkeypatch.undo()
    assert distilling.fitted(runs.opened(config))[0].config.train.micro_batch == kept


@pytest.mark.slow
def test_a_run_that_does_not_fit(
    ended: tuple[RunConfig, Path], saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distilling.plans, "available", lambda device: 100_000)
    config = run_config(saved("sd"), tmp_path, cache={"directory": ended[0].cache.directory})
    with pytest.raises(InputError, match=r"train: expected a run that fits into the .* free on cpu, got one of .*help"):
        runs.distill(config)
    assert not Path(config.directory).exists()


def test_the_student_of_a_sharded_checkpoint(again: Path, tmp_path: Path) -> None:
    """It is exported with one command from the files of three ranks, and sampled."""
    config = runs.load(again)
    whole = runs.export(config, tmp_path / "whole")
    path = Path(config.directory) / "step-00000003.safetensors"
    small.recut(path, 3)
    assert len(list(path.parent.glob("step-00000003.rank-*"))) == 2 and checkpoint.read(path)[0].step == 3
    assert main(["export", str(again), "--to", str(tmp_path / "parts")]) == 0
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "parts" / name).read_bytes() == (whole / name).read_bytes()
    assert (tmp_path / "parts" / "README.md").read_text() == (whole / "README.md").read_text()
    assert [file.suffix for file in runs.sample(config, ["a cat"], tmp_path / "images")] == [".png"]


@pytest.mark.slow
def test_a_sharded_run_of_two_processes_is_exported(
    ended: tuple[RunConfig, Path], saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """The run then continues in one process."""
    config = run_config(saved("sd"), tmp_path, cache={"directory": ended[0].cache.directory}, shard=True)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fastdistill")
    done = subprocess.run(
        [sys.executable, *launch, "distill", str(tmp_path / "run.yaml"), "--json"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert {file.name for file in Path(config.directory).glob("step-00000003*")} == {
        "step-00000003.safetensors", "step-00000003.rank-1-of-2.safetensors"
    }  # fmt: skip
    assert main(["export", str(tmp_path / "run.yaml"), "--to", str(tmp_path / "exported")]) == 0
    model = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "exported", subfolder="unet").state_dict()
    student = runs.trained_student(runs.opened(config)).state_dict()
    assert model.keys() == student.keys() and all(torch.equal(model[key], value) for key, value in student.items())
    wanted = runs.trained_student(runs.opened(ended[0])).state_dict()
    for key, value in student.items():  # updates are at most lr; the sign of a rounding error is random
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=2 * 3 * config.train.lr)
    longer = dataclasses.replace(config, shard=False, train=dataclasses.replace(config.train, steps=4))
    assert runs.distill(longer).steps == 4


@pytest.mark.slow
def test_on_two_processes(ended: tuple[RunConfig, Path], saved: Callable[[str], Path], tmp_path: Path) -> None:
    """The cache has the bytes of one process, and the loss differs only by the order of sums."""
    config = run_config(saved("sd"), tmp_path)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    for command in ("cache", "distill"):
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fastdistill")
        done = subprocess.run(
            [sys.executable, *launch, command, str(tmp_path / "run.yaml"), "--json"],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.strip().splitlines()[-1])["steps"] == 3
    for name in ("prompts", "latents"):
        shards = [
            json.loads((Path(c.cache.directory) / name / "manifest.json").read_text())["shards"]
            for c in (ended[0], config)
        ]
        assert shards[0] == shards[1] and shards[0]
    one, two = (read_metrics(Path(c.directory) / "metrics.jsonl")[0]["loss"] for c in (ended[0], config))
    count = 4 * 4 * 8 * 8  # elements of the largest mean; 4 eps for each
    assert abs(one - two) <= 4 * torch.finfo().eps * count**0.5 * one


def test_prompts_in_another_order(ended: tuple[RunConfig, Path], saved: Callable[[str], Path], tmp_path: Path) -> None:
    config = run_config(saved("sd"), tmp_path, cache={"directory": ended[0].cache.directory})
    Path(str(config.prompts.file)).write_text("a dog\na cat\ntwo cats\na red bird\nthe sea\n")
    with pytest.raises(StorageError, match="prompts: expected the 5 prompts that are encoded there, got 5, of which"):
        runs.distill(config)
    config = run_config(saved("sd"), tmp_path, cache={"directory": ended[0].cache.directory, "steps": 9})
    with pytest.raises(StorageError, match=r"latents: made differently \(sampling.steps: expected 9, got 2\)"):
        runs.distill(config)
