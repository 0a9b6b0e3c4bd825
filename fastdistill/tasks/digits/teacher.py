# SPDX-License-Identifier: Apache-2.0
"""The task's teacher: a U-Net with cross-attention, its recipe, and the weights that ship with the package."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import diffusers
import safetensors
import safetensors.torch
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from pydantic import Field
from torch import Tensor

import fastdistill
from fastdistill.data.files import atomic_write, make_directory, reason
from fastdistill.data.fingerprint import sha256_of_tensors
from fastdistill.distill.denoising import Denoising
from fastdistill.distill.objective import Setting
from fastdistill.errors import StorageError
from fastdistill.tasks.digits import data
from fastdistill.tasks.digits.judge import Judge
from fastdistill.tasks.digits.sampling import SCHEDULE, Sampling, sample
from fastdistill.tasks.digits.text_encoder import WIDTH, prompt_bank
from fastdistill.train.config import TrainConfig, validated
from fastdistill.train.devices import usable
from fastdistill.train.loop import Progress, fit
from fastdistill.train.step import TrainStep

WEIGHTS = Path(__file__).parent / "weights" / "teacher.safetensors"
ARCHITECTURE: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}


@dataclass(frozen=True)
class TeacherConfig:
    """The recipe of the shipped weights."""

    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=2400, batch=64, lr=4e-3, lr_schedule="cosine", warmup=50, ema_decay=0.995, seed=0, log_every=50
        )
    )
    sampling: Sampling = Sampling()
    weight_limit: Annotated[float, Field(ge=1)] = 5.0
    """Largest weight min(1 / abar, limit) of a timestep in the loss."""
    null_probability: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of prompts replaced by the null prompt."""
    images_per_prompt: Annotated[int, Field(ge=1)] = 16
    """Images judged for each of the 80 prompts afterwards."""
    threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads; one is the fastest on small machines, and what the shipped weights were made with."""
    device: str = "cpu"
    """Where to train."""
    output: str = "runs/digits-teacher"
    """Directory for checkpoints, metrics.jsonl and teacher.safetensors."""


def build(seed: int) -> UNet2DConditionModel:
    """A teacher with initial weights from ``seed``; torch's global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return UNet2DConditionModel(**ARCHITECTURE)


def train_teacher(config: TeacherConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Train by the recipe, judge, and write ``<output>/teacher.safetensors``; an interrupted run is gone on with.

    Returns:
        The provenance that is written into the file: recipe, data fingerprint, versions, metrics, hash of the weights.
    """
    config = validated(config, "teacher")
    usable(config.device)
    torch.set_num_threads(config.threads)
    output = Path(config.output)
    make_directory(output)
    model = build(config.train.seed).to(config.device).train()
    bank = prompt_bank().to(config.device)
    images, rows = (t.to(config.device) for t in data.tinted(data.scans()[0]))
    setting = Setting(model, model, SCHEDULE, images, rows, bank.embeddings, config.train.batch)
    objective = Denoising(config.weight_limit, config.null_probability)
    step = TrainStep(objective.bind(setting), model, config.train, torch.device(config.device))
    recipe = {k: v for k, v in asdict(config).items() if k not in ("output", "device", "threads", "images_per_prompt")}
    fingerprint = {"recipe": recipe, "data": data.fingerprint(), "prompts": bank.sha256, "architecture": ARCHITECTURE}
    result = fit(step, model, fingerprint, config.train, output, progress)

    step.optimizer.copy_average(model, model)
    model.eval()
    provenance = fingerprint | {
        "metrics": judged(model, config) | {"train_seconds": round(result.seconds, 1)},
        "versions": {
            "fastdistill": fastdistill.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "machine": platform.machine(),
        },
        "sha256": sha256_of_tensors(model.state_dict()),
    }
    tensors = {k: v.cpu().contiguous() for k, v in model.state_dict().items()}
    content = safetensors.torch.save(tensors, metadata={"provenance": json.dumps(provenance)})
    atomic_write(output / "teacher.safetensors", content)
    return provenance


@torch.no_grad()
def judged(model: UNet2DConditionModel, config: TeacherConfig) -> dict[str, float]:
    """Share of images that show their prompt, over all, seen and unseen prompts, and the judge's own accuracy."""
    judge, bank = Judge(), prompt_bank().to(config.device)
    prompt = torch.arange(len(data.PROMPTS)).repeat_interleave(config.images_per_prompt)
    images = sample(model, bank, prompt, torch.arange(len(prompt)), config.train.seed, config.sampling)
    right = judge.right(images, prompt).double()

    def share(rows: tuple[int, ...]) -> float:
        return float(right[torch.isin(prompt, torch.tensor(rows))].mean())

    return {
        "right": float(right.mean()),
        "right_seen": share(data.SEEN),
        "right_unseen": share(data.UNSEEN),
        "images": len(prompt),
        "judge_accuracy_on_real": judge.accuracy_on_real,
    }


def load_teacher(path: str | Path = WEIGHTS) -> UNet2DConditionModel:
    """The teacher of a file that ``train_teacher`` wrote (the shipped one), frozen, in eval mode, float32 on the CPU.

    Raises:
        StorageError: the file is not there, damaged, or does not hold the weights whose hash it states.
    """
    tensors, provenance = _read(Path(path))
    if sha256_of_tensors(tensors) != provenance["sha256"]:
        raise StorageError(f"{path}: damaged, its tensors do not have the hash it states; reinstall, or train it anew")
    model = build(0)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise StorageError(f"{path}: expected the tensors of the digits teacher, got others ({told})") from error
    return model.eval().requires_grad_(False)


def provenance(path: str | Path = WEIGHTS) -> dict[str, Any]:
    """What made the weights of a file: recipe, data, versions, metrics and their hash."""
    return _read(Path(path))[1]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            provenance = json.loads((file.metadata() or {})["provenance"])
            if not isinstance(provenance, dict) or "sha256" not in provenance:
                raise ValueError("its provenance has no sha256")
            return {name: file.get_tensor(name) for name in file.keys()}, provenance  # noqa: SIM118
    except OSError as error:
        raise StorageError(f"{path}: could not be read: {reason(error)}") from error
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise StorageError(
            f"{path}: damaged, not a teacher's weights ({error}); reinstall, or train it anew"
        ) from error
