# SPDX-License-Identifier: Apache-2.0
"""The effect of guidance schedules on the samples of any model, measured against real samples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fastdistill.data.fingerprint import sha256_of_json, sha256_of_tensors
from fastdistill.diffusion.distortion import Method
from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Function, Guidance
from fastdistill.errors import InputError, described
from fastdistill.evaluate._optional import require
from fastdistill.evaluate.diversity import (
    LIMITS,
    Interval,
    bootstrap_all,
    density_coverage,
    precision_recall,
    vendi_score,
)
from fastdistill.evaluate.frontier import MEASURED, Diagnosis, Row, frontier
from fastdistill.evaluate.guidance import constant_of
from fastdistill.evaluate.metrics import wilson_interval
from fastdistill.evaluate.spread import Spread
from fastdistill.files import atomic_write, located, make_directory
from fastdistill.ops import _check
from fastdistill.schemas import SAMPLES

#: (schedule, prompts [n], noises [n], seed) -> samples [n, ...].
Sample = Callable[[Guidance, Tensor, Tensor, int], Tensor]


@torch.no_grad()
def diagnose(
    sample: Sample,
    features: Callable[[Tensor], Tensor],
    prompts: Tensor,
    reference: tuple[Tensor, Tensor],
    schedules: Sequence[Guidance | str | float],
    grid: Grid,
    *,
    classes: Tensor | None = None,
    right: Callable[[Tensor, Tensor], Tensor] | None = None,
    seeds: Sequence[int] = (0,),
    method: Method = "ddim",
    batch: int = 64,
    draws: int = 200,
    neighbours: int = 5,
    keep: str | Path | None = None,
    made_from: Any = None,
    progress: Callable[[int, int], object] | None = None,
) -> Diagnosis:
    """Measures a model under each schedule against real samples.

    Args:
        sample: called with (schedule, prompts [n], noises [n], seed) for at most ``batch`` samples [n, ...]; a sample
            should depend only on its own prompt, noise and seed, so that schedules are compared on the same noise.
        features: samples [n, ...] -> features [n, D], used for the reference too.
        prompts: [N] int64, one per sample; noise n is that of prompts[n].
        reference: real samples [M, ...] and their classes [M] int64.
        schedules: schedules, texts or weights. ``recovered`` needs 0 and at least one other constant among them.
        grid: the sampler's, for the number of evaluations; thresholds are checked before anything is sampled.
        classes: [N] int64, of the samples; None: the prompts. At least two samples of each class, as in the reference.
        right: (samples, prompts) -> [n] bool, whether a judge finds the prompt in the sample.
        seeds: each makes N samples.
        draws: for an interval; a quarter of them for figures by neighbours.
        keep: a directory for the features computed so far, so that an interrupted call can be resumed. made_from: JSON
            value for all other inputs of the samples (for example the weights), with ``keep``.
        progress: called with (samples made, all of them).

    Raises:
        InputError: before anything is sampled: a schedule that does not fit the grid, no schedule, a schedule twice,
            classes that are not in the reference or have one sample, features of another width, too few samples.
    """
    parsed = checked_schedules(schedules, grid)
    _check.valued(prompts=prompts)
    _check.dtype(prompts, "prompts", torch.int64)
    _check.shape(prompts, "prompts", (None,), "one per sample, [N]")
    labels = _labels(prompts if classes is None else classes, "prompts" if classes is None else "classes", len(prompts))
    numbers = _seeds(seeds)
    _check.whole(batch, "batch", "at least 1")
    if draws < 8:
        raise InputError.of("draws", "at least 8", draws)
    if right is not None:
        require("scipy.stats")  # for the interval of a share
    if not isinstance(reference, tuple) or len(reference) != 2:
        raise InputError.of("reference", "real samples and their classes", described(reference))
    real, real_labels = reference
    _check.valued(reference=real)
    real_labels = _labels(real_labels, "reference", len(real))
    _check_classes(labels, real_labels)
    for name, count in (("prompts", len(prompts) * len(numbers)), ("reference", len(real))):
        if count // 2 <= neighbours:
            rule = f"more than {2 * neighbours + 1}: {neighbours} neighbours in each half"
            raise InputError.of(name, rule, count)
    known = _whole(features, real, batch)
    measure = _Measure(known, real_labels, draws, neighbours)
    order = 2 if method == "heun" else 1
    given = {"reference": known, "prompts": prompts, "classes": labels, "signal": grid.signal, "noise": grid.noise}
    made = {"of": made_from, "given": sha256_of_tensors(given)}
    rows = []
    total, done = len(parsed) * len(numbers) * len(prompts), 0
    for schedule in parsed:
        cells = []
        for seed in numbers:
            key = made | {"schedule": _identity(schedule, grid), "seed": seed}

            def told(made: int, before: int = done) -> None:
                if progress is not None:
                    progress(before + made, total)

            cell = _Cell.kept(keep, key, len(prompts))
            if cell is None:
                cell = _Cell.made(sample, features, right, schedule, prompts, seed, batch, known.shape[1], told)
                cell.keep(keep, key)
            done += len(prompts)
            told(0, done)
            cells.append(cell)
        found = torch.cat([cell.features for cell in cells])
        judged = torch.cat([cell.right for cell in cells]) if right is not None else None
        seconds = sum(cell.seconds for cell in cells)
        figures, drawn = measure(found, labels.repeat(len(numbers)), judged)
        rows.append(
            Row(
                schedule=str(schedule),
                grid=str(grid),
                seeds=len(numbers),
                images=len(found),
                evaluations_per_image=schedule.evaluations(grid, order),
                images_per_second=len(found) / seconds,
                **figures,
                draws=drawn,
            )
        )
    constants = [row for row in rows if constant_of(row.schedule) is not None]
    enough = len(constants) > 1 and any(constant_of(row.schedule) == 0 for row in constants)
    return Diagnosis(rows, frontier(rows) if enough else [])


class _Measure:
    """The figures of samples compared with a reference."""

    def __init__(self, reference: Tensor, labels: Tensor, draws: int, neighbours: int) -> None:
        self.spread = Spread(reference, labels)
        self.reference, self.labels, self.draws, self.k = reference, labels, draws, neighbours
        variances = [reference[labels == label].double().var(0).sum() for label in torch.unique(labels)]
        self.scale = float(torch.stack(variances).mean())

    def __call__(self, x: Tensor, labels: Tensor, right: Tensor | None) -> tuple[dict[str, Interval], Tensor]:
        value, drawn = self.spread(x, labels, right, self.draws)
        ends = drawn.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64), 0)
        figures = {
            name: Interval(float(value[place]), float(ends[0, place]), float(ends[1, place]))
            for place, name in enumerate(MEASURED)
        }
        figures["mean_shift"] = figures["mean_shift"].within(0)
        if right is not None:
            figures["right"] = Interval(float(value[3]), *wilson_interval(int(right.sum()), len(right)))
        fewer = max(2, self.draws // 4)
        count = min(len(x), len(self.reference))  # the size of the reference affects recall
        order = torch.randperm(len(self.reference), generator=torch.Generator().manual_seed(0))
        real = self.reference[order[:count]]
        near = bootstrap_all(self._near, real, x, n=fewer, replace=False)
        figures |= {name: found.within(0, LIMITS[name]) for name, found in zip(LIMITS, near, strict=True)}
        return figures | {"vendi": self._vendi(x, labels, fewer)}, drawn

    def _near(self, real: Tensor, fake: Tensor) -> tuple[float, ...]:
        return (*precision_recall(real, fake, self.k), *density_coverage(real, fake, self.k))

    def _vendi(self, x: Tensor, labels: Tensor, draws: int) -> Interval:
        groups = [x[labels == label] for label in torch.unique(labels)]

        def kernel(one: Tensor, two: Tensor) -> Tensor:
            return (-torch.cdist(one, two).square() / (2 * self.scale)).exp()

        def mean(*groups: Tensor) -> tuple[float]:
            return (sum(vendi_score(group, kernel) for group in groups) / len(groups),)

        if min(map(len, groups)) < 4:
            return Interval(mean(*groups)[0], math.nan, math.nan)
        return bootstrap_all(mean, *groups, n=draws, replace=False)[0]


@dataclass(frozen=True)
class _Cell:
    """The results of one schedule and one seed: features [N, D], right [N] bool, seconds of sampling."""

    features: Tensor
    right: Tensor
    seconds: float

    @classmethod
    def made(
        cls, sample: Sample, features: Callable[[Tensor], Tensor], right: Callable[[Tensor, Tensor], Tensor] | None,
        schedule: Guidance, prompts: Tensor, seed: int, batch: int, width: int, progress: Callable[[int], object],
    ) -> _Cell:  # fmt: skip
        noises = torch.arange(len(prompts))
        found, judged, seconds = [], [], 0.0
        for wanted, numbers in zip(torch.split(prompts, batch), torch.split(noises, batch), strict=True):
            start = time.perf_counter()
            made = sample(schedule, wanted, numbers, seed)
            if made.is_cuda:
                torch.cuda.synchronize(made.device)
            seconds += time.perf_counter() - start
            if len(made) != len(wanted):
                raise InputError.of("sample", f"{len(wanted)} samples, one per prompt", len(made))
            if not made.isfinite().all():
                raise InputError.of("sample", "finite samples", f"NaN or infinity with {schedule}")
            found.append(_featured(features, made, width))
            judged.append(_judged(right, made, wanted))
            progress(int(numbers[-1]) + 1)
        return cls(torch.cat(found), torch.cat(judged), seconds)

    @classmethod
    def kept(cls, keep: str | Path | None, key: dict[str, Any], count: int) -> _Cell | None:
        """The results kept by an earlier call; None if there are none, or if they are damaged."""
        if keep is None or not (path := cls.path(keep, key)).exists():
            return None
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("schema", "1") != str(SAMPLES.version):
                    return None  # they are computed again
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            cell = cls(tensors["features"], tensors["right"], float(tensors["seconds"]))
        except (OSError, KeyError, safetensors.SafetensorError):
            return None
        return cell if len(cell.features) == len(cell.right) == count else None

    def keep(self, keep: str | Path | None, key: dict[str, Any]) -> None:
        if keep is None:
            return
        seconds = torch.tensor(self.seconds, dtype=torch.float64)
        tensors = {"features": self.features.contiguous(), "right": self.right, "seconds": seconds}
        path = self.path(keep, key)
        make_directory(path.parent)
        atomic_write(path, safetensors.torch.save(tensors, {"schema": str(SAMPLES.version)}))

    @staticmethod
    def path(keep: str | Path, key: dict[str, Any]) -> Path:
        return located(keep, "keep") / f"{sha256_of_json(key)[:32]}.safetensors"


def _judged(right: Callable[[Tensor, Tensor], Tensor] | None, samples: Tensor, prompts: Tensor) -> Tensor:
    if right is None:
        return torch.zeros(len(samples), dtype=torch.bool)
    found = right(samples, prompts)
    if not isinstance(found, Tensor) or found.dtype != torch.bool or found.shape != (len(samples),):
        raise InputError.of("right", f"bool [{len(samples)}]", described(found))
    return found.cpu()


def _featured(features: Callable[[Tensor], Tensor], samples: Tensor, width: int | None) -> Tensor:
    found = features(samples)
    if found.ndim != 2 or len(found) != len(samples) or not found.is_floating_point():
        rule = f"features [{len(samples)}, D] of a float dtype"
        raise InputError.of("features", rule, f"{found.dtype} {tuple(found.shape)}")
    if width is not None and found.shape[1] != width:
        raise InputError.of("features", f"{width} values, as of the reference", found.shape[1])
    if not found.isfinite().all():
        raise InputError.of("features", "finite values", "NaN or infinity")
    return found.detach().to("cpu", torch.float64)


def _whole(features: Callable[[Tensor], Tensor], samples: Tensor, batch: int) -> Tensor:
    parts = torch.split(samples, max(batch, 256))
    first = _featured(features, parts[0], None)
    return torch.cat([first, *(_featured(features, part, first.shape[1]) for part in parts[1:])])


def checked_schedules(schedules: Sequence[Guidance | str | float], grid: Grid) -> list[Guidance]:
    """The schedules; InputError for none, one of them twice, or one that does not fit the grid."""
    parsed = [Guidance.parse(schedule) for schedule in schedules]
    if not parsed:
        raise InputError.of("schedules", "at least one", "none")
    texts = [str(schedule) for schedule in parsed]
    for schedule, text in zip(parsed, texts, strict=True):
        schedule.passes(grid)  # InputError for thresholds outside of the grid
        if texts.count(text) > 1:
            raise InputError.of("schedules", "each once", f"{text!r} twice")
    return parsed


def _identity(schedule: Guidance, grid: Grid) -> Any:
    """What identifies a schedule: its text, or the weights if it has no text."""
    return [str(schedule), schedule.weights(grid).tolist()] if isinstance(schedule, Function) else str(schedule)


def _seeds(seeds: Sequence[int]) -> list[int]:
    numbers = [_check.seed(seed, "seeds") for seed in seeds]
    if not numbers or len(set(numbers)) < len(numbers):
        raise InputError.of("seeds", "at least one, each once", described(numbers))
    return numbers


def _labels(values: Any, name: str, count: int) -> Tensor:
    found = torch.as_tensor(values).cpu()
    if found.shape != (count,) or found.dtype != torch.int64:
        raise InputError.of(name, f"int64 [{count}]", f"{found.dtype} {tuple(found.shape)}")
    return found


def _check_classes(labels: Tensor, reference: Tensor) -> None:
    own, theirs = (torch.unique(values, return_counts=True) for values in (labels, reference))
    if own[0].tolist() != theirs[0].tolist():
        got = f"{own[0].tolist()} and {theirs[0].tolist()}"
        raise InputError.of("classes", "those of the reference", got if len(got) <= 120 else "others")
    if len(own[0]) < 2:
        raise InputError.of("classes", "at least two", own[0].tolist())
    for name, (classes, counts) in (("classes", own), ("reference", theirs)):
        few = int(counts.argmin())
        if counts[few] < 2:
            raise InputError.of(name, "at least 2 samples of a class", f"1 of class {int(classes[few])}")
