# SPDX-License-Identifier: Apache-2.0
"""Classifiers of the task: CaDistill and baselines, trained with the same step, loop and budget.

=============  ========================================================================================================
kind           is trained with cross-entropy on its data, and
=============  ========================================================================================================
plain          nothing else
samples        the losses of CaDistill on images that were inverted and decoded (k = 0)
random         the same, but a random direction of the latent is removed instead of the teacher's
generated      the same on canonical images made from noise, not from real images
labels         CaDistill with one-hot labels instead of the teacher's canonical feature
feature_kd     alignment with the teacher's feature for the original images
logit_kd       the teacher's posterior for the original images (the teacher as a diffusion classifier)
augment        its images with random hues and added noise: it is told what is irrelevant
cadistill      canonical images, their labels, and the teacher's feature for them
=============  ========================================================================================================
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor

from fastdistill.data.fingerprint import sha256_of_tensors
from fastdistill.distill.cadistill import CaDistill, Weight
from fastdistill.distill.canonical import Clarid
from fastdistill.distill.classifier import Augmentation, ClassifierSetting
from fastdistill.documented import documented
from fastdistill.errors import InputError
from fastdistill.files import atomic_write, located, locked, make_directory
from fastdistill.schemas import CLASSIFIERS
from fastdistill.tasks.context import data
from fastdistill.tasks.context.classifier import Classifier
from fastdistill.tasks.context.sets import CLARID, PER_CLASS, Name, Sets, make_sets
from fastdistill.tasks.context.teacher import SCHEDULE
from fastdistill.tasks.context.teacher import Kind as TeacherKind
from fastdistill.train.arguments import OF_TEACHER, check_idle
from fastdistill.train.callbacks import Progress
from fastdistill.train.config import Seed, TrainConfig, TrainSettings, validated
from fastdistill.train.devices import usable
from fastdistill.train.graph import check_device
from fastdistill.train.loop import fit
from fastdistill.train.step import TrainStep

Kind = Literal["plain", "samples", "random", "generated", "labels", "feature_kd", "logit_kd", "augment", "cadistill"]
KINDS: tuple[Kind, ...] = get_args(Kind)
#: The set from which a kind learns.
SET: dict[str, Name] = {
    "samples": "samples", "random": "random", "generated": "generated", "labels": "canonical",
    "feature_kd": "originals", "logit_kd": "originals", "cadistill": "canonical",
}  # fmt: skip


def needed(kinds: Sequence[str]) -> list[Name]:
    """The sets that these kinds of classifiers need."""
    return list(dict.fromkeys([SET[kind] for kind in kinds if kind in SET] + ["posterior"] * ("logit_kd" in kinds)))


@documented
@dataclass(frozen=True)
class StudentConfig:
    """How a classifier is trained."""

    kind: Kind = "cadistill"
    """plain, cadistill, or one of the baselines (docs/canonical.md)."""
    seed: Seed = 0
    """Seed of the initial weights and of all draws."""
    train: TrainSettings = field(
        default_factory=lambda: TrainSettings(
            steps=400,
            batch=64,
            lr=3e-3,
            lr_schedule="cosine",
            warmup=40,
            ema_decay=0.99,
            log_every=50,
            checkpoint_every=200,
        )
    )
    canonical_batch: Annotated[int, Field(ge=4)] = 64
    """Rows of the canonical set per step; limited to the size of the set."""
    width: Annotated[int, Field(ge=8)] = 32
    """Channels of the first convolution."""
    align: Weight = 1.0
    """Weight of the cosine distance between features and the prototype of their class."""
    canonical: Weight = 0.5
    """Weight of the cosine distance between canonical features and their prototype."""
    distance: Weight = 0.5
    """Weight of 1 - CKA between canonical features and the teacher's."""
    own_labels: bool = True
    """Add cross-entropy on the canonical images."""
    cka: Literal["debiased", "biased"] = "debiased"
    """Form of CKA."""
    pooled: bool = False
    """Average the teacher's feature over its positions before the alignment."""
    posterior: Weight = 1.0
    """For kind logit_kd: weight of the teacher's posterior."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.5
    """For kind augment: maximum rotation of the hues in both directions, as a fraction of the circle."""
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.2
    """For kind augment: maximum standard deviation of the added noise."""
    device: str = "cpu"
    """Device to train on."""


def check_training(config: StudentConfig, place: str = "train") -> None:
    """Refuse settings of the training that a classifier does not read, and a device that has not what they need.

    Raises:
        InputError, FastdistillError: the message names the setting.
    """
    check_idle(config.train, OF_TEACHER, "as a classifier has no other", place)
    check_device(config.train.execution, usable(config.device))


def objective(config: StudentConfig) -> CaDistill:
    """The losses of a kind."""
    names = ("align", "canonical", "distance", "own_labels", "cka", "pooled")
    whole = CaDistill(**{name: getattr(config, name) for name in names})
    if config.kind == "plain":
        return CaDistill.plain()
    if config.kind == "augment":
        return CaDistill.plain(Augmentation(config.hue, config.noise))
    if config.kind == "labels":
        return dataclasses.replace(whole, target="labels")
    if config.kind == "feature_kd":
        return dataclasses.replace(whole, align=0.0, canonical=0.0, own_labels=False)
    if config.kind == "logit_kd":
        return dataclasses.replace(CaDistill.plain(), posterior=config.posterior)
    return whole


def train_student(
    config: StudentConfig, sets: Sets | None = None, directory: Path | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Trains a classifier. With a directory, an interrupted run is continued and ``student.safetensors`` is written.

    Returns:
        ``kind``, ``seed``, ``right`` by the kind of held-out images (``data.HELD_OUT``), ``seconds``, ``losses`` of the
        last log interval, ``weights`` by name and their ``sha256``.

    Raises:
        InputError: a set that the kind needs is missing.
    """
    config = validated(config, "student")
    check_training(config)
    device, scenes = torch.device(config.device), data.students()
    student = Classifier(config.seed, config.width).to(device).train()
    wanted, found = SET.get(config.kind), sets or Sets()
    canonical = None if wanted is None else getattr(found, wanted)
    if wanted is not None and canonical is None:
        raise InputError.of("sets", f"{wanted} (make_sets), for the kind {config.kind}", "none")
    if config.kind == "logit_kd" and found.posterior is None:
        raise InputError.of("sets", "posterior (make_sets), for the kind logit_kd", "none")
    train = TrainConfig(**dataclasses.asdict(config.train), seed=config.seed)
    setting = ClassifierSetting(
        student, scenes.images.to(device), scenes.digit.to(device), canonical, batch=train.batch,
        canonical_batch=None if canonical is None else min(config.canonical_batch, len(canonical)),
        posterior=found.posterior if config.kind == "logit_kd" else None, micro_batch=train.micro_batch,
    )  # fmt: skip
    losses = objective(config)
    step = TrainStep(losses.bind(setting), student, train, device)
    recipe = {"objective": losses.describe(), "train": dataclasses.asdict(train), "width": config.width}
    result = fit(step, student, setting.fingerprint() | recipe, train, directory, progress)
    step.optimizer.copy_average(student, student)
    student.eval()
    weights = {name: value.detach().cpu().contiguous() for name, value in student.state_dict().items()}
    told = {
        "kind": config.kind,
        "seed": config.seed,
        "right": right(student),
        "seconds": result.seconds,
        "losses": {name: value for name, value in result.history[-1].items() if name not in ("step", "seconds")},
        "sha256": sha256_of_tensors(weights),
    }
    if directory is not None:
        content = safetensors.torch.save(weights, metadata={"student": json.dumps(told | {"width": config.width})})
        atomic_write(directory / "student.safetensors", content)
    return told | {"weights": weights}


@torch.no_grad()
def right(student: Classifier) -> dict[str, float]:
    """The accuracy on each kind of held-out images."""
    device = next(student.parameters()).device
    found = {}
    for kind in data.HELD_OUT:
        scenes = data.held_out(kind)
        logits: Tensor = student(scenes.images.to(device))[1]
        found[kind] = float((logits.argmax(1).cpu() == scenes.digit).double().mean())
    return found


def restored(weights: Mapping[str, Tensor], width: int = 32) -> Classifier:
    """The classifier of the ``weights`` of ``train_student``, in eval mode."""
    student = Classifier(0, width)
    student.load_state_dict(dict(weights))
    return student.eval().requires_grad_(False)


@documented
@dataclass(frozen=True)
class StudentsConfig:
    """Train classifiers of the task, and make the canonical images that they learn from."""

    kinds: Annotated[tuple[Kind, ...], Field(min_length=1)] = ("plain", "cadistill")
    """Kinds to train: plain, cadistill, or baselines (docs/canonical.md)."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    """For each seed, one classifier of each kind is trained."""
    student: StudentConfig = field(default_factory=StudentConfig)
    """How each is trained; kind and seed are those above."""
    teacher: TeacherKind = "broad"
    """Data of the teacher: broad: backgrounds of any hue; same: only the classifier's own data."""
    per_class: Annotated[int, Field(ge=1)] | None = PER_CLASS
    """Number of images per digit for which canonical images are made; none: all."""
    t_e: Annotated[int, Field(ge=1, le=999)] = CLARID.t_e
    """Timestep of the canonical latents."""
    k: Annotated[int, Field(ge=1, le=192)] = CLARID.k
    """Number of directions that are projected out."""
    tap: str = CLARID.tap
    """Feature of the teacher that the directions move most."""
    steps: Annotated[int, Field(ge=1)] = CLARID.steps
    """Number of steps of the inversion, and of the decoding."""
    threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads; one is fastest on small machines."""
    output: str = "runs/cadistill"
    """Directory for the sets, with a subdirectory for each classifier; interrupted work in it is continued."""


def train_students(
    config: StudentsConfig, progress: Callable[[str, int, int], object] | None = None
) -> list[dict[str, Any]]:
    """Makes the sets that the kinds need and trains the classifiers. Returns the results of ``train_student`` without
    the weights. Only one process at a time may use the output directory.

    Args:
        progress: called with the name of the current part, how much of it is done, and its total.
    """
    config = validated(config, "cadistill")
    check_training(config.student, "student.train")
    clarid = Clarid(config.t_e, config.k, config.tap, config.steps)
    clarid.grid(SCHEDULE)
    output, show = located(config.output, "output"), progress or (lambda name, done, total: None)
    torch.set_num_threads(config.threads)
    make_directory(output)
    with locked(output):
        names = needed(config.kinds)
        options: dict[str, Any] = {"per_class": config.per_class, "teacher": config.teacher}
        options |= {"clarid": clarid, "device": config.student.device, "progress": show}
        sets = make_sets(output / "sets", names, **options) if names else Sets()
        results = []
        for seed in config.seeds:
            for kind in config.kinds:
                own = dataclasses.replace(config.student, kind=kind, seed=seed)

                def step(done: int, _: object, own: StudentConfig = own) -> None:
                    show(f"{own.kind}-{own.seed}", done, own.train.steps)

                told = train_student(own, sets, output / f"{kind}-{seed}", step)
                told.pop("weights")
                results.append(told)
        content = {"schema": CLASSIFIERS.version, "students": results, "config": dataclasses.asdict(config)}
        atomic_write(output / "students.json", json.dumps(content, indent=1).encode())
    return results
