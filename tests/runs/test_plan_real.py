# SPDX-License-Identifier: Apache-2.0
"""Plans of published models, from folders that contain only configurations."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from fastdistill import runs
from fastdistill.plan.trace import attention_as
from fastdistill.train.config import from_mapping
from tests.models import real

#: Pipeline, stages of its VAE and its scheduler by the name of a configuration, and the student.
PIPELINES: dict[str, tuple[str, int, str, dict[str, Any]]] = {
    "dit_xl_2": ("DiTPipeline", 4, "DDIMScheduler", {"every": 2}),
    "sd15": ("StableDiffusionPipeline", 4, "PNDMScheduler", {"spec": "bk_base"}),
    "sdxl": ("StableDiffusionXLPipeline", 4, "EulerDiscreteScheduler", {"spec": "koala_700m"}),
    "pixart_alpha": ("PixArtAlphaPipeline", 4, "DPMSolverMultistepScheduler", {"every": 2}),
    "sd3_medium": ("StableDiffusion3Pipeline", 4, "FlowMatchEulerDiscreteScheduler", {"every": 2}),
    "flux_dev": ("FluxPipeline", 4, "FlowMatchEulerDiscreteScheduler", {"lora": {"rank": 16}}),
}


def run_config(name: str, folder: Path, **train: Any) -> runs.RunConfig:
    kind, stages, scheduler, student = PIPELINES[name]
    model = real.family(name)
    parts = {
        model.part: real.published(name)["config"] | {"_class_name": model.kind.__name__},
        "vae": {"_class_name": "AutoencoderKL", "block_out_channels": [8] * stages},
        "scheduler": {"_class_name": scheduler},
    }
    index: dict[str, Any] = {"_class_name": kind, "id2label": {"0": "tench"}}
    for part, config in parts.items():
        (folder / part).mkdir(parents=True)
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / file).write_text(json.dumps(config))
        index[part] = ["diffusers", config["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    values = {
        "teacher": str(folder),
        "prompts": {"file": str(folder / "prompts.txt")},
        "student": student,
        "objective": {"weights": {"task": 1.0}},
        "train": {"batch": 64, "fuse": True, "gradient_checkpointing": True} | train,
    }
    return from_mapping(runs.RunConfig, values)


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_a_published_model_is_planned(name: str, tmp_path: Path) -> None:
    start = time.process_time()
    found = runs.plan(run_config(name, tmp_path), card="h200")
    seconds = time.process_time() - start
    teacher = real.teacher(name)
    assert found.parameters["teacher"] == sum(p.numel() for p in teacher.parameters())
    with attention_as("cuda"), FlopCounterMode(display=False) as counter:
        real.forward(name, teacher)
    if PIPELINES[name][0] not in ("PixArtAlphaPipeline", "StableDiffusion3Pipeline", "FluxPipeline"):  # longer prompts
        assert found.flops["teacher"] == counter.get_total_flops() // 2
    checkpointed = found.flops["backward"] / found.flops["student"]
    assert 2 < checkpointed < 3.6  # two products for each of the forward's, and those again, with attention's scores
    if "lora" in PIPELINES[name][3]:
        assert found.memory["masters"] == 4 * found.parameters["trained"] < found.parameters["student"] / 100
        assert found.memory["student"] < found.memory["teacher"] / 50  # it shares the teacher's weights
    else:
        assert found.memory["masters"] == 4 * found.parameters["trained"]
        assert found.largest_micro_batch is not None and found.total <= found.card.memory
    assert seconds < 120


@pytest.mark.slow
def test_operations_of_stable_diffusion(tmp_path: Path) -> None:
    """As in the benchmark of whole steps, in billions: 803 + 523, and 1082 for a backward with flash attention."""
    found = runs.plan(run_config("sd15", tmp_path, fuse=False, gradient_checkpointing=False), card="h100")
    assert {name: round(count / 1e9) for name, count in found.flops.items()} == {
        "teacher": 803,
        "student": 523,
        "backward": 1082,
    }


@pytest.mark.slow
def test_figures_of_a_large_run(tmp_path: Path) -> None:
    """The figures of docs/scale.md."""
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    found = runs.plan(
        run_config("sd15", tmp_path, batch=256, precision="bfloat16", micro_batch=32), card="h100", ranks=8
    )
    assert found.batch == found.micro_batch == 32
    memory = {name: f"{size / 1e9:.1f}" for name, size in found.memory.items()}
    parts = ("teacher", "student", "gradients", "masters", "moments", "averages", "activations")
    assert f"{found.total / 1e9:.1f} GB: {', '.join(f'{name} {memory[name]}' for name in parts)}" in page
    assert f"a step of 32 images | {found.step_seconds:.3f} s" in page
    assert ", ".join(f"{name} {count / 1e12:.2f}" for name, count in found.flops.items()) in page
    assert f"| 8 | 256 | {int(found.images_per_second)} | {400_000 * found.step_seconds / 3600:.1f} hours" in page
