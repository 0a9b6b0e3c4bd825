# SPDX-License-Identifier: Apache-2.0
"""How much of the variance lost to constant guidance another schedule restores, at equal effect.

Only this comparison counts: more variance alone is no result, because a smaller constant has that effect too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fastdistill.errors import InputError
from fastdistill.evaluate.diversity import Interval
from fastdistill.evaluate.guidance import constant_of

At = Literal["separation", "accuracy"]
MEASURED = ("separation", "mean_shift", "variance_ratio", "right", "right_variance_ratio")  # columns of ``Row.draws``
_SHARE = 0.9  # lowest share of the draws within the constants' range for an interval of ``recovered``


@dataclass(frozen=True)
class Row:
    """The results of a schedule with a model, each figure with its 95 % interval.

    schedule, grid: texts. seeds, images: numbers; images is the total over all seeds.

    separation, mean_shift, variance_ratio: as ``class_separation``, ``mean_shift`` (minus the expected error of a mean
    of this number of images) and ``variance_ratio``, by bootstrap within classes. right: share of the images judged
    right, with Wilson's interval; right_variance_ratio: the variance ratio among these, because wrong images are no
    diversity; NaN without a judge, or if a class has fewer than two right images.
    precision, recall, density, coverage: of all images against the reference. vendi: effective number of different
    images of a class, mean over classes, with a Gaussian kernel as wide as the reference's class. Their intervals are
    by the jackknife, because repeated rows would change these five.
    evaluations_per_image: of the model. images_per_second: measured; NaN if not measured.

    draws: [n, 5] float64, the first five by bootstrap; rows of the same classes are drawn together.
    """

    schedule: str
    grid: str
    seeds: int
    images: int
    evaluations_per_image: int
    images_per_second: float
    separation: Interval
    mean_shift: Interval
    variance_ratio: Interval
    right: Interval
    right_variance_ratio: Interval
    precision: Interval
    recall: Interval
    density: Interval
    coverage: Interval
    vendi: Interval
    draws: Tensor | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Plain values: each figure and ``<figure>_interval`` [low, high]; NaN becomes None, also in an interval."""
        found: dict[str, Any] = {}
        for name, value in self.__dict__.items():
            if isinstance(value, Interval):
                found[name] = _plain(value.value)
                found[f"{name}_interval"] = _ends(value.low, value.high)
            elif name != "draws":
                found[name] = _plain(value)
        return found


@dataclass(frozen=True)
class Recovered:
    """The share of the variance lost to constant guidance that a schedule restores: 0: as constants, 1: the variance
    without guidance. at: which effect is equal. NaN outside of the constants' range."""

    schedule: str
    at: At
    value: float
    interval: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """Plain values; None for NaN."""
        return {
            "schedule": self.schedule,
            "at": self.at,
            "value": _plain(self.value),
            "interval": _ends(*self.interval),
        }


@dataclass(frozen=True)
class Diagnosis:
    """rows: one per schedule, in their order. recovered: one per schedule that is not constant."""

    rows: list[Row]
    recovered: list[Recovered]

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        """Plain values."""
        return {name: [entry.to_json() for entry in getattr(self, name)] for name in ("rows", "recovered")}


def frontier(rows: Sequence[Row]) -> list[Recovered]:
    """How much of the variance lost to constant guidance each other schedule restores, at equal separation and at equal
    accuracy: (V - V_const) / (V_0 - V_const).

    V_0 is the variance ratio of w = 0. V_const is that of constant guidance with the same separation (or share of right
    images), interpolated linearly between the constants in the order of w, at the first such place (the smallest w, if
    the accuracy is saturated). NaN outside of the constants' range, and if no variance is lost there. Intervals are
    from the draws of the rows, NaN if fewer than 90 % of them are within the range.

    Raises:
        InputError: no row of w = 0, or no other constant.
    """
    constants = sorted(
        ((w, row) for row in rows if (w := constant_of(row.schedule)) is not None and w >= 0), key=lambda pair: pair[0]
    )
    if not constants or constants[0][0] != 0 or len(constants) < 2:
        got = ", ".join(row.schedule for row in rows) or "none"
        raise InputError.of("rows", "schedules among which are 0 and another constant", got)
    line = [row for _, row in constants]
    found = []
    for row in rows:
        if constant_of(row.schedule) is not None:
            continue
        for at, name in (("separation", "separation"), ("accuracy", "right")):
            if math.isnan(row.right.value) and at == "accuracy":
                continue
            value = _recovered(*(_points([*line, row], key) for key in (name, "variance_ratio")))
            found.append(Recovered(row.schedule, at, float(value[0]), _interval(line, row, name)))  # type: ignore[arg-type]
    return found


def _interval(line: list[Row], row: Row, name: str) -> tuple[float, float]:
    rows = [*line, row]
    drawn = [one.draws for one in rows if one.draws is not None]
    if len(drawn) < len(rows) or len({len(d) for d in drawn}) > 1:
        return math.nan, math.nan
    places = [MEASURED.index(key) for key in (name, "variance_ratio")]
    values = _recovered(*(torch.stack([d[:, place] for d in drawn], 1) for place in places))
    within = values[values.isfinite()]
    if len(within) < _SHARE * len(values):
        return math.nan, math.nan
    low, high = within.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _points(rows: Sequence[Row], key: str) -> Tensor:
    return torch.tensor([[getattr(row, key).value for row in rows]], dtype=torch.float64)


def _recovered(effect: Tensor, variance: Tensor) -> Tensor:
    """[n], from [n, constants + 1] each: the constants in the order of w, then the schedule."""
    x, y = effect[:, -1:], variance[:, -1]
    low, high = effect[:, :-2], effect[:, 1:-1]
    inside = ((low <= x) & (x <= high)) | ((high <= x) & (x <= low))
    first = inside.int().argmax(1, keepdim=True)
    start, end, before, after = (
        values.gather(1, first)[:, 0] for values in (low, high, variance[:, :-2], variance[:, 1:-1])
    )
    share = torch.where(end == start, 0.0, (x[:, 0] - start) / (end - start))
    line = before + share * (after - before)
    lost = variance[:, 0] - line
    known = inside.any(1) & (lost > 0)
    return torch.where(known, (y - line) / lost, math.nan)


def _ends(low: float, high: float) -> list[float] | None:
    return None if math.isnan(low) or math.isnan(high) else [low, high]


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
