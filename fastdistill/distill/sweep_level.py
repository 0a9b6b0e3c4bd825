# SPDX-License-Identifier: Apache-2.0
"""The settings of a sweep with one noise level: one inversion, one search per tap, one row per setting."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdistill.data.encoded import rows_of
from fastdistill.diffusion.inversion import invert
from fastdistill.diffusion.prompts import Rows, null_rows
from fastdistill.diffusion.schedule import PredictionType, Schedule
from fastdistill.distill.canonical import Canonical, Clarid, canonical
from fastdistill.distill.controls import Agreement, Subject, random_directions
from fastdistill.errors import InputError
from fastdistill.evaluate.jackknife import interval
from fastdistill.models.jacobian import TapFunction, TapFunctions
from fastdistill.models.subspace import Subspace, project, top_subspace, top_subspaces
from fastdistill.ops import _check

Tick = Callable[[int], None]
_JVP = 4  # a product J v costs about as much as this many evaluations of the model; used to estimate the remaining time
_TOGETHER = 8  # images per search, between two updates of the progress


def key(row: Mapping[str, Any]) -> tuple[int, int, str]:
    """What identifies a setting, or its row."""
    return row["t_e"], row["k"], row["tap"]


class _Directions(NamedTuple):
    """vectors [N, n, k]; settled [N] bool."""

    vectors: Tensor
    settled: Tensor


@dataclass(frozen=True, eq=False)
class Teacher:
    """A model with the prompts of all classes and the way it is sampled."""

    model: nn.Module
    prompts: Rows
    null: Rows | None
    schedule: Schedule
    kind: PredictionType
    clip: float | None
    batch: int
    chunk: int | None


class Level:
    """Settings that differ only in k and tap.

    Raises:
        InputError: a setting that does not fit the model or the images.
    """

    def __init__(self, subject: Subject, teacher: Teacher, settings: Sequence[Clarid]) -> None:
        self.subject, self.teacher, self.settings, self.first = subject, teacher, settings, settings[0]
        for bank in teacher.prompts.values() if isinstance(teacher.prompts, Mapping) else (teacher.prompts,):
            _check.valued(prompts=bank)
            _check.rows(subject.labels, "labels", len(bank), "prompts")
        self.grid = self.first.grid(teacher.schedule)
        self.level = float(self.grid.signal[0]), float(self.grid.noise[0])
        if self.first.guidance != "0" and teacher.null is None:
            raise InputError.of("null_prompt", f"a row, for a guidance of {self.first.guidance}", None)
        self.most: dict[str, int] = {}  # the largest number of directions for each tap
        for setting in settings:
            self.most[setting.tap] = max(setting.k, self.most.get(setting.tap, 0))
        images, n = subject.images[:1], subject.images[0].numel()
        for f in self._functions(self._prompts(subject.labels[:1]), self.most):
            most = min(n, f(images.to(f.dtype)).shape[1])
            _check.require(self.most[f.name] <= most, "k", f"at most {most} at {f.name}", self.most[f.name])
        self._null = None if teacher.null is None else null_rows(self._prompts(subject.labels), teacher.null)

    def left(self, known: Mapping[Any, Any]) -> list[Clarid]:
        """The settings without a row."""
        return [setting for setting in self.settings if key(vars(setting)) not in known]

    def work(self, known: Mapping[Any, Any]) -> int:
        """The estimated number of evaluations of the model."""
        left, n, steps = self.left(known), len(self.subject.images), self.first.steps
        if not left:
            return 0
        decoded = sum(3 if setting.k else 1 for setting in left)
        return n * steps * (4 + decoded) + 2 * n * self._search({setting.tap for setting in left})

    def rows(self, known: Mapping[Any, Any], tick: Tick) -> Iterator[dict[str, Any]]:
        """Rows of the settings without one; ``tick`` is called with the number of evaluations done."""
        left, subject, steps = self.left(known), self.subject, self.first.steps
        if not left:
            return
        taps = list(dict.fromkeys(setting.tap for setting in left))
        count = len(subject.images)
        own, other = self._prompts(subject.labels), self._prompts(subject.others)
        began = time.perf_counter()
        latents = self._inverted(own)
        inverting = (time.perf_counter() - began) / count
        noise = subject.noise(latents)
        tick(count * steps)
        raw = {"nmi_raw": self._features(own, latents, taps), "nmi_noise": self._features(own, noise, taps)}
        raw["nmi_shuffled_prompt"] = self._features(other, self._inverted(other), taps)
        tick(count * steps)
        if self._null is not None:
            raw["nmi_null"] = self._features(self._null, self._inverted(self._null), taps)
        tick(count * steps)
        agreements = {tap: {name: subject.agreement(found[tap]) for name, found in raw.items()} for tap in taps}
        plain = self._canonical(own, latents, taps[0], None)
        tick(count * steps)
        before = subject.measured(plain.samples)
        directions, of_noise = (self._searched(own, of, taps, tick) for of in (latents, noise))
        for setting in left:
            k, tap = setting.k, setting.tap
            V, began = directions[tap].vectors[:, :, :k], time.perf_counter()
            found = self._canonical(own, latents, tap, V)
            decoding = (time.perf_counter() - began) / count
            random = before
            if k:
                given = random_directions(latents, found.energy, subject.seed)
                random = subject.measured(self._canonical(own, latents, tap, given).samples)
            projected = self._features(own, project(noise, of_noise[tap].vectors[:, :, :k]), [tap])[tap]
            agreed = agreements[tap] | {
                "nmi": subject.agreement(found.features),
                "nmi_noise_projected": subject.agreement(projected),
            }
            followed = None
            if subject.judged is not None:
                followed = subject.seen(self._canonical(other, found.clareps, tap, None).samples)
            products, seconds, nested = self._alone(setting, own, latents, directions[tap])
            tick(count * steps * (3 if k else 1))
            right = None if subject.judged is None else float((subject.judged == subject.labels).double().mean())
            details = {
                "judge_right_images": right,
                "other_prompt": followed,
                "settled": float(directions[tap].settled.double().mean()) if k else None,
                "nested": nested,
            }
            cost = {"products": products, "seconds_per_image": inverting + seconds + decoding}
            named = {"t_e": setting.t_e, "sigma": self.level[1] / self.level[0], "k": k, "tap": tap}
            figures = _changes(before, subject.measured(found.samples), random)
            yield _row(named, agreed, figures, float(found.energy.double().mean()), cost, details)

    def _prompts(self, classes: Tensor) -> Rows:
        rows: Rows = rows_of(self.teacher.prompts, classes, self.subject.images.device)
        return rows

    def _functions(self, prompts: Rows, taps: Sequence[str] | Mapping[str, int]) -> list[TapFunction]:
        time = self.grid.model_times(self.subject.images.device)[0]
        options: dict[str, Any] = {"level": self.level, "prediction_type": self.teacher.kind}
        return [TapFunction(self.teacher.model, tap, time, prompts, **options) for tap in taps]

    def _batches(self) -> Iterator[slice]:
        for start in range(0, len(self.subject.images), self.teacher.batch):
            yield slice(start, start + self.teacher.batch)

    def _inverted(self, prompts: Rows) -> Tensor:
        """All images inverted to t_e, with these prompts."""
        teacher, options = self.teacher, {"method": self.first.method, "correct": self.first.correct}
        images = self.subject.images.to(self._functions(prompts, [self.first.tap])[0].dtype)
        parts = [
            invert(
                teacher.model, images[at], rows_of(prompts, at), self.grid, prediction_type=teacher.kind,
                **options,  # type: ignore[arg-type]
            )
            for at in self._batches()
        ]  # fmt: skip
        return torch.cat(parts)

    def _features(self, prompts: Rows, latents: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
        f = TapFunctions(self._functions(prompts, taps))
        every = torch.arange(len(latents), device=latents.device)
        parts = [f.of_rows(every[at]).features(latents[at]) for at in self._batches()]
        return {tap: torch.cat([part[place] for part in parts]) for place, tap in enumerate(taps)}

    def _canonical(self, prompts: Rows, latents: Tensor, tap: str, directions: Tensor | None) -> Canonical:
        """Canonical results from latents at t_e, with these directions projected out."""
        teacher, first = self.teacher, self.first
        clarid = Clarid(first.t_e, 0, tap, first.steps, first.guidance, first.method)
        parts = [
            canonical(
                teacher.model, latents[at], rows_of(prompts, at), clarid, schedule=teacher.schedule,
                null_prompt=teacher.null, prediction_type=teacher.kind, clip_sample=teacher.clip, inverted=True,
                directions=None if directions is None else directions[at],
            )
            for at in self._batches()
        ]  # fmt: skip
        names = ("latents", "clareps", "samples", "features", "energy")
        joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return Canonical(**joined, subspace=None)

    def _searched(self, prompts: Rows, latents: Tensor, taps: Sequence[str], tick: Tick) -> dict[str, _Directions]:
        """The top directions of each tap, as many as its largest setting needs."""
        found: dict[str, list[Subspace]] = {tap: [] for tap in taps}
        every = torch.arange(len(latents), device=latents.device)
        functions = self._functions(prompts, taps)
        for rows in torch.split(every, _TOGETHER):
            for k in sorted(set(self.most.values()) - {0}):
                some = [f.of_rows(rows) for f in functions if self.most[f.name] == k]
                made = top_subspaces(some, latents[rows], k, rows=rows, **self._options()) if some else []
                for f, subspace in zip(some, made, strict=True):
                    found[f.name].append(subspace)
            tick(len(rows) * self._search(set(taps)))
        none = latents.new_zeros(len(latents), latents[0].numel(), 0), latents.new_ones(len(latents)).bool()
        return {
            tap: _Directions(torch.cat([s.vectors for s in parts]), torch.cat([s.settled for s in parts]))
            if parts
            else _Directions(*none)
            for tap, parts in found.items()
        }

    def _options(self) -> dict[str, Any]:
        names = {"method": "search", "oversample": "oversample", "tolerance": "tolerance", "seed": "seed"}
        return {name: getattr(self.first, field) for name, field in names.items()} | {"chunk": self.teacher.chunk}

    def _search(self, taps: set[str]) -> int:
        """The estimated number of evaluations of the model for the search on one image."""
        size = self.subject.images[0].numel()
        each = [min(size, 4 * self.most[tap]) for tap in taps if self.most[tap]]
        return _JVP * (size if size in each else sum(each))

    def _alone(
        self, setting: Clarid, prompts: Rows, latents: Tensor, found: _Directions
    ) -> tuple[int, float, float | None]:
        """The cost of a search for this setting alone, on the first image: products and seconds; and the sine of the
        largest angle between its directions and the ones found before."""
        if not setting.k:
            return 0, 0.0, None
        one = torch.zeros(1, dtype=torch.int64, device=latents.device)
        (f,) = self._functions(prompts, [setting.tap])
        began = time.perf_counter()
        own = top_subspace(f.of_rows(one), latents[:1], setting.k, rows=one, **self._options())
        seconds = time.perf_counter() - began
        V, W = own.vectors[0], found.vectors[0, :, : setting.k]
        sine = float(torch.linalg.matrix_norm(W - V @ (V.mT @ W), ord=2))
        return int(own.products.jvp + own.products.vjp), seconds, sine


def _changes(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], random: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """[1 + groups] each: the removed fractions of the earlier variance, and what the judge sees."""
    if not before:
        return {}
    found: dict[str, Tensor] = {}
    for suffix, now in (("", after), ("_random", random)):
        gone = {name: 1 - now[name] / before[name] for name in ("irrelevant", "relevant")}
        gone = {name: torch.where(before[name] > 0, value, math.nan) for name, value in gone.items()}
        found |= {f"{name}_removed{suffix}": value for name, value in gone.items()}
        found[f"selectivity{suffix}"] = gone["irrelevant"] - gone["relevant"]
        if "right" in now:
            found[f"judge_right{suffix}"] = now["right"]
    if "right" in before:
        found["judge_right_before"] = before["right"]
    return found


def _row(
    named: dict[str, Any],
    agreed: Mapping[str, Agreement],
    figures: Mapping[str, Tensor],
    energy: float,
    cost: dict[str, Any],
    details: dict[str, Any],
) -> dict[str, Any]:
    """A row as described in ``sweep``."""
    values = {name: found.flat for name, found in agreed.items()} | dict(figures)

    def value(name: str) -> float | None:
        found = float(values[name][0]) if name in values else math.nan
        return None if math.isnan(found) else found

    nmis = ("nmi_raw", "nmi", "nmi_noise", "nmi_noise_projected", "nmi_shuffled_prompt", "nmi_null")
    row = named | {name: value(name) for name in (*nmis, "judge_right", "irrelevant_removed", "relevant_removed")}
    row |= {"energy": energy, "selectivity": value("selectivity"), "selectivity_random": value("selectivity_random")}
    ends = {name: interval(found) for name, found in values.items()}
    for name in (*nmis, "judge_right", "judge_right_before", "judge_right_random"):
        if name in ends:  # limited to 0 and 1; NaN stays NaN
            low, high = ends[name]
            ends[name] = (low if math.isnan(low) else max(low, 0.0), high if math.isnan(high) else min(high, 1.0))
    return row | cost | {
        "details": {
            "intervals": {name: None if math.isnan(low) else [low, high] for name, (low, high) in ends.items()},
            "pooled": {name: float(agreed[name].pooled[0]) if name in agreed else None for name in nmis},
            "nmi_chance": agreed["nmi_noise"].chance,
            "nmi_shuffled_by_prompt": agreed["nmi_shuffled_prompt"].shuffled,
            "judge_right_before": value("judge_right_before"),
            "random": {
                name: value(f"{name}_random") for name in ("judge_right", "irrelevant_removed", "relevant_removed")
            },
            **details,
        }
    }  # fmt: skip
