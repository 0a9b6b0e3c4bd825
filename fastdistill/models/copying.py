# SPDX-License-Identifier: Apache-2.0
"""Initializes a student from its teacher's weights by an explicit map of names: whole tensors, or slices of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastdistill.errors import InputError
from fastdistill.models.slicing import Slice, slices
from fastdistill.models.specs import per_stage

_UP_BLOCK = re.compile(r"up_blocks\.(\d+)(?:\.(resnets|attentions)\.(\d+))?(?=\.)")


@dataclass(frozen=True)
class CopyReport:
    """Which weights a student took from its teacher: student tensor -> teacher tensor; the unused tensors of the
    teacher; and, for tensors that were not copied whole, which part was taken."""

    sources: dict[str, str]
    unused: tuple[str, ...]
    sliced: dict[str, str] = field(default_factory=dict)

    @property
    def moved(self) -> dict[str, str]:
        """Only the tensors whose names differ between student and teacher."""
        return {own: source for own, source in self.sources.items() if own != source}

    def __str__(self) -> str:
        return (
            f"{len(self.sources)} tensors copied from the teacher, {len(self.moved)} of them under another name, "
            f"{len(self.sliced)} of them slices; {len(self.unused)} of the teacher's left out"
        )

    def table(self) -> str:
        """The whole map, one line per tensor: the student's, the teacher's, and the part that was copied."""
        return "\n".join(f"{key} <- {source}: {self.sliced.get(key, 'all')}" for key, source in self.sources.items())


def copy_from_teacher(
    student: nn.Module, teacher: nn.Module, source_of: Callable[[str], str] | None = None, new: str = ""
) -> CopyReport:
    """Copy into every tensor of ``student`` the corresponding tensor of the teacher (BK-SDM, arXiv 2305.15798), or, if
    the student is narrower, a slice of it (``fastdistill.models.slicing``).

    ``source_of``: the teacher's name for a name of the student; None: as in ``copy_sources`` for U-Nets. ``new``: a
    module that the teacher does not have, which is not changed. Nothing is copied unless all of it fits; values are
    cast to the student's dtype. Raises the errors of ``copy_sources``.
    """
    sources, parts = _map(student, teacher, source_of, new)
    own, theirs = student.state_dict(), teacher.state_dict()
    with torch.no_grad():
        for key, source in sources.items():
            if (part := parts.get(key)) is None:
                own[key].copy_(theirs[source])
            else:
                own[key].copy_(part.of(theirs[source])).mul_(part.scale)
    used = set(sources.values())
    unused = tuple(key for key in theirs if key not in used)
    return CopyReport(sources, unused, {key: str(part) for key, part in parts.items()})


def copy_sources(
    student: nn.Module, teacher: nn.Module, source_of: Callable[[str], str] | None = None, new: str = ""
) -> dict[str, str]:
    """The map student tensor -> teacher tensor, by name; both models can be on the meta device.

    It is given by ``source_of``. None: the rule for U-Nets: under ``up_blocks`` a block's last layer is the teacher's
    last (only this layer has the channels of the next stage), and blocks are counted from the outermost; every other
    name is the teacher's own. Copying only equal names would fail for some tensors and silently copy others from the
    wrong layer.

    Raises ``InputError`` naming both tensors if the shapes of a pair do not fit, whole or as a slice.
    """
    return _map(student, teacher, source_of, new)[0]


def _map(
    student: nn.Module, teacher: nn.Module, source_of: Callable[[str], str] | None, new: str
) -> tuple[dict[str, str], dict[str, Slice]]:
    if source_of is None:
        source_of = _source_of(student.config, teacher.config)  # type: ignore[arg-type]
    own, theirs = student.state_dict(), teacher.state_dict()
    sources = {key: source_of(key) for key in own if not (new and key.startswith(f"{new}."))}
    for key, source in sources.items():
        if source not in theirs:
            raise InputError.of(f"student {key}", "a tensor of the teacher to copy", f"none, as it has no {source}")
    return sources, slices(student, teacher, sources)


def _source_of(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> Callable[[str], str]:
    """The map from a student's tensor name to its teacher's, for these two configurations."""
    own, theirs = per_stage(student, "layers_per_block")[::-1], per_stage(teacher, "layers_per_block")[::-1]
    removed = len(theirs) - len(own)

    def rename(match: re.Match[str]) -> str:
        block, kind, layer = int(match[1]), match[2], match[3]
        name = f"up_blocks.{block + removed}"
        if kind is None:
            return name
        last = int(layer) == own[block]  # up blocks have one layer more than the down blocks
        return f"{name}.{kind}.{theirs[block + removed] if last else layer}"

    return lambda key: _UP_BLOCK.sub(rename, key, count=1) if key.startswith("up_blocks.") else key
