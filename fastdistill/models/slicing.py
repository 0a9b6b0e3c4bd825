# SPDX-License-Identifier: Apache-2.0
"""Weights of a narrower student: evenly spaced entries of its teacher's (weight selection, arXiv 2311.18823).

Along an axis on which the student has ``own`` entries and the teacher ``n``, the student's entry i is the teacher's
i * n // own. That selects the same channels in every tensor. If an axis has several equal parts (shifts, scales and
gates of a modulation, both halves of a GEGLU), it selects in each part. If the student has fewer heads in an attention,
it selects whole heads.

A weight with fewer inputs is multiplied by sqrt(n / own) (which the paper does not do), so that sums over fewer
independent inputs keep their magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdistill.errors import InputError
from fastdistill.models import families


class Slice(NamedTuple):
    """Entries of a teacher's tensor along each axis (None: all), and the factor for the copied values."""

    axes: tuple[Tensor | None, ...]
    scale: float

    def of(self, tensor: Tensor) -> Tensor:
        for axis, entries in enumerate(self.axes):
            if entries is not None:
                tensor = tensor.index_select(axis, entries.to(tensor.device))
        return tensor

    def __str__(self) -> str:
        kept = " x ".join("all" if entries is None else str(len(entries)) for entries in self.axes)
        return kept if self.scale == 1 else f"{kept}, times {self.scale:g}"


def slices(student: nn.Module, teacher: nn.Module, sources: Mapping[str, str]) -> dict[str, Slice]:
    """The slices in the map ``sources`` (student tensor -> teacher tensor); tensors without a slice are copied whole.

    Raises:
        InputError: names both tensors of a pair whose shapes do not follow from the widths of the two models.
    """
    family = families.find(teacher)
    own, theirs = student.state_dict(), teacher.state_dict()
    ratio = Fraction(1) if family is None else family.ratio(student.config, teacher.config)  # type: ignore[arg-type]
    found = {}
    for key, source in sources.items():
        wanted, given = tuple(own[key].shape), tuple(theirs[source].shape)
        rows = None if family is None else family.rows(source, wanted, given, ratio)
        if rows is None and given == wanted:
            continue
        heads = _heads(family, student, teacher, key, source)
        axes = _axes(rows, wanted, given, ratio, heads)
        if axes is None:
            rule = f"the shape of the teacher's {source} {given}"
            raise InputError.of(f"student {key}", rule, f"{wanted} (use init='random')")
        found[key] = Slice(axes, _scale(student, key, wanted, given))
    return found


class _Heads(NamedTuple):
    """The axis of a tensor that has an attention's heads: their number and size, for student and teacher."""

    axis: int
    number: tuple[int, int]
    size: tuple[int, int]


def _heads(family: Any, student: nn.Module, teacher: nn.Module, key: str, source: str) -> _Heads | None:
    found = None if family is None else family.heads(key)
    if found is None:
        return None
    own: Any = student.get_submodule(found[0])
    theirs: Any = teacher.get_submodule(family.heads(source)[0])
    sizes = own.to_q.out_features // own.heads, theirs.to_q.out_features // theirs.heads
    return _Heads(found[1], (own.heads, theirs.heads), sizes)


def _axes(
    rows: Tensor | None, wanted: tuple[int, ...], given: tuple[int, ...], ratio: Fraction, heads: _Heads | None
) -> tuple[Tensor | None, ...] | None:
    """None if the teacher's shape ``given`` and the widths do not give ``wanted``."""
    if len(wanted) != len(given):
        return None
    axes: list[Tensor | None] = []
    for axis, (own, n) in enumerate(zip(wanted, given, strict=True)):
        entries = torch.arange(n, device="cpu") if rows is None or axis else rows
        if own != len(entries):
            if heads is not None and axis == heads.axis:
                chosen = _of_heads(heads, own, n, ratio)
            else:
                chosen = _spaced(own, len(entries)) if Fraction(own, len(entries)) == ratio else None
            if chosen is None:
                return None
            entries = entries[chosen]
        axes.append(None if own == n else entries)
    return tuple(axes)


def _spaced(own: int, n: int) -> Tensor:
    return torch.arange(own, device="cpu") * n // own


def _of_heads(heads: _Heads, own: int, n: int, ratio: Fraction) -> Tensor | None:
    """Whole heads, or evenly spaced channels of each; for channels after the heads on the axis, evenly spaced ones."""
    inner, whole = heads.number[0] * heads.size[0], heads.number[1] * heads.size[1]
    same = heads.number[0] == heads.number[1] or heads.size[0] == heads.size[1]
    if not same or (own > inner and Fraction(own - inner, n - whole) != ratio):
        return None
    chosen = _spaced(*heads.number)[:, None] * heads.size[1] + _spaced(*heads.size)
    return torch.cat((chosen.flatten(), whole + _spaced(own - inner, n - whole))) if own > inner else chosen.flatten()


def _scale(student: nn.Module, key: str, wanted: tuple[int, ...], given: tuple[int, ...]) -> float:
    name, _, last = key.rpartition(".")
    summed = last == "weight" and isinstance(student.get_submodule(name), nn.Linear | nn.Conv2d)
    return math.sqrt(given[1] / wanted[1]) if summed else 1.0
