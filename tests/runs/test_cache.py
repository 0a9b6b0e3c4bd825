# SPDX-License-Identifier: Apache-2.0
"""``runs.cache``: the prompts as the pipeline encodes them, the teacher's samples, and existing rows."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastdistill import files, runs
from fastdistill.data.images import load_image
from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.manifest import read_manifest
from fastdistill.errors import InputError, StorageError
from fastdistill.models.pipelines import PipelineFolder, open_pipeline
from fastdistill.models.weights import weights_hash
from tests import processes
from tests.data.caches import content
from tests.models import tiny_pipelines as tiny
from tests.runs.conftest import run_config

Saved = Callable[[str], Path]
SIZES = {"sizes": [[32, 32]]}


def configured(saved: Saved, name: str, directory: Path, **changes: Any) -> runs.RunConfig:
    cache = SIZES | changes.pop("cache", {})
    config = run_config(saved(name), directory, cache=cache, **changes)
    if name == "dit":
        (directory / "prompts.txt").write_text("tom\ndog\n12\n7\nwhite cat\n")
    return config


def whole(directory: Path) -> dict[str, dict[str, bytes]]:
    return {place.name: content(place) for place in directory.iterdir() if place.is_dir()}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("sdxl", "dit") else pytest.mark.slow) for name in tiny.PIPELINES]
)
def test_every_family(name: str, saved: Saved, tmp_path: Path) -> None:
    config = configured(saved, name, tmp_path, cache={"batch": 6})
    seen: list[tuple[str, int, int]] = []
    result = runs.cache(config, progress=lambda *done: seen.append(done))
    assert (result.texts, result.samples, result.made) == (6, 6, 12)
    assert seen[0] == ("prompts", 0, 6) and seen[-1] == ("latents 32x32", 6, 6)
    run = runs.opened(config)
    bank = run.bank(load=True)
    latents = run.latents((32, 32), bank, load=True)
    folder = open_pipeline(saved(name))
    known = folder.encode(run.pool.texts, size=(32, 32), guidance_scale=2.0)
    assert bank.banks.keys() == known.banks.keys() and bank.texts == known.texts
    teacher, index = folder.model(), torch.tensor([0, 0, 1, 1, 2, 2])
    wanted = folder.sample(teacher, bank, index, steps=2, guidance_scale=2.0, seed=0, size=(32, 32))
    assert torch.equal(latents.prompt_index, index) and torch.equal(latents.latents, wanted)
    assert latents.fingerprint["prompts"] == bank.identity
    assert latents.fingerprint["teacher"] == weights_hash(teacher, torch.bfloat16)


def test_what_is_there_is_not_made_again(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(saved, "sd", tmp_path)
    runs.cache(config)
    before = whole(tmp_path / "cache")

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("loaded")

    with monkeypatch.context() as patch:
        patch.setattr(PipelineFolder, "encoders", never)
        patch.setattr(PipelineFolder, "_loaded", never)
        assert runs.cache(config).made == 0
        runs.cache(dataclasses.replace(config, seed=config.seed), only="latents")
    assert whole(tmp_path / "cache") == before


def test_what_is_damaged_is_made_again(saved: Saved, tmp_path: Path) -> None:
    config = configured(saved, "sd", tmp_path, cache={"rows_per_shard": 2, "batch": 2})
    runs.cache(config)
    before = whole(tmp_path / "cache")
    (tmp_path / "cache" / "prompts" / "texts.json").write_text("{}")
    file = tmp_path / "cache" / "latents-32x32" / "shard-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    assert runs.cache(config, verify=False).made == 0
    with pytest.warns(UserWarning, match=r"shard-00001\.safetensors: damaged: .*being made anew"):
        assert runs.cache(config).made == 2
    assert whole(tmp_path / "cache") == before
    (tmp_path / "cache" / "prompts" / "shard-00000.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"shard-00000\.safetensors: missing.*being made anew"):
        assert runs.cache(config, only="prompts").made == 6
    assert whole(tmp_path / "cache") == before


def test_text_encoders_are_gone_before_the_teacher_comes(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders: list[weakref.ref[Any]] = []
    load, model = PipelineFolder.encoders, PipelineFolder.model

    def loaded(self: PipelineFolder, **options: Any) -> Any:
        pipeline = load(self, **options)
        encoders.append(weakref.ref(pipeline.text_encoder))
        return pipeline

    def asked(self: PipelineFolder, **options: Any) -> Any:
        if options.get("device") != "meta":
            assert [ref() for ref in encoders] == [None]
        return model(self, **options)

    monkeypatch.setattr(PipelineFolder, "encoders", loaded)
    monkeypatch.setattr(PipelineFolder, "model", asked)
    gc.disable()
    try:
        runs.cache(configured(saved, "sd", tmp_path))
    finally:
        gc.enable()
    assert encoders


def test_a_stopped_call_goes_on(saved: Saved, tmp_path: Path) -> None:
    changes = {"cache": {"rows_per_shard": 2, "batch": 2}}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    runs.cache(configured(saved, "sd", tmp_path / "a", **changes))
    config = configured(saved, "sd", tmp_path / "b", **changes)
    for stage, at in (("prompts", 0), ("latents", 0), ("latents", 2), ("latents", 4)):

        def stop(kind: str, done: int, total: int, stage: str = stage, at: int = at) -> None:
            if kind.startswith(stage) and done == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            runs.cache(config, progress=stop)
    assert sorted(read_manifest(tmp_path / "b/cache/latents-32x32").shards) == [0, 1]
    assert runs.cache(config).made == 2
    assert whole(tmp_path / "a" / "cache") == whole(tmp_path / "b" / "cache")


def test_two_processes_make_the_cache_of_one(saved: Saved, tmp_path: Path) -> None:
    changes = {"cache": {"rows_per_shard": 1, "batch": 1}}
    for name in ("alone", "shared"):
        (tmp_path / name).mkdir()
    shared = configured(saved, "sd", tmp_path / "shared", **changes)
    both = [processes.begin(runs.cache, shared) for _ in range(2)]
    runs.cache(configured(saved, "sd", tmp_path / "alone", **changes))
    for process in both:
        process.join(300)
        assert process.exitcode == 0
    assert whole(tmp_path / "shared" / "cache") == whole(tmp_path / "alone" / "cache")


def changed(folder: Path, target: Path, part: str) -> Path:
    """The pipeline with one changed value in a file of one part."""
    shutil.copytree(folder, target)
    file = next(file for file in sorted((target / part).iterdir()) if file.suffix in (".safetensors", ".json"))
    for weights in (target / part).glob("*.safetensors"):
        data = bytearray(weights.read_bytes())
        data[-2] ^= 1
        weights.write_bytes(data)
        return target
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 11}))
    return target


def test_a_cache_of_something_else_is_refused(saved: Saved, tmp_path: Path) -> None:
    config = configured(saved, "sd", tmp_path)
    runs.cache(config)
    before = whole(tmp_path / "cache")
    cache, prompts = config.cache, config.prompts
    (tmp_path / "other.txt").write_text("a dog\na cat\ntwo cats\na red bird\nthe sea\n")
    other = dataclasses.replace
    for different, message in (
        (other(config, teacher=str(changed(saved("sd"), tmp_path / "t", "unet"))), "latents-32x32: .*model: expected"),
        (other(config, teacher=str(changed(saved("sd"), tmp_path / "e", "text_encoder"))), "prompts: .*files.text_enc"),
        (other(config, teacher=str(changed(saved("sd"), tmp_path / "k", "tokenizer"))), "prompts: .*files.tokenizer"),
        (other(config, prompts=other(prompts, file=str(tmp_path / "other.txt"))), "prompts: .*prompt 0 is the first"),
        (other(config, prompts=other(prompts, seen=4)), "sampling.seen: expected 4, got 3"),
        (other(config, cache=other(cache, steps=3)), "sampling.steps: expected 3, got 2"),
        (other(config, cache=other(cache, guidance_scale=3.0)), "sampling.guidance: expected '2', got '1'"),
        (other(config, cache=other(cache, guidance_scale=None, guidance="3@1,0")), "guidance: expected '3@1,0', got"),
        (other(config, seed=1), "seed: expected 1, got 0"),
        (other(config, cache=other(cache, dtype="bfloat16")), "prompts: .*dtype of .*: expected 'bfloat16', got 'flo"),
    ):
        with pytest.raises(StorageError, match=message):
            run = runs.opened(different)
            run.latents((32, 32), run.bank())
        if different.teacher != config.teacher:
            with pytest.raises(StorageError, match=message):
                runs.cache(different)
    assert whole(tmp_path / "cache") == before
    shutil.copytree(saved("sd"), tmp_path / "elsewhere")
    assert runs.cache(other(config, teacher=str(tmp_path / "elsewhere"))).made == 0


def test_sizes_have_caches_of_their_own(saved: Saved, tmp_path: Path) -> None:
    config = configured(saved, "sdxl", tmp_path, cache={"sizes": [[32, 32], [16, 64]]})
    runs.cache(config)
    run = runs.opened(config)
    bank = run.bank(load=True)
    assert bank.banks["time_ids"].unique(dim=0).tolist() == [[32, 32, 0, 0, 32, 32]]
    folder, model = run.pipeline, run.pipeline.model()
    own = folder.encode(run.pool.texts, size=(16, 64))
    latents = run.latents((16, 64), bank, load=True)
    wanted = folder.sample(model, own, latents.prompt_index, steps=2, guidance_scale=2.0, size=(16, 64))
    bound = 64 * torch.finfo(torch.float32).eps * float(wanted.abs().max())  # texts encoded in batches of 4 and of 5
    assert latents.latents.shape == (6, 4, 8, 32) and (latents.latents - wanted).abs().max() <= bound


def test_prompts_that_are_encoded_on_demand(saved: Saved, tmp_path: Path) -> None:
    """The latents of a run do not depend on whether its prompts are stored or encoded on demand."""
    stored = configured(saved, "sdxl", tmp_path, cache={"batch": 6})
    runs.cache(stored)
    changes = {"batch": 6, "encodings": "on_demand", "directory": str(tmp_path / "on demand")}
    config = configured(saved, "sdxl", tmp_path, cache=changes)
    assert runs.cache(config).made == 6 and [p.name for p in (tmp_path / "on demand").iterdir() if p.is_dir()] == [
        "latents-32x32"
    ]
    run, other = runs.opened(config), runs.opened(stored)
    assert run.bank(load=True).identity == other.bank().identity and run.bank() is run.bank()
    found, known = (r.latents((32, 32), r.bank(), load=True) for r in (run, other))
    bound = 64 * torch.finfo(torch.float32).eps * float(known.latents.abs().max())  # texts in batches of 2 and of 5
    assert (found.latents - known.latents).abs().max() <= bound and runs.cache(config).made == 0


def test_guidance_that_the_model_reads_is_in_the_bank(saved: Saved, tmp_path: Path) -> None:
    run = runs.opened(configured(saved, "lcm", tmp_path))
    family, config = run.pipeline.family, run.pipeline.config
    assert run.encoder["options"] == {"guidance_scale": 2.0} and family.guided(config, 7.5) == 1
    plain = runs.opened(configured(saved, "sd", tmp_path))
    assert plain.encoder["options"] == {} and plain.pipeline.family.guided(plain.pipeline.config, 7.5) == 7.5
    assert plain.pipeline.family.guided(plain.pipeline.config, 0.5) == 1  # like diffusers


def test_too_small_a_disk(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(saved, "sd", tmp_path)
    row, text = 4 * 16 * 16 * 4 + 8, 12 * 8 * 4
    for free in (6 * row - 1, 6 * row + 6 * text - 1):
        monkeypatch.setattr(files.shutil, "disk_usage", lambda _, free=free: type("usage", (), {"free": free})())
        with pytest.raises(StorageError, match=r"prompts: expected [\d.,]+ \w+ of free disk space, got [\d.,]+ \w+"):
            runs.cache(config)
        assert not (tmp_path / "cache").exists()


def test_names_of_classes(saved: Saved, tmp_path: Path) -> None:
    """If two classes share a name (ImageNet has two cranes), another name or the number is used."""
    folder = tmp_path / "dit"
    shutil.copytree(saved("dit"), folder)
    config = run_config(folder, tmp_path, prompts={"file": None, "seen": None})
    names = {"0": "crane, heron", "1": "crane", "2": "fish", "10": "fish,"}
    for labels, texts in ((names, ["heron", "crane", "2", "fish"]), (None, [str(number) for number in range(1000)])):
        tiny.change(folder / "model_index.json", id2label=labels)
        run = runs.opened(config)
        assert run.pool.texts == texts
        if labels:
            rows = run.pipeline.family.encode(run.pipeline.encoders(), texts, config=run.pipeline.config)
            assert rows["class_labels"].tolist() == [0, 1, 2, 10]


def test_classes_need_no_file(saved: Saved, tmp_path: Path) -> None:
    config = configured(saved, "dit", tmp_path, prompts={"file": None, "seen": None})
    runs.cache(config)
    bank = runs.opened(config).bank(load=True)
    assert bank.texts == ["white cat", "dog"] and bank.banks["class_labels"].tolist() == [3, 7, 1000]
    latents = LatentCache.load(tmp_path / "cache" / "latents-32x32")
    assert latents.prompt_index.tolist() == [0, 0, 1, 1]
    (tmp_path / "prompts.txt").write_text("dog\ndig\n")
    (tmp_path / "new").mkdir()
    wrong = configured(saved, "dit", tmp_path, prompts={"seen": None}, cache={"directory": str(tmp_path / "new/cache")})
    (tmp_path / "prompts.txt").write_text("dog\ndig\n")
    with pytest.raises(InputError, match=r"prompts\[1\]: expected the name of a class, .*near: 'dog'.*, got 'dig'"):
        runs.cache(wrong)
    assert not (tmp_path / "new" / "cache").exists()


def pictures(directory: Path, captions: list[str]) -> Path:
    """A folder of noisy images of 40 x 64 pixels."""
    directory.mkdir()
    for number, caption in enumerate(captions):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(directory / f"{number}.png")
        (directory / f"{number}.txt").write_text(caption)
    return directory


def test_images_count_by_their_content(saved: Saved, tmp_path: Path) -> None:
    """An image with the same name and size but other content is another image; names do not count."""
    images = pictures(tmp_path / "images", ["a tree", "the sea"])
    changes: dict[str, Any] = {"cache": {"images": str(images), "images_per_prompt": 1}, "prompts": {"seen": None}}
    config = run_config(saved("sd"), tmp_path, **changes)
    before = runs.opened(config).sampling(None)["images"]
    for ending in ("png", "txt"):
        (images / f"1.{ending}").rename(images / f"1b.{ending}")
    assert runs.opened(config).sampling(None)["images"] == before
    content = (images / "0.png").read_bytes()
    (images / "0.png").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert runs.opened(config).sampling(None)["images"] != before


def test_images_in_place_of_samples(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(tmp_path / "images", ["a tree", " the sea", "a tree", "\n", "a house"])
    changes: dict[str, Any] = {"cache": {"images": str(images), "images_per_prompt": 1}, "prompts": {"seen": None}}
    config = configured(saved, "sd", tmp_path, **changes)
    model = PipelineFolder.model
    monkeypatch.setattr(PipelineFolder, "model", lambda self, device="cpu", **o: model(self, device="meta", **o))
    runs.cache(config)  # the teacher is not needed for this
    run = runs.opened(config)
    assert run.pool.texts == ["a tree", "the sea", "a house", "a cat", "a dog", "two cats", "a red bird"]
    assert (run.pool.seen, run.pool.empty, run.pool.duplicates) == (3, 1, 1)
    latents = run.latents((32, 32), run.bank(), load=True)
    assert latents.prompt_index.tolist() == [0, 1, 0, 2] and "teacher" not in latents.fingerprint
    loaded = torch.stack([load_image(images / f"{number}.png", (32, 32)) for number in (0, 1, 2, 4)])
    wanted = run.pipeline.family.to_latents(run.pipeline.autoencoder(), loaded, batch=4)
    assert torch.equal(latents.latents, wanted) and runs.cache(config).made == 0
    (images / "0.txt").write_text("a bush")
    with pytest.raises(StorageError, match="prompt 0 is the first that differs"):
        runs.cache(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": {"seen": 2}}, "prompts.seen: expected none, as there is an image of each caption .*, got 2"),
        ({"cache": {"images_per_prompt": 2}}, "cache.images_per_prompt: expected 1, as there is an image"),
        ({"cache": {"sizes": [[48, 32]]}}, r"0\.png: expected at least 48 x 32 pixels \(height x width\), got 40 x 64"),
    ],
)
def test_images_that_do_not_fit(changes: dict[str, Any], message: str, saved: Saved, tmp_path: Path) -> None:
    images = {"images": str(pictures(tmp_path / "images", ["a tree"])), "images_per_prompt": 1}
    cache, prompts = images | changes.get("cache", {}), {"seen": None} | changes.get("prompts", {})
    with pytest.raises((InputError, StorageError), match=message):
        runs.cache(configured(saved, "sd", tmp_path, cache=cache, prompts=prompts))
    assert not (tmp_path / "cache").exists()
