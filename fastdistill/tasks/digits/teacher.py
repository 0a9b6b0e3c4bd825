# SPDX-License-Identifier: Apache-2.0
"""The teacher of the task: a U-Net with cross-attention, its training, and the weights shipped with the package."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
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
from fastdistill import schemas
from fastdistill.data.fingerprint import differences, plain, sha256_of_tensors
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.distill.denoising import Denoising
from fastdistill.distill.objective import Setting
from fastdistill.documented import documented
from fastdistill.errors import StorageError
from fastdistill.files import atomic_write, located, make_directory, reason
from fastdistill.tasks.digits import data
from fastdistill.tasks.digits.judge import Judge
from fastdistill.tasks.digits.sampling import SCHEDULE, Sampling, sample
from fastdistill.tasks.digits.text_encoder import WIDTH, prompt_bank
from fastdistill.train.arguments import OF_TEACHER, check_idle
from fastdistill.train.callbacks import Progress
from fastdistill.train.config import TrainConfig, validated
from fastdistill.train.devices import usable
from fastdistill.train.graph import check_device
from fastdistill.train.loop import fit
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


@documented
@dataclass(frozen=True)
class Recipe:
    """How a teacher is trained and evaluated, for this task or another one with the same model."""

    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=2400, batch=64, lr=4e-3, lr_schedule="cosine", warmup=50, ema_decay=0.995, seed=0, log_every=50
        )
    )
    weight_limit: Annotated[float, Field(ge=1)] = 5.0
    """Limit of the weight min(1 / abar, limit) of each timestep in the loss."""
    null_probability: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Fraction of prompts that are replaced by the null prompt."""
    images_per_prompt: Annotated[int, Field(ge=1)] = 16
    """Images per prompt (there are 80) for the evaluation after training."""
    threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads; the shipped weights were trained with one, which is fastest on small machines."""
    device: str = "cpu"
    """Device to train on."""
    output: str = "runs/digits-teacher"
    """Directory for checkpoints, metrics.jsonl and teacher.safetensors."""

    @property
    def shipped(self) -> Path:
        """The file of the shipped weights that were trained with this recipe."""
        return WEIGHTS


@documented
@dataclass(frozen=True)
class TeacherConfig(Recipe):
    """How the shipped weights were trained."""

    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Lesson:
    """What a teacher learns.

    start: seed -> the model before training. made_from: what this model and the data depend on, for the provenance.
    images: [n, 3, 8, 8] and the row of each image's prompt. judged: measures a trained model in eval mode.
    """

    start: Callable[[int], UNet2DConditionModel]
    made_from: Mapping[str, Any]
    images: Callable[[], tuple[Tensor, Tensor]]
    judged: Callable[[UNet2DConditionModel], dict[str, float]]
    prompts: Callable[[], PromptBank] = prompt_bank


def build(seed: int) -> UNet2DConditionModel:
    """A teacher with initial weights from ``seed``. The state of torch's global generator is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return UNet2DConditionModel(**ARCHITECTURE)


def train_teacher(config: TeacherConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Train and evaluate a teacher and write ``<output>/teacher.safetensors``; an interrupted run is continued.

    Returns:
        The provenance stored in the file: settings, data fingerprint, versions, metrics, hash of the weights.
    """
    lesson = Lesson(
        build, {"data": data.fingerprint()}, lambda: data.tinted(data.scans()[0]), lambda model: judged(model, config)
    )
    return trained(config, lesson, progress)


def trained(config: Recipe, lesson: Lesson, progress: Progress | None = None) -> dict[str, Any]:
    """Trains the model of a lesson with a recipe; like ``train_teacher``."""
    config = validated(config, "teacher")
    check_idle(config.train, (*OF_TEACHER, "preview"), "as the teacher has no other")
    check_device(config.train.execution, usable(config.device))
    torch.set_num_threads(config.threads)
    output = located(config.output, "output")
    make_directory(output)
    model = lesson.start(config.train.seed).to(config.device).train().requires_grad_(True)
    bank = lesson.prompts().to(config.device)
    images, rows = (t.to(config.device) for t in lesson.images())
    batch, part = config.train.batch, config.train.micro_batch
    setting = Setting(model, model, SCHEDULE, images, rows, bank.embeddings, batch, micro_batch=part)
    objective = Denoising(config.weight_limit, config.null_probability)
    step = TrainStep(objective.bind(setting), model, config.train, torch.device(config.device))
    recipe = {k: v for k, v in asdict(config).items() if k not in ("output", "device", "threads", "images_per_prompt")}
    fingerprint = {"recipe": recipe, **lesson.made_from, "prompts": bank.identity, "architecture": ARCHITECTURE}
    result = fit(step, model, fingerprint, config.train, output, progress)

    step.optimizer.copy_average(model, model)
    model.eval()
    provenance = fingerprint | {
        "metrics": lesson.judged(model) | {"train_seconds": round(result.seconds, 1)},
        "versions": {
            "fastdistill": fastdistill.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "machine": platform.machine(),
        },
        "sha256": sha256_of_tensors(model.state_dict()),
    }
    tensors = {k: v.cpu().contiguous() for k, v in model.state_dict().items()}
    told = {"schema": schemas.TEACHER.version, **provenance}
    content = safetensors.torch.save(tensors, metadata={"provenance": json.dumps(told)})
    atomic_write(output / "teacher.safetensors", content)
    return provenance


@torch.no_grad()
def judged(model: UNet2DConditionModel, config: TeacherConfig) -> dict[str, float]:
    """The fractions of images that match their prompt, for all, seen and unseen prompts, and the judge's accuracy."""
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
    """The teacher from a file written by ``train_teacher`` (by default the shipped one): frozen, in eval mode, float32
    on the CPU.

    Raises:
        StorageError: the file is missing or damaged, or its weights do not match the hash stored in it.
    """
    tensors, provenance = _read(located(path))
    if sha256_of_tensors(tensors) != provenance["sha256"]:
        raise StorageError(f"{path}: damaged, its tensors do not match the hash stored in it; reinstall the package")
    model = build(0)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise StorageError(
            f"{path}: expected the tensors of a teacher of the digits, got other tensors ({text})"
        ) from error
    return model.eval().requires_grad_(False)


def provenance(path: str | Path = WEIGHTS) -> dict[str, Any]:
    """How the weights in a file were made: settings, data, versions, metrics and the hash of the weights."""
    return _read(located(path))[1]


def other_recipe(made: dict[str, Any], shipped: dict[str, Any]) -> list[str]:
    """The differences between the inputs of two teachers, one line per setting. Without differences, the weights may
    still differ: processors round differently, and training amplifies this."""

    def inputs(provenance: dict[str, Any]) -> dict[str, Any]:
        recipe = dict(provenance["recipe"])
        for name, defaults in (("train", TrainConfig()), ("sampling", Sampling())):
            if name in recipe:
                recipe[name] = _completed(recipe[name], asdict(defaults))  # newer settings: defaults applied
        for shown in ("preview", "trackers"):
            recipe["train"].pop(shown, None)
        others = {name: provenance[name] for name in ("data", "architecture", "start") if name in provenance}
        return plain(recipe | others)

    return differences(inputs(made), inputs(shipped))


def _completed(settings: Any, defaults: Any) -> Any:
    """Settings with defaults for missing ones, at any depth."""
    if not isinstance(settings, dict) or not isinstance(defaults, dict):
        return settings
    return defaults | {name: _completed(value, defaults.get(name)) for name, value in settings.items()}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            provenance = json.loads((file.metadata() or {})["provenance"])
            if not isinstance(provenance, dict) or "sha256" not in provenance:
                raise ValueError("its provenance has no sha256")
            schemas.TEACHER.check(provenance.pop("schema", 1), path)
            return {name: file.get_tensor(name) for name in file.keys()}, provenance  # noqa: SIM118
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{path}: could not be read: {reason(error)}") from error
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise StorageError(f"{path}: damaged, not the weights of a teacher ({error}); reinstall the package") from error
