# SPDX-License-Identifier: Apache-2.0
"""The effect of guidance schedules on the shipped teachers of the digits and the shades (``fastdistill guidance
diagnose``)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from rich.console import Console
from torch import Tensor, nn

from fastdistill.data.fingerprint import plain
from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Guidance
from fastdistill.documented import documented
from fastdistill.errors import InputError, called
from fastdistill.evaluate.diagnosis import checked_schedules, diagnose
from fastdistill.evaluate.frontier import Diagnosis, Recovered, Row
from fastdistill.evaluate.guidance import write_guidance_report
from fastdistill.evaluate.page import percent
from fastdistill.files import located, locked, make_directory
from fastdistill.models.weights import weights_hash
from fastdistill.tables import print_table
from fastdistill.tasks.digits import data
from fastdistill.tasks.digits.judge import Judge
from fastdistill.tasks.digits.sampling import SCHEDULE
from fastdistill.tasks.digits.teacher import load_teacher as digits_teacher
from fastdistill.tasks.digits.text_encoder import prompt_bank
from fastdistill.tasks.shades import data as shades
from fastdistill.tasks.shades.judge import read, right
from fastdistill.tasks.shades.sampling import GRID, sample
from fastdistill.tasks.shades.teacher import load_teacher as shades_teacher
from fastdistill.tasks.workers import versions
from fastdistill.train.config import validated
from fastdistill.train.devices import usable

_COMPONENTS = 20  # of the ink, in which the digits' variance is measured
SEED = 2**31  # of the initial noise, different from caches and training


@documented
@dataclass(frozen=True)
class ShadesDiagnosis:
    """Sample the shipped teacher with schedules of guidance, and compare variance and accuracy with constants."""

    schedules: tuple[str, ...] = (
        *("0", "0.5", "1", "1.5", "2", "3"),
        *("4@8,-1@2,0", "8@10,-1@2,0", "11.2@12,-1@1.5,0", "8@8,-1@2,0"),
    )
    """Schedules of w: constants, one of which must be 0, and windows, which are compared with the constants."""
    grid: str = GRID
    """Noise levels of the sampler: trailing:20, karras:30 or karras:30@30..0.09."""
    clip_sample: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Limit of the magnitude of the predicted clean sample; none: no limit."""
    seeds: Annotated[int, Field(ge=1, le=100)] = 3
    """Number of seeds; confidence intervals are over the images of all seeds."""
    images_per_prompt: Annotated[int, Field(ge=1, le=1000)] = 8
    """Images per prompt (there are 80), schedule and seed."""
    draws: Annotated[int, Field(ge=8, le=100_000)] = 400
    """Number of bootstrap resamples."""
    quick: bool = False
    """Short version: one seed, two images per prompt, w = 0, 1, 2 and the first two windows (output ends in -quick)."""
    output: str = "runs/guidance-shades"
    """Directory for the report; an interrupted call in it is continued."""
    batch: Annotated[int, Field(ge=1)] = 64
    """Batch size of the sampling."""
    threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads."""
    device: str = "cpu"
    """Device to sample on."""
    json: bool = False
    """Print the report as JSON."""

    def resolved(self) -> ShadesDiagnosis:
        """The configuration with ``quick`` applied."""
        if not self.quick:
            return self
        windows = [text for text in self.schedules if "@" in text][:2]
        constants = [text for text in self.schedules if text in ("0", "1", "2")]
        output = f"{self.output}-quick" if self.output == type(self).output else self.output
        schedules = (*constants, *windows)
        return dataclasses.replace(self, schedules=schedules, seeds=1, images_per_prompt=2, output=output)


@documented
@dataclass(frozen=True)
class DigitsDiagnosis(ShadesDiagnosis):
    """Sample the shipped teacher with schedules of guidance, and compare variance and accuracy with constants."""

    schedules: tuple[str, ...] = ("0", "1", "2", "4", "8", "2@0.74,-1@0.1,0", "2@1,-1@0.1,0", "4@1.5,-1@0.5,0")
    """Schedules of w: constants, one of which must be 0, and windows, which are compared with the constants."""
    grid: str = "trailing:20"
    """Noise levels of the sampler: trailing:20, karras:30 or karras:30@30..0.09."""
    clip_sample: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 1.2
    """Limit of the magnitude of the predicted clean sample; none: no limit."""
    output: str = "runs/guidance-digits"
    """Directory for the report; an interrupted call in it is continued."""


CONFIGS: dict[str, type[ShadesDiagnosis]] = {"digits": DigitsDiagnosis, "shades": ShadesDiagnosis}


@dataclass(frozen=True)
class Subject:
    """What is measured in a task.

    features: images -> [n, D]. classes: [80] int64, the class of each prompt. reference: real images and their classes.
    right: (images, prompts) -> [n] bool.
    """

    model: nn.Module
    features: Callable[[Tensor], Tensor]
    classes: Tensor
    reference: tuple[Tensor, Tensor]
    right: Callable[[Tensor, Tensor], Tensor]


def subject(task: str, model: nn.Module | None = None) -> Subject:
    """The shipped teacher of a task, or another model, with its measures. The variance is that within classes: for the
    shades of the tint, by color; for the digits of 20 principal components of the ink, by digit."""
    judge, prompts = Judge(), torch.arange(len(data.PROMPTS))
    if task == "shades":
        images, rows = shades.held_out()
        colors = prompts // len(data.DIGITS)

        def both(images: Tensor, prompts: Tensor) -> Tensor:
            found = right(judge, images, prompts)
            return found.color & found.digit

        reference = images, colors[rows]
        return Subject(model or shades_teacher(), lambda images: read(images).tint, colors, reference, both)
    if task != "digits":
        raise InputError.of("task", " or ".join(CONFIGS), repr(task))
    kept = data.scans()[0]
    ink = kept.ink.double().flatten(1)
    mean = ink.mean(0)
    components = torch.linalg.eigh(torch.cov(ink.T)).eigenvectors[:, -_COMPONENTS:]

    def features(images: Tensor) -> Tensor:
        projected: Tensor = (judge.unmixed(images)[1].double().flatten(1) - mean) @ components
        return projected

    white = kept.ink[:, None].expand(-1, *data.SHAPE)
    digits = prompts % len(data.DIGITS)
    return Subject(model or digits_teacher(), features, digits, (white, kept.digit), judge.right)


def _checked(config: ShadesDiagnosis) -> Grid:
    """The grid; InputError for one that does not exist, or schedules that do not fit it."""
    with called("grid"):
        grid = Grid.parse(config.grid, SCHEDULE)
    with called("schedules"):
        checked_schedules(config.schedules, grid)
    return grid


def measured(
    task: str,
    config: ShadesDiagnosis,
    model: nn.Module | None = None,
    *,
    keep: Path | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Diagnosis:
    """Measures the schedules of a configuration with a task's teacher, or with another model of the task."""
    grid = _checked(config)  # before anything is loaded
    measure = subject(task, model)
    network = measure.model.to(config.device).eval()
    bank = prompt_bank().to(config.device)

    def make(guidance: Guidance, prompts: Tensor, noises: Tensor, seed: int) -> Tensor:
        return sample(network, bank, prompts, noises, seed, grid, guidance, clip_sample=config.clip_sample)

    prompts = torch.arange(len(data.PROMPTS)).repeat_interleave(config.images_per_prompt)
    return diagnose(
        make,
        measure.features,
        prompts,
        measure.reference,
        config.schedules,
        grid,
        classes=measure.classes[prompts],
        right=measure.right,
        seeds=range(SEED, SEED + config.seeds),
        batch=config.batch,
        draws=config.draws,
        keep=keep,
        made_from={"model": weights_hash(network), "prompts": bank.identity, "clip_sample": config.clip_sample},
        progress=progress,
    )


def run(
    task: str, config: ShadesDiagnosis, progress: Callable[[int, int], object] | None = None
) -> tuple[Diagnosis, dict[str, Any]]:
    """Measure a task's teacher and write ``report.json`` and ``report.html`` into the output directory. Samples of an
    interrupted call are used again. Returns the diagnosis and the report.

    Raises:
        InputError: an invalid option, before anything is sampled. StorageError: another process writes there.
    """
    from fastdistill.evaluate.guidance_figures import diversity_plane

    config = validated(config, f"guidance diagnose {task}").resolved()
    usable(config.device)
    _checked(config)
    torch.set_num_threads(config.threads)
    output = located(config.output, "output")
    make_directory(output)
    start = time.perf_counter()
    with locked(output):
        found = measured(task, config, keep=output / "samples", progress=progress)
        rows = found.to_json()
        report = {
            "title": f"Guidance of the {task} teacher",
            "finding": finding(found),
            "models": {task: rows},
            "students": {},
            "worlds": {},
            "seconds": {"total": time.perf_counter() - start},
            "versions": versions(),
            "config": plain(dataclasses.asdict(config)),
            "reproduce": [f"fastdistill guidance diagnose {task}" + (" --quick" if config.quick else "")],
        }
        write_guidance_report(output, report, {"plane": diversity_plane(rows["rows"])})
    return found, report


def finding(diagnosis: Diagnosis) -> str:
    """The variance that constant guidance loses, and how much of it windows restore at equal separation or accuracy."""
    rows = {row.schedule: row for row in diagnosis.rows}
    parts = []
    if (free := rows.get("0")) and (one := rows.get("1")):
        lost = percent(1 - one.variance_ratio.value / free.variance_ratio.value, 0)
        parts.append(f"Constant guidance of w = 1 takes {lost} of the variance within a class.")
    for at in ("separation", "accuracy"):
        known = [given for given in diagnosis.recovered if given.at == at and given.interval[0] > 0]
        if known:
            best = max(known, key=lambda given: given.value)
            low, high = (percent(end, 0) for end in best.interval)
            share = f"{percent(best.value, 0)} [{low}, {high}]"
            parts.append(f"At equal {at}, {best.schedule} gives back {share} of what a constant weight takes.")
        elif any(given.at == at for given in diagnosis.recovered):
            parts.append(f"At equal {at}, no window that was tried gives variance back beyond its error.")
    return " ".join(parts)


def summarize(console: Console, rows: Sequence[Row], recovered: Sequence[Recovered]) -> None:
    """Print the main figures of a diagnosis."""
    names = ("right", "separation", "variance_ratio", "recall", "vendi")
    measures = ("right", "separation", "variance", "recall", "Vendi")
    columns = ("schedule", *measures, "passes", "given back", "at equal right")
    back = {(given.schedule, given.at): given for given in recovered}
    cells = []
    for row in rows:
        values = [f"{getattr(row, name).value:.3f}" for name in names]
        shares = [back.get((row.schedule, at)) for at in ("separation", "accuracy")]
        texts = [f"{s.value:.2f} [{s.interval[0]:.2f}, {s.interval[1]:.2f}]" if s else "" for s in shares]
        cells.append((row.schedule, *values, str(row.evaluations_per_image), *texts))
    print_table(console, columns, cells)
