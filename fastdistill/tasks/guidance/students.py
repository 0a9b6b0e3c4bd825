# SPDX-License-Identifier: Apache-2.0
"""The students of the guidance experiment: their data, training and sampling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from fastdistill.data.latent_cache import LatentCache, generate_latent_cache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Guidance
from fastdistill.diffusion.guided import sample as sample_on
from fastdistill.diffusion.sampler import initial_noise
from fastdistill.distill import GuidanceDistillation, RandomConditioning, Weights
from fastdistill.distill.objective import Objective
from fastdistill.distill.trajectory import TrajectoryCache, generate_trajectory_cache
from fastdistill.evaluate.diagnosis import Sample
from fastdistill.files import located
from fastdistill.models import families, make_student
from fastdistill.models.specs import StudentSpec
from fastdistill.models.students import Student as Made
from fastdistill.models.weights import weights_hash
from fastdistill.tasks.digits import data
from fastdistill.tasks.digits.sampling import SCHEDULE
from fastdistill.tasks.guidance.demo_config import DemoConfig
from fastdistill.tasks.processes import Report
from fastdistill.tasks.shades.sampling import sample
from fastdistill.train import DistillTrainer, FitResult

_NARROW = (24, 48)  # channels of the students trained on caches, as in the digits
_SEED = 0  # for the images in a cache


@dataclass(frozen=True)
class Student:
    """weights: schedules of its cache, assigned to the images in turn. scales: weights at which it is measured; none:
    the weight is not one of its inputs. lowest: share of its samples with the lowest weight. trajectory: it is trained
    on the states of guided sampling. conditioned: trained by random conditioning, and sampled with the schedule."""

    weights: tuple[str, ...]
    scales: tuple[float, ...] = ()
    trajectory: bool = False
    conditioned: bool = False
    lowest: float = 0.0
    weight_limit: float = 50.0  # windows act at sigma = 2 to 10, where 1 / abar is 5 to 101


def students(config: DemoConfig) -> dict[str, Student]:
    """The students of a configuration by name."""
    scales = tuple(f"{w:g}" for w in config.scales)
    found = {"scale": Student(scales, config.scales, lowest=0.2), "window": Student((config.student,), trajectory=True)}
    if config.full:
        found["window_noised"] = Student((config.student,))
        found["cache_constant"] = Student(("1",), conditioned=True)
        found["cache_window"] = Student((config.student,), conditioned=True)
    return found


def trained(
    config: DemoConfig, name: str, seed: int, teacher: nn.Module, bank: PromptBank, directory: Path, report: Report
) -> tuple[nn.Module, FitResult]:
    """A student by name, from a checkpoint if there is one."""
    student = students(config)[name]
    latents = (_trajectories if student.trajectory else _cache)(config, student, teacher, bank, report)
    made = initial(student, teacher, seed)
    train = dataclasses.replace(config.train, seed=config.train.seed + seed)
    objective: Objective
    if student.conditioned:
        train = dataclasses.replace(train, steps=3 * train.steps, lr=4 * train.lr)  # the recipe of the digits
        objective = RandomConditioning(taps=tuple(zip(made.teacher_taps, made.student_taps, strict=True)))
    else:
        scale = (min(student.scales), max(student.scales)) if student.scales else None
        schedule = "1" if student.scales else config.student
        states: Literal["noised", "trajectory"] = "trajectory" if student.trajectory else "noised"
        weights = Weights(feature=0.0)
        options = {"grid": config.grid, "states": states, "weights": weights, "weight_limit": student.weight_limit}
        options["lowest"] = student.lowest
        objective = GuidanceDistillation(schedule, scale=scale, **options)  # type: ignore[arg-type]
    trainer = DistillTrainer(teacher, made.model, SCHEDULE, latents, bank, objective, train, device=config.device)

    def progress(done: int, metrics: dict[str, float] | None) -> None:
        report(phase="training", done=done, total=train.steps, loss=metrics and metrics["loss"])

    fitted = trainer.fit(directory / "training", progress=progress)
    return trainer.ema_student(), fitted


def initial(student: Student, teacher: nn.Module, seed: int = 0) -> Made:
    """A student before its training: of the teacher's size, or narrower and not from the teacher's weights."""
    if student.conditioned:
        return make_student(teacher, StudentSpec(block_out_channels=_NARROW), init="random", seed=seed)
    return make_student(teacher, StudentSpec(), seed=seed, guidance_embedding=bool(student.scales))


def sampler(config: DemoConfig, student: Student, model: nn.Module, bank: PromptBank, scale: float) -> Sample:
    """(schedule, prompts [n], noises [n], seed) -> images: with one evaluation per step, except for the student by
    random conditioning, which is guided by the schedule. scale: the weight for a student with this input."""
    grid = Grid.parse(config.grid, SCHEDULE)
    family, own = families.find(model), families.unwrapped(model).config
    assert family is not None

    def images(schedule: Guidance, prompts: Tensor, noises: Tensor, seed: int) -> Tensor:
        device = bank.embeddings.device
        noise = initial_noise(seed, noises.to(device), data.SHAPE)
        rows = {families.EMBEDDINGS: bank.embeddings[prompts.to(device)]}
        if student.conditioned:
            return sample_on(model, noise, rows, {families.EMBEDDINGS: bank.null}, grid, guidance=schedule).cpu()
        if student.scales:
            given = torch.full((len(prompts),), scale, device=device)
            rows[str(family.guidance_bank(own))] = family.guidance_rows(own, given)
        return sample_on(model, noise, rows, None, grid).cpu()

    return images


def _trajectories(
    config: DemoConfig, student: Student, teacher: nn.Module, bank: PromptBank, report: Report
) -> LatentCache:
    """The states of the sampler guided by the student's schedule; processes that need the same states share the
    work."""
    grid, (schedule,) = Grid.parse(config.grid, SCHEDULE), student.weights
    path = located(config.output) / "cache" / f"trajectories-{_named(student)}"
    progress = _told(report)
    generate_trajectory_cache(
        path, teacher, bank, _prompts(config, student), data.SHAPE, grid, schedule, seed=_SEED, progress=progress
    )
    return TrajectoryCache.load(path, device=config.device)


def _cache(config: DemoConfig, student: Student, teacher: nn.Module, bank: PromptBank, report: Report) -> LatentCache:
    """The teacher's images from which a student learns; processes that need the same images share the work."""
    prompts, kinds = _prompts(config, student), student.weights
    turn = len(set(prompts.tolist()))
    made_from = {
        "teacher": weights_hash(teacher),
        "prompts": bank.identity,
        "guidance": list(kinds),
        "grid": config.grid,
        "seed": _SEED,
    }

    def generate(numbers: Tensor, wanted: Tensor) -> Tensor:
        images = torch.empty(len(numbers), *data.SHAPE)
        for place, kind in enumerate(kinds):
            own = numbers // turn % len(kinds) == place
            images[own] = sample(teacher, bank, wanted[own], numbers[own], _SEED, config.grid, kind)
        return images

    path = located(config.output) / "cache" / _named(student)
    generate_latent_cache(
        path,
        generate,
        prompts,
        data.SHAPE,
        torch.float32,
        made_from,
        rows_per_shard=256,
        progress=_told(report),
    )
    return LatentCache.load(path, device=config.device)


def _prompts(config: DemoConfig, student: Student) -> Tensor:
    """The prompts of a cache, in turn; for random conditioning the same prompts as in the digits' experiment."""
    rows = data.SEEN if student.conditioned else range(len(data.PROMPTS))
    return torch.tensor(list(rows)).repeat(-(-config.cache_images // len(rows)))[: config.cache_images]


def _named(student: Student) -> str:
    """The folder of a cache."""
    return "-".join(student.weights).replace("@", "_").replace(",", "_") + ("-seen" if student.conditioned else "")


def _told(report: Report) -> Callable[[int, int], object]:
    return lambda done, total: report(phase="cache", done=done, total=total)
