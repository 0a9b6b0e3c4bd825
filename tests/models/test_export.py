# SPDX-License-Identifier: Apache-2.0
"""Students in a pipeline's folder: a complete folder that diffusers loads, or nothing."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastdistill import files
from fastdistill.errors import InputError, StorageError
from fastdistill.models import make_student
from fastdistill.models.pipelines import PipelineFolder, open_pipeline
from tests.harness import EPS
from tests.models import tiny_pipelines as tiny
from tests.models.tiny_pipelines import SIZE, change

Folders = Callable[[str], Path]
QUICK = ("dit", "sdxl")
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in tiny.PIPELINES]


def student_of(folder: PipelineFolder) -> Any:
    """A student with fewer blocks (for U-Nets with fewer layers)."""
    spec = {"layers_per_block": 1} if folder.family.part == "unet" else "half_depth"
    return make_student(folder.model(), spec)


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_student_samples_as_the_resident_one(pipelines: Folders, tmp_path: Path, name: str) -> None:
    folder = open_pipeline(pipelines(name))
    made = student_of(folder)
    folder.export(made, tmp_path / "student")
    prompts = [3, 12] if name == "dit" else ["a cat", "dogs"]
    x, scale = tiny.noise(folder.latent_shape(SIZE)), 1.0 if name in ("flux", "lcm") else 3.0
    steps = 1 if name == "lcm" else 2
    resident = diffusers.DiffusionPipeline.from_pretrained(folder.path)
    teacher = tiny.sampled(resident, name, x, prompts, scale, steps)
    resident.register_modules(**{folder.family.part: made.model.eval()})
    exported = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student")
    wanted, found = (tiny.sampled(p, name, x, prompts, scale, steps) for p in (resident, exported))
    # the same operations at other addresses: a few roundings in each of a few steps
    assert (found - wanted).abs().max() <= 4 * 64 * EPS * max(1.0, float(x.abs().max()))
    assert (wanted - teacher).abs().max() > 1e-3
    again = open_pipeline(tmp_path / "student")
    wanted_config = json.loads(json.dumps({**folder.config, **made.model.config}))  # tuples become lists
    assert again.kind == folder.kind and json.loads(json.dumps(again.config)) == wanted_config
    state = again.model().state_dict()
    assert all(torch.equal(value, state[key]) for key, value in made.model.state_dict().items())
    assert (tmp_path / "student" / "LICENSE.md").read_text() == "as you like"


@pytest.fixture
def folder(pipelines: Folders) -> PipelineFolder:
    return open_pipeline(pipelines("dit"))


def contents(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*"))


def test_dtypes_wrappers_and_links(folder: PipelineFolder, tmp_path: Path) -> None:
    model = folder.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folder.export(torch.compile(model), tmp_path / "half", dtype=torch.float16, link=True)
    assert (tmp_path / "half" / "vae").is_symlink() and not (tmp_path / "half" / "transformer").is_symlink()
    stored = open_pipeline(tmp_path / "half").model(dtype=torch.float16).state_dict()
    assert all(torch.equal(stored[name], value.half()) for name, value in before.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    kept = load_file(tmp_path / "half" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float16}
    diffusers.DiffusionPipeline.from_pretrained(tmp_path / "half")


def test_published_names_of_a_class_are_written_as_its_own(folder: PipelineFolder, tmp_path: Path) -> None:
    """DiT and PixArt are published as Transformer2DModel, a class that cannot load a student."""
    old = Path(shutil.copytree(folder.path, tmp_path / "old"))
    change(old / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    change(old / "transformer" / "config.json", _class_name="Transformer2DModel", norm_type="ada_norm_zero")
    published = open_pipeline(old)
    state = published.model().state_dict()
    assert all(torch.equal(value, state[name]) for name, value in folder.model().state_dict().items())
    published.export(student_of(published), tmp_path / "new")
    index = json.loads((tmp_path / "new" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"] and index["id2label"]["7"] == "dog"
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "new").transformer) is folder.family.kind


def test_tied_weights_are_written_one_by_one(folder: PipelineFolder, tmp_path: Path) -> None:
    model = folder.model()
    first, second = (block.attn1.to_q for block in model.transformer_blocks[:2])
    second.weight = first.weight
    folder.export(model, tmp_path / "tied")
    stored = open_pipeline(tmp_path / "tied").model().transformer_blocks
    assert torch.equal(stored[0].attn1.to_q.weight, first.weight)
    assert torch.equal(stored[1].attn1.to_q.weight, first.weight)


def test_a_folder_does_not_replace_what_it_links_to(folder: PipelineFolder, tmp_path: Path) -> None:
    """Otherwise the link to the source's VAE would point to itself."""
    model, original = folder.model(), tmp_path / "original"
    folder.export(model, original)
    open_pipeline(original).export(model, tmp_path / "linked", link=True)
    linked = open_pipeline(tmp_path / "linked")
    with pytest.raises(InputError, match="target: expected a folder apart from those that it links to"):
        linked.export(model, original, link=True, overwrite=True)
    linked.export(model, original, overwrite=True)
    assert (original / "vae" / "config.json").is_file() and (tmp_path / "linked" / "vae" / "config.json").is_file()


def test_a_folder_of_a_variant_stays_one(folder: PipelineFolder, tmp_path: Path) -> None:
    """With only the fp16 files, as often downloaded: the student's weights also get such names."""
    half = diffusers.DiffusionPipeline.from_pretrained(folder.path)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    source = open_pipeline(tmp_path / "half")
    assert source.variant == "fp16" and folder.variant is None
    source.export(student_of(source), tmp_path / "new")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "new", variant="fp16")
    assert len(loaded.transformer.transformer_blocks) == 2
    assert len(open_pipeline(tmp_path / "new").model().transformer_blocks) == 2


def test_what_is_there_stays_unless_it_is_to_go(folder: PipelineFolder, tmp_path: Path) -> None:
    model, target = folder.model(), tmp_path / "a" / "pipeline"
    folder.export(model, target)
    first = contents(target)
    (target / "note").write_text("mine")
    with pytest.raises(InputError, match=r"target: expected a folder that is not there \(or overwrite=True\), got "):
        folder.export(model, target)
    assert contents(target) == sorted([*first, "note"])
    folder.export(model, target, overwrite=True)
    assert contents(target) == first and [file.name for file in target.parent.iterdir()] == ["pipeline"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "note").write_text("mine")
    with pytest.raises(InputError, match=r"target: expected a pipeline folder to overwrite, got .*without model_index"):
        folder.export(model, tmp_path / "home", overwrite=True)
    for place in (folder.path, folder.path.parent, folder.path / "vae" / "x", folder.path / ".." / folder.path.name):
        with pytest.raises(InputError, match="target: expected a folder apart from "):
            folder.export(model, place, overwrite=True)
    assert (tmp_path / "home" / "note").read_text() == "mine" and open_pipeline(folder.path).model() is not None


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_half_written_is_left(
    folder: PipelineFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    model, target = folder.model(), tmp_path / "pipeline"
    if overwrite:
        folder.export(model, target)
    before, whole = contents(tmp_path), {**folder.index}
    real = folder.family.kind.save_pretrained

    def full(self: Any, path: Path, **options: Any) -> None:
        real(self, path, **options)
        raise OSError(28, "No space left on device")

    def stop(self: Any, path: Path, **options: Any) -> None:
        raise KeyboardInterrupt

    for broken, error, message in (
        (full, StorageError, r"could not be written: .*No space left"),
        (stop, KeyboardInterrupt, None),
    ):
        monkeypatch.setattr(folder.family.kind, "save_pretrained", broken)
        with pytest.raises(error, match=message):
            folder.export(model, target, overwrite=overwrite)
        assert contents(tmp_path) == before and whole == folder.index
    monkeypatch.setattr(files, "require_space", lambda path, size: (_ for _ in ()).throw(StorageError(f"{size}")))
    with pytest.raises(StorageError) as needed:
        folder.export(model, target, overwrite=overwrite)
    written = sum(file.stat().st_size for file in folder.path.rglob("*") if file.is_file())
    assert 0 <= written - int(str(needed.value)) < 16384  # all but the index, a configuration and a header
    assert contents(tmp_path) == before


def test_students_that_do_not_belong_there(folder: PipelineFolder, tmp_path: Path) -> None:
    model = folder.model()

    def changed(**config: Any) -> Any:
        return folder.family.kind(**{**model.config, **config})  # type: ignore[call-arg]

    peft = pytest.importorskip("peft")
    infinite, adapted, wrapped, wider = (copy.deepcopy(model) for _ in range(4))
    wrapped.proj_out_2 = nn.Sequential(wrapped.proj_out_2)  # like adapters that were not completely removed
    wider.proj_out_2 = nn.Linear(wider.proj_out_2.in_features, 99)
    next(infinite.parameters()).data[0] = float("inf")
    adapted = peft.get_peft_model(adapted, peft.LoraConfig(target_modules=["to_q"]))
    large = copy.deepcopy(model)
    next(large.parameters()).data[0] = 1e30
    for student, options, message in (
        (3, {}, "student: expected a model of diffusers, or a Student, got 3"),
        (nn.Linear(2, 2), {}, "student: expected a DiTTransformer2DModel, as the DiTPipeline of "),
        (changed(in_channels=3), {}, "student: expected latents of 4 channels, as "),
        (changed(num_embeds_ada_norm=5), {}, "student: expected prompts as "),
        (folder.model(device="meta"), {}, "student: expected whole weights with values (a trainer's ema_student has"),
        (infinite, {}, "student: expected weights that are finite as torch.float32, got others in "),
        (large, {"dtype": torch.float16}, "student: expected weights that are finite as torch.float16, got others in "),
        (
            adapted,
            {},
            "student: expected no adapters: merged into the weights and taken off ",
        ),
        (
            wrapped,
            {},
            "student: expected the weights that its configuration gives DiTTransformer2DModel, got proj_out_2.",
        ),
        (
            wider,
            {},
            "student: expected the weights that its configuration gives DiTTransformer2DModel, got proj_out_2.",
        ),
        (model, {"overwrite": "no"}, "overwrite: expected True or False, got 'no'"),
        (model, {"dtype": torch.int8}, "dtype: expected a floating-point dtype, or None, got torch.int8"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            folder.export(student, tmp_path / "target", **options)
    broken = Path(shutil.copytree(folder.path, tmp_path / "broken"))
    shutil.rmtree(broken / "scheduler")
    with pytest.raises(StorageError, match="scheduler: expected the scheduler of the pipeline, got no folder"):
        open_pipeline(broken).export(model, tmp_path / "target")
    assert [file.name for file in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("reads", [True, False])
def test_a_guided_student_takes_one_pass_in_the_stock_pipeline(pipelines: Folders, tmp_path: Path, reads: bool) -> None:
    """A student that reads the guidance weight works with any ``guidance_scale``, another one with 1."""
    folder = open_pipeline(pipelines("sd"))
    made = make_student(folder.model(), {"layers_per_block": 1}, guidance_embedding=reads)
    if reads:
        nn.init.normal_(made.model.time_embedding.cond_proj.weight, generator=torch.Generator().manual_seed(1))
    folder.export(made, tmp_path / "student")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "student")
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    seen: list[tuple[int, Any]] = []
    pipeline.unet.register_forward_pre_hook(
        lambda _m, args, given: seen.append((len(args[0]), given["timestep_cond"])), with_kwargs=True
    )
    x = tiny.noise(folder.latent_shape(SIZE))
    images = {g: tiny.sampled(pipeline, "sd", x, ["a cat", "dogs"], g, 2) for g in ((7.5, 3.0) if reads else (1.0,))}
    assert [count for count, _ in seen] == [2] * 2 * len(images)
    if reads:
        wanted = folder.family.guidance_rows(made.model.config, torch.tensor([6.5, 6.5]))
        assert torch.equal(seen[0][1], wanted) and (images[7.5] - images[3.0]).abs().max() > 1e-3
