# SPDX-License-Identifier: Apache-2.0
"""Pipeline folders: their parts, prompts encoded as in the pipelines, and latents scaled as for their VAEs."""

from __future__ import annotations

import math
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from fastdistill.data.prompt_bank import PromptBank
from fastdistill.diffusion.flow import FlowSchedule, dynamic_mu
from fastdistill.diffusion.sampler import initial_noise
from fastdistill.diffusion.scheduled import sample_with
from fastdistill.errors import InputError, StorageError
from fastdistill.models.families import FAMILIES, family_named
from fastdistill.models.families.pipeline import scaled, unscaled
from fastdistill.models.pipelines import open_pipeline
from tests.harness import EPS, EPS64
from tests.models import tiny_pipelines as tiny
from tests.models.tiny_pipelines import SIZE, change

Folders = Callable[[str], Path]
QUICK = ("dit", "sdxl", "flux")
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in tiny.PIPELINES]


def bound(x: torch.Tensor, latents: torch.Tensor) -> float:
    """The same operations on the same values: a few roundings in each of up to 3 steps, where no state is larger than
    the largest one, and in a VAE that does not enlarge them."""
    return 4 * 64 * EPS * max(1.0, float(x.abs().max()), float(latents.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_gives_the_images_of_its_pipeline(pipelines: Folders, name: str) -> None:
    """Prompts, null prompt, scheduler, guidance and VAE, used one by one, give the result of the whole pipeline."""
    folder = open_pipeline(pipelines(name))
    texts, given = (["tom", "12"], [3, 12]) if name == "dit" else (["a cat", "dogs"], ["a cat", "dogs"])
    bank = folder.encode(texts, size=SIZE)
    scale, steps = (1.0, 1) if name == "lcm" else (1.0, 3) if name == "flux" else (3.0, 3)
    x = tiny.noise(folder.latent_shape(SIZE))
    rows, null = ({key: part[at] for key, part in bank.banks.items()} for at in (slice(2), -1))
    latents = sample_with(folder.scheduler(), folder.model(), x, rows, null, steps=steps, guidance_scale=scale)
    found = folder.family.decode(folder.autoencoder(), latents, batch=1)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(pipelines(name))
    wanted = tiny.sampled(pipeline, name, x, given, scale, steps)
    if name == "lcm":  # its pipeline returns images before negative values are cut off
        wanted = wanted.clamp(0, 1)
    assert found.shape == wanted.shape and (found - wanted).abs().max() <= bound(x, latents)
    assert found.std() > 1e-3
    folder.family.check("teacher", pipeline.components[folder.family.part], (2, *x.shape[1:]), bank.banks)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_described_before_its_weights_are_read(pipelines: Folders, name: str) -> None:
    folder = open_pipeline(pipelines(name))
    kind, model, *_ = tiny.PIPELINES[name]
    assert folder.kind == kind and folder.family is family_named(tiny.small.TINY[model][0])
    planned, real = folder.model(device="meta"), folder.model(dtype=torch.float16)
    shapes = {key: (tuple(p.shape), p.dtype) for key, p in planned.half().state_dict().items()}
    assert shapes == {key: (tuple(p.shape), p.dtype) for key, p in real.state_dict().items()}
    assert not real.training and all(p.is_meta for p in planned.parameters())
    own = {key: value for key, value in dict(real.config).items() if not key.startswith("_")}
    assert {key: tuple(v) if isinstance(v, list) else v for key, v in folder.config.items() if key in own} == {
        key: tuple(v) if isinstance(v, list) else v for key, v in own.items()
    }
    assert folder.latent_shape(SIZE) == (4, 16, 16) and folder.size(SIZE) == SIZE


def test_a_sample_depends_on_its_prompt_and_its_row(pipelines: Folders) -> None:
    folder = open_pipeline(pipelines("dit"))
    bank, model = folder.encode(["1", "2"]), folder.model().double()
    rows = torch.tensor([4, 9, 4])
    options: dict[str, Any] = {"steps": 2, "guidance_scale": 2.0, "seed": 5}
    found = folder.sample(model, bank, torch.tensor([0, 1, 1]), rows, **options)
    x = initial_noise(5, rows, folder.latent_shape())
    null = {"class_labels": bank.banks["class_labels"][-1]}
    labels = {"class_labels": torch.tensor([1, 2, 2])}
    assert torch.equal(found, sample_with(folder.scheduler(), model, x, labels, null, steps=2, guidance_scale=2.0))
    alone = folder.sample(model, bank, torch.tensor([1]), rows[1:2], **options)
    # matrix products of another size, in float64; the state between the steps is float32
    assert (alone[0] - found[1]).abs().max() <= 16 * EPS * max(1.0, float(found.abs().max()), float(x.abs().max()))
    for index, message in (
        (torch.tensor([0, 3]), "rows of the bank, 0 to 2, got 3"),
        (rows.float(), "int64 rows [b], got"),
    ):
        with pytest.raises(InputError, match=re.escape(f"prompt_index: expected {message}")):
            folder.sample(model, bank, index, **options)
    assert not torch.equal(found[0], found[2]) and not torch.equal(found[1], found[2])


def test_the_null_prompt_is_what_the_pipeline_guides_away_from(pipelines: Folders) -> None:
    folder = open_pipeline(pipelines("sdxl"))
    encoders = folder.encoders()
    zeros, text = folder.family.encode_null(encoders, config=folder.config, size=SIZE), None
    assert not zeros["encoder_hidden_states"].any() and not zeros["text_embeds"].any()
    assert zeros["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]]
    encoders.register_to_config(force_zeros_for_empty_prompt=False)
    text = folder.family.encode_null(encoders, config=folder.config, size=SIZE)
    own = folder.family.encode(encoders, ["", "bad"], config=folder.config, size=SIZE)
    assert torch.equal(text["encoder_hidden_states"], own["encoder_hidden_states"][:1])
    bad = folder.family.encode_null(encoders, "bad", config=folder.config, size=SIZE)
    assert (bad["text_embeds"] - own["text_embeds"][1:]).abs().max() <= 64 * EPS * own["text_embeds"].abs().max()


def test_options_reach_the_pipeline_or_are_refused(pipelines: Folders) -> None:
    folder = open_pipeline(pipelines("sana"))
    encoders = folder.encoders()
    short = folder.family.encode(encoders, ["a cat"], config=folder.config, max_sequence_length=20)
    assert short["encoder_hidden_states"].shape == (1, 20, 12) and short["encoder_attention_mask"].shape == (1, 20)
    plain = folder.family.encode(encoders, ["a cat"], config=folder.config, complex_human_instruction=None)
    whole = folder.family.encode(encoders, ["a cat"], config=folder.config)
    assert not torch.equal(plain["encoder_hidden_states"], whole["encoder_hidden_states"])
    before, encoders.encode_prompt = encoders.encode_prompt, None
    for arguments, message in (
        ({"prompts": ["a", 3]}, "prompts[1]: expected a str, got 3 (int)"),
        ({"prompts": []}, "prompts: expected at least one text, got none"),
        ({"prompts": "a cat"}, "prompts: expected a list of at least one text, got 'a cat'"),
        ({"config": None}, "pipeline: expected a pipeline with its transformer, or that model's config="),
        ({"pipeline": 3}, "pipeline: expected SanaPipeline, got 3"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            folder.family.encode(**{"pipeline": encoders, "prompts": ["a"], "config": folder.config} | arguments)
    encoders.encode_prompt = before
    with pytest.raises(InputError, match=r"options: expected options among .*max_sequence_length, .*got clip_skip"):
        folder.family.encode(encoders, ["a"], config=folder.config, clip_skip=1)
    with pytest.raises(InputError, match="clean_caption: expected bs4 and ftfy, which it needs, got no "):
        folder.family.encode(encoders, ["a"], config=folder.config, clean_caption=True)
    encoders.text_encoder = None
    with pytest.raises(InputError, match="pipeline: expected one with its text encoders, got SanaPipeline without"):
        folder.family.encode(encoders, ["a"], config=folder.config)


def test_classes_have_names_and_numbers(pipelines: Folders) -> None:
    folder = open_pipeline(pipelines("dit"))
    bank = folder.encode(["dog", "tom", "white cat", "999", "0"])
    assert bank.banks["class_labels"].tolist() == [7, 3, 3, 999, 0, 1000]
    with pytest.raises(
        InputError, match=r"prompts\[1\]: expected the name of a class, or a number from 0 to 999 \(near: 'd"
    ):
        folder.encode(["1", "dogs"])
    with pytest.raises(InputError, match=r"prompts\[0\]: expected .*, got '1000'"):
        folder.encode(["1000"])


def test_a_bank_knows_its_encoders(pipelines: Folders) -> None:
    """By weights and options: equal in another process or with another batch size, different with other sizes."""
    folder = open_pipeline(pipelines("sdxl"))
    encoders, done = folder.encoders(), []
    bank = folder.encode(["a", "b", "c"], encoders, size=SIZE, batch=2, progress=lambda *at: done.append(at))
    again = folder.encode(["a", "b", "c"], size=SIZE)
    assert done == [(2, 4), (3, 4), (4, 4)] and bank.identity == again.identity
    assert folder.encode(["a", "b", "c"], encoders, size=(64, 32)).identity != bank.identity
    assert folder.encode(["a"], encoders, size=(64, 32)).banks["time_ids"][0].tolist() == [64, 32, 0, 0, 64, 32]
    next(encoders.text_encoder.parameters()).data += 1
    assert folder.encode(["a", "b", "c"], encoders, size=SIZE).identity != bank.identity


def test_a_null_prompt_of_its_own() -> None:
    bank = PromptBank.build(
        ["a", "b", "c"],
        lambda texts: torch.ones(len(texts), 2, 3),
        encode_null=lambda text: torch.full((1, 2, 3), float(text)),
        null_text="7",
        batch=2,
    )
    assert bank.embeddings[:, 0, 0].tolist() == [1, 1, 1, 7]
    with pytest.raises(InputError, match=r"encode_null\(text\): expected \[1 texts, length, width\], the same for all"):
        PromptBank.build(["a"], lambda texts: torch.ones(1, 2, 3), encode_null=lambda text: torch.ones(1, 2, 4))
    with pytest.raises(InputError, match="encode_null: expected a function of texts, got int"):
        PromptBank.build(["a"], lambda texts: torch.ones(1, 2, 3), encode_null=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 0.18215},
        {"scaling_factor": 0.3611, "shift_factor": 0.1159},
        {"scaling_factor": 0.5, "latents_mean": [1.0, 2, 3, 4], "latents_std": [2.0, 4, 8, 16], "shift_factor": None},
        {"scaling_factor": 0.5, "latents_mean": None, "latents_std": [1.0] * 4},
    ],
)
def test_latents_are_scaled_there_and_back(config: dict[str, Any]) -> None:
    z = tiny.noise((4, 3, 3)).double()
    latents = scaled(config, z)
    assert (unscaled(config, latents) - z).abs().max() <= 16 * EPS64 * 16
    if config.get("latents_mean"):
        assert torch.equal(latents[:, 1], (z[:, 1] - 2) * 0.5 / 4)
    else:
        assert torch.equal(latents, (z - config.get("shift_factor", 0.0)) * config["scaling_factor"])


def test_a_vae_that_overflows_is_used_in_float32() -> None:
    family, vae = family_named("unet"), tiny.autoencoder("sd").half()
    latents = tiny.noise((4, 8, 8))
    found = family.decode(vae, latents)
    assert vae.dtype == torch.float16 and found.dtype == torch.float32
    assert torch.equal(found, family.decode(vae.float(), latents))
    vae.half().register_to_config(force_upcast=False)
    assert not torch.equal(found, family.decode(vae, latents))
    for given, message in ((latents[:, :3], "latents: expected a tensor [B, 4 (latent_channels"), (3, "got 3")):
        with pytest.raises(InputError, match=re.escape(message)):
            family.decode(vae, given)
    with pytest.raises(InputError, match="vae: expected a VAE of diffusers, or a pipeline with one, got 3"):
        family.decode(3, latents)


@pytest.mark.parametrize("name", ["sd", "sana"])
def test_images_become_latents_of_the_model(name: str) -> None:
    vae, images = tiny.autoencoder(name), tiny.noise((3, 32, 32)).sigmoid()
    found = family_named("sana").to_latents(vae, images, batch=1)
    with torch.no_grad():
        encoded = vae.encode(images * 2 - 1)
    z = encoded.latent if name == "sana" else encoded.latent_dist.mean
    assert found.shape == (2, 4, 16, 16)
    assert (found - z * vae.config.scaling_factor).abs().max() <= 64 * EPS * found.abs().max()


def test_schedules_are_those_of_the_scheduler(pipelines: Folders, tmp_path: Path) -> None:
    """A dynamic shift depends on the size; zero terminal SNR and v-prediction are found; old settings are corrected."""
    flux = _copy(pipelines("dit"), tmp_path / "flux")
    config = flux / "scheduler" / "scheduler_config.json"
    diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(config.parent)
    change(flux / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    folder = open_pipeline(flux)
    shifts = [folder.schedule(size).shift for size in (SIZE, (64, 32))]  # type: ignore[attr-defined]
    assert shifts == [pytest.approx(math.exp(dynamic_mu(tokens))) for tokens in (64, 128)]
    assert isinstance(folder.schedule(SIZE), FlowSchedule) and folder.prediction_type == "epsilon"

    diffusers.DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True).save_pretrained(config.parent)
    change(flux / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    folder = open_pipeline(flux)
    assert folder.schedule().signal[-1] == 0 and folder.prediction_type == "v_prediction"
    old = diffusers.DDIMScheduler(clip_sample=True, steps_offset=0)
    assert FAMILIES["unet"].scheduler("StableDiffusionXLPipeline", old).config.clip_sample
    mended = FAMILIES["unet"].scheduler("StableDiffusionPipeline", old)
    assert not mended.config.clip_sample and mended.config.steps_offset == 1


def test_sizes_between_those_of_the_training_are_warned_of() -> None:
    """The models' own pipelines would use the nearest trained size."""
    vae, dc = {"block_out_channels": [1] * 4}, {"encoder_block_out_channels": [1] * 6}
    pixart, sana = {"in_channels": 4, "sample_size": 128}, {"in_channels": 32, "sample_size": 32}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert family_named("pixart").latent_shape(pixart, vae, (832, 1216)) == (4, 104, 152)
        family_named("pixart").latent_shape(pixart | {"sample_size": 100}, vae, (800, 800))
        assert family_named("sana").latent_shape(sana, dc, (1024, 1024)) == family_named("sana").latent_shape(sana, dc)
        family_named("unet").latent_shape({"in_channels": 4, "sample_size": 128}, vae, (800, 1200))
    for name, config, its, size, nearest in (
        ("pixart", pixart, vae, (800, 1200), "832 x 1216"),
        ("pixart", pixart, vae, (512, 512), "1024 x 1024"),
        ("sana", sana, dc, (2048, 1024), "1408 x 704"),
    ):
        with pytest.warns(UserWarning, match=rf"size: {size[0]} x {size[1]} is none that .*, is {nearest}$"):
            family_named(name).latent_shape(config, its, size)


def test_sizes_that_a_model_does_not_have() -> None:
    vae = {"block_out_channels": [1, 2, 3, 4]}
    config = {"sample_size": 64, "in_channels": 16, "patch_size": 2, "pos_embed_max_size": 96}
    sd3, flux, unet = family_named("sd3"), family_named("flux"), family_named("unet")
    assert sd3.latent_shape(config, vae) == (16, 64, 64) and sd3.latent_shape(config, vae, (1536, 16)) == (16, 192, 2)
    assert flux.latent_shape({"in_channels": 64}, vae) == (16, 128, 128)
    assert unet.latent_shape({"in_channels": 4, "sample_size": [96, 64]}, vae) == (4, 96, 64)
    dc = {"encoder_block_out_channels": [1] * 6, "block_out_channels": None}
    assert family_named("sana").latent_shape({"in_channels": 32, "sample_size": 32}, dc) == (32, 32, 32)
    for given, message in (
        ((sd3, config, vae, (512, 520)), "width: expected a multiple of 16 pixels, got 520"),
        ((sd3, config, vae, (1552, 512)), "height: expected at most 1536 pixels (pos_embed_max_size 96), got 1552"),
        ((sd3, config, vae, (0, 512)), "height: expected a multiple of 16 pixels, got 0"),
        ((flux, {"in_channels": 64}, vae, (8, 16)), "height: expected a multiple of 16 pixels, got 8"),
        ((unet, {"in_channels": 4, "sample_size": None}, vae), "size: expected height and width, as the model's"),
        ((unet, {"in_channels": 4}, vae, 512), "size: expected height and width in pixels, got 512"),
        ((unet, {"in_channels": 4}, {"a": 1}, SIZE), "vae: expected a configuration with block_out_channels, got a"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            given[0].latent_shape(*given[1:])  # type: ignore[attr-defined]


def _copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def test_folders_that_are_none(pipelines: Folders, tmp_path: Path) -> None:
    whole = pipelines("dit")
    for argument, message in (
        (3, "folder: expected the path of a file or directory, got 3"),
        (
            "CompVis/none",
            "CompVis/none: expected a pipeline folder of diffusers, got no folder (download a model of the",
        ),
        (tmp_path, "model_index.json: expected a file of a pipeline folder, got none"),
    ):
        with pytest.raises((InputError, StorageError), match=re.escape(message)):
            open_pipeline(argument)  # type: ignore[arg-type]

    folder = _copy(whole, tmp_path / "dit")
    index = (folder / "model_index.json").read_text()
    for changes, message in (
        ({"_class_name": "KandinskyPipeline"}, "_class_name: expected one of StableDiffusionPipeline, "),
        ({"_class_name": "KandinskyPipeline"}, "got 'KandinskyPipeline' (a model of another kind is called by"),
        (
            {"transformer": ["diffusers", "UNet"]},
            "transformer: expected DiTTransformer2DModel or Transformer2DModel, got",
        ),
        ({"transformer": [None, None]}, "got None"),
    ):
        change(folder / "model_index.json", **changes)
        with pytest.raises(InputError, match=re.escape(message)):
            open_pipeline(folder)
        (folder / "model_index.json").write_text(index)
    (folder / "model_index.json").write_text(index[:9])
    with pytest.raises(StorageError, match=r"model_index.json: expected JSON, got other text \(JSONDecodeError"):
        open_pipeline(folder)
    (folder / "model_index.json").write_text("[]")
    with pytest.raises(StorageError, match=r"model_index.json: expected a JSON object, got \[\]"):
        open_pipeline(folder)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("unet/config.json", {"cross_attention_dim": "x"}, "unet/config.json: could not be used: TypeError: "),
        ("unet/config.json", {"norm_num_groups": 7}, "unet/config.json: could not be used: ValueError: "),
        ("unet/config.json", {"sample_size": "big"}, "the configurations of unet and vae could not be used: ValueE"),
        ("scheduler/scheduler_config.json", {"beta_start": "x"}, "scheduler: could not be loaded: TypeError: "),
        ("text_encoder/config.json", {"hidden_size": "x"}, "the text encoders could not be loaded: "),
    ],
)
def test_configurations_that_no_part_can_be_made_of(
    part: str, changes: dict[str, Any], message: str, pipelines: Folders, tmp_path: Path
) -> None:
    place = _copy(pipelines("sd"), tmp_path / "sd")
    change(place / part, **changes)
    with pytest.raises(StorageError, match=message):
        folder = open_pipeline(place)
        folder.latent_shape()
        folder.model(device="meta")
        folder.schedule()
        folder.encoders()


def test_parts_that_are_missing_or_damaged(pipelines: Folders, tmp_path: Path) -> None:
    folder = open_pipeline(_copy(pipelines("dit"), tmp_path / "dit"))
    weights = folder.path / "transformer" / "diffusion_pytorch_model.safetensors"
    state = {name: tensor.clone() for name, tensor in folder.model().state_dict().items()}  # the file is mapped
    half = weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))  # only the variant exists
    assert all(torch.equal(value, state[name]) for name, value in folder.model().state_dict().items())
    half.write_bytes(half.read_bytes()[:2000])
    with pytest.raises(StorageError, match="transformer: could not be loaded: "):
        folder.model()
    half.unlink()
    with pytest.raises(
        StorageError, match=r"transformer: expected weights \(diffusion_pytorch_model.safetensors\), got none"
    ):
        folder.model()
    save_file({name: t for name, t in state.items() if name != "proj_out_1.bias"}, weights)
    with pytest.raises(StorageError, match=r"expected all weights of its config.json, got none for proj_out_1.bias"):
        folder.model()
    shutil.rmtree(folder.path / "scheduler")
    with pytest.raises(StorageError, match="scheduler: expected the scheduler of the pipeline, got no folder"):
        folder.schedule()
    shutil.rmtree(folder.path / "vae")
    with pytest.raises(StorageError, match=r"vae/config.json: expected a file of a pipeline folder, got none"):
        folder.latent_shape()
    change(folder.path / "model_index.json", scheduler=["own", "Mine"])
    (folder.path / "scheduler").mkdir()
    with pytest.raises(InputError, match="scheduler: expected a class of diffusers, got Mine"):
        open_pipeline(folder.path).scheduler()
