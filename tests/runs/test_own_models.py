# SPDX-License-Identifier: Apache-2.0
"""Teachers of unknown families, called by a function of the user: from the folder to the exported student."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from fastdistill import make_student, runs, sample_with
from fastdistill.errors import FastdistillError, InputError
from fastdistill.models.families import Other, find
from fastdistill.models.pipelines import open_pipeline
from tests.models import tiny_pipelines as tiny
from tests.processes import once
from tests.runs.conftest import run_config

FLOW = """
def call(model, x_t, timestep, rows):
    return model(x_t, encoder_hidden_states=rows["prompt_embeds"], timestep=timestep / 1000)
"""
UNET = """
import torch
from diffusers import UNet2DConditionModel

class Louder(UNet2DConditionModel):
    def forward(self, *given, loudness=1.0, **named):
        return (loudness * super().forward(*given, **named).sample,)

def call(model, x_t, timestep, rows):
    return model(x_t, timestep, encoder_hidden_states=rows["encoder_hidden_states"], loudness=0.5)
"""


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "pipelines/aura", tiny.save_other)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module into the current directory and returns the name of its ``call``."""

    def written(text: str) -> str:
        name = f"own_{abs(hash((str(tmp_path), text)))}"
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return f"{name}:call"

    monkeypatch.chdir(tmp_path)
    return written


def test_a_model_of_diffusers_of_no_family(other: Path, module: Callable[[str], str], tmp_path: Path) -> None:
    config = run_config(other, tmp_path, call=module(FLOW), cache={"sizes": [[16, 16]]}, train={"steps": 1})
    planned = runs.plan(config, allow_code=True)
    runs.cache(config, allow_code=True)
    stored = runs.opened(config, allow_code=True).bank()
    assert planned.disk["prompts"] == sum(bank.shape.numel() * bank.dtype.itemsize for bank in stored.banks.values())
    assert runs.distill(config, allow_code=True).history[-1]["loss"] > 0
    folder = runs.export(config, tmp_path / "out", allow_code=True)
    model: Any = diffusers.AuraFlowTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    assert (len(model.joint_transformer_blocks), len(model.single_transformer_blocks)) == (1, 2)
    run = runs.opened(config, allow_code=True)
    assert run.pipeline.prediction_type == "flow_prediction" and find(model) is None
    assert run.pipeline.family.blocks == {
        "joint_transformer_blocks": "num_mmdit_layers", "single_transformer_blocks": "num_single_dit_layers",
    }  # fmt: skip
    (file,) = runs.sample(config, ["a cat"], tmp_path / "images", allow_code=True)
    assert file.exists()


def test_its_samples_are_its_pipelines(other: Path, module: Callable[[str], str], tmp_path: Path) -> None:
    """Prompt, null prompt, shift and guidance are those of the pipeline of diffusers."""
    run = runs.opened(run_config(other, tmp_path, call=module(FLOW)), allow_code=True)
    bank = run.pipeline.encode(["a cat", "a dog"], size=(16, 16))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipeline: Any = diffusers.AuraFlowPipeline.from_pretrained(other)
    pipeline.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"height": 16, "width": 16, "latents": noise, "output_type": "latent"}
    wanted = pipeline(["a cat", "a dog"], num_inference_steps=3, guidance_scale=3.0, **given).images
    rows = {name: values[:2] for name, values in bank.banks.items()}
    null = {name: values[-1] for name, values in bank.banks.items()}
    options: dict[str, Any] = {"steps": 3, "guidance_scale": 3.0, "call": run.call}
    found = sample_with(run.pipeline.scheduler(), run.pipeline.model(), noise, rows, null, **options)
    bound = 64 * torch.finfo(torch.float32).eps * float(wanted.abs().max())
    assert float((found - wanted).abs().max()) <= bound


@pytest.fixture(scope="module")
def subclass(saved: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Stable Diffusion's folder with a U-Net whose class is in the user's module."""

    def made(name: str) -> Path:
        folder = tmp_path_factory.mktemp("subclass") / "sd"
        shutil.copytree(saved("sd"), folder)
        tiny.change(folder / "model_index.json", unet=[name, "Louder"])
        return folder

    return made


def test_a_class_of_ones_own(subclass: Callable[[str], Path], module: Callable[[str], str], tmp_path: Path) -> None:
    """Students, prompts and blocks are those of its base class's family; the exported model has the user's class."""
    call = module(UNET)
    folder = subclass(call.partition(":")[0])
    config = run_config(folder, tmp_path, call=call, cache={"sizes": [[32, 32]]})
    with pytest.raises(InputError, match=r"call: expected no code of your own unless .*--allow-code"):
        runs.opened(config)
    run = runs.opened(config, allow_code=True)
    student = make_student(run.pipeline.model(), run.student_spec)
    run.pipeline.export(student, out := tmp_path / "out")
    assert json.loads((out / "model_index.json").read_text())["unet"] == [call.partition(":")[0], "Louder"]
    again = open_pipeline(out, any_model=True)
    assert type(again.model()).__name__ == "Louder" and again.family.conditions(again.config).keys() >= {
        "encoder_hidden_states"
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"call": None}, r"_class_name: expected one of .*, got 'AuraFlowPipeline' \(a model of another kind"),
        ({"student": {"width": 0.5}}, r"student.width: expected None, as AuraFlowTransformer2DModel is of no family"),
        ({"student": {"every": 9}}, r"student.every: expected 1 to 2, the blocks of the teacher, got 9"),
        ({"family": "sd3"}, "family: expected auto, or other, which"),
        ({"prompts": {"file": None}}, r"prompts\.file: expected a file of prompts, got none"),
    ],
)  # fmt: skip
def test_what_cannot_work(
    changes: dict[str, Any], message: str, other: Path, module: Callable[[str], str], tmp_path: Path
) -> None:
    config = run_config(other, tmp_path, **{"call": module(FLOW), **changes})
    with pytest.raises(InputError, match=message):
        _ = runs.opened(config, allow_code=True).pool


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"transformer": None}, "expected a pipeline with one model, called transformer or unet, got none"),
        ({"transformer": ["diffusers", "Nothing"]}, "transformer: expected a class of diffusers' ModelMixin"),
        ({"transformer": ["no_such_module", "Model"]}, "transformer: Model of no_such_module could not be imported"),
        ({"_class_name": "NoPipeline"}, "_class_name: expected a pipeline of diffusers that has encode_prompt"),
        ({"_class_name": "DDPMPipeline"}, "_class_name: expected a pipeline of diffusers that has encode_prompt"),
    ],
)
def test_folders_that_cannot_be_called(index: dict[str, Any], message: str, other: Path, tmp_path: Path) -> None:
    shutil.copytree(other, tmp_path / "folder")
    tiny.change(tmp_path / "folder" / "model_index.json", **index)
    with pytest.raises(FastdistillError, match=message):
        open_pipeline(tmp_path / "folder", any_model=True)


@pytest.mark.parametrize("text", ["def call(:", "raise RuntimeError('as it is')", "import no_such_module"])
def test_modules_that_fail(text: str, other: Path, module: Callable[[str], str], tmp_path: Path) -> None:
    config = run_config(other, tmp_path, call=module(text))
    with pytest.raises(FastdistillError, match=r"^call: call of own_\d+ could not be imported: "):
        runs.opened(config, allow_code=True)


def test_a_run_file_for_it(other: Path, module: Callable[[str], str], tmp_path: Path) -> None:
    text = runs.init(other, call=(call := module(FLOW)), allow_code=True)
    (tmp_path / "run.yaml").write_text(text)
    config = runs.load(tmp_path / "run.yaml")
    assert config.call == call and config.student.spec == "half_depth" and "prompt_embeds" in text


def test_the_blocks_are_found_by_trying() -> None:
    """Also if other fields have the same number; for a model without such a field there is a message."""
    kind: Any = diffusers.AuraFlowTransformer2DModel
    sizes = {"num_mmdit_layers": 4, "num_single_dit_layers": 4, "num_attention_heads": 4, "attention_head_dim": 4}
    config = kind(**sizes, joint_attention_dim=4, caption_projection_dim=16, sample_size=4).config
    assert [*Other(kind, config).blocks.values()] == ["num_mmdit_layers", "num_single_dit_layers"]
    unet = diffusers.UNet2DModel(block_out_channels=(4, 4), norm_num_groups=2, sample_size=8,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    assert Other(type(unet), unet.config).blocks == {}
