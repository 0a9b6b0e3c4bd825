# SPDX-License-Identifier: Apache-2.0
"""The task as the pipeline of a run (``teacher: task:digits``): its teacher, prompts, text encoder and scheduler."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from fastdistill import files
from fastdistill.data.texts import checked, listed
from fastdistill.errors import InputError
from fastdistill.models.export import export_model
from fastdistill.models.families import EMBEDDINGS
from fastdistill.models.families.unet import UNet
from fastdistill.models.pipelines import PipelineFolder
from fastdistill.tasks.digits import data, text_encoder
from fastdistill.tasks.digits.sampling import Sampling, scheduler
from fastdistill.tasks.digits.teacher import ARCHITECTURE, WEIGHTS, load_teacher

#: Sections of the run file for a student of the experiment (``fastdistill demo digits``).
EXPERIMENT: dict[str, Any] = {
    "teacher_dtype": "float32",
    "prompts": {"seen": len(data.SEEN)},
    "cache": {
        "images_per_prompt": 32,
        "steps": Sampling().steps,
        "guidance_scale": Sampling().guidance_scale,
        "dtype": "float32",
        "batch": 64,
        "rows_per_shard": 256,
    },
    "student": {"channels": (24, 48), "init": "random"},
    "train": {
        "steps": 1500,
        "batch": 64,
        "lr": 4e-3,
        "lr_schedule": "cosine",
        "warmup": 50,
        "ema_decay": 0.995,
        "log_every": 25,
        "checkpoint_every": 100,
    },
    "evaluate": {"prompts": len(data.UNSEEN)},
}


def open_pipeline() -> DigitsPipeline:
    """The shipped teacher with its prompts, text encoder and scheduler; no weights are read."""
    with torch.device("meta"):
        config = dict(UNet2DConditionModel(**ARCHITECTURE).config)
    index = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": [scheduler.__module__, "ClippedDDIM"],
        "text_encoder": [text_encoder.__name__, "a frozen encoder of the task's words"],
    }
    return DigitsPipeline(WEIGHTS.parent, "DigitsPipeline", Digits(), index, config)


class Digits(UNet):
    """A U-Net whose prompts consist of the task's words, and whose latents are images in [-1, 1]: there is no VAE."""

    def encode(self, pipeline: Any, prompts: Any, **options: Any) -> dict[str, Tensor]:
        return {EMBEDDINGS: text_encoder.encoded(listed(prompts, "prompts")).to(pipeline.device)}

    def encode_null(self, pipeline: Any, text: str = "", **options: Any) -> dict[str, Tensor]:
        return self.encode(pipeline, [checked(text, "text")])

    def length(self, kind: str, longest: int) -> int:
        return text_encoder.LENGTH

    def decode(self, vae: Any, latents: Tensor, *, batch: int = 8) -> Tensor:
        return (latents.float() / 2 + 0.5).clamp(0, 1)

    def to_latents(self, vae: Any, images: Tensor, *, batch: int = 8) -> Tensor:
        return images.float() * 2 - 1


class DigitsPipeline(PipelineFolder):
    """The interface of a pipeline folder, as far as a run needs it, for the task; ``path``: the weights."""

    name = "task-digits"  # differs from the folder of the demo

    @cached_property
    def vae(self) -> dict[str, Any]:
        return {"block_out_channels": (1,)}  # one pixel per latent position

    def scheduler(self) -> Any:
        return scheduler()

    def model(self, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
        if torch.device(device).type == "meta":
            return super().model(device=device, dtype=dtype)
        teacher = load_teacher().to(device)
        return teacher if dtype == torch.float32 else teacher.to(dtype)

    def autoencoder(self, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """There is none."""

    def encoders(self, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
        return SimpleNamespace(device=torch.device(device), components={})  # all that is needed of one

    def own_prompts(self) -> list[str]:
        """The prompts; first those that are seen in the task's experiment."""
        return [data.PROMPTS[row].text for row in (*data.SEEN, *data.UNSEEN)]

    def files(self, name: str) -> list[Path]:
        shipped = {"unet": [WEIGHTS], "text_encoder": sorted(text_encoder.BANK.iterdir())}
        return shipped.get(name, [])

    def usual(self) -> dict[str, Any]:
        """The settings of the experiment."""
        return EXPERIMENT

    def loads(self, base: str | None = None) -> list[str]:
        if base is None:
            loaded = 'model = UNet2DConditionModel.from_pretrained("this folder")'
            return ["from diffusers import UNet2DConditionModel", "", loaded]
        lines = ["from fastdistill.tasks.digits.teacher import load_teacher", ""]
        return [*lines, "model = load_teacher()", 'model.load_lora_adapter("this folder")']

    def export(
        self,
        student: Any,
        target: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        link: bool = False,
        overwrite: bool = False,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """``target`` becomes a folder with ``student`` only, because the task is no pipeline of diffusers."""
        if link:
            raise InputError.of("link", "False, as of the digits task a model alone is exported, no pipeline", link)
        export_model(student, files.located(target, "target"), dtype=dtype, overwrite=overwrite, texts=texts)
