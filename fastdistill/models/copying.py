# SPDX-License-Identifier: Apache-2.0
"""A block-removed student starts from its teacher's weights, by an explicit map of names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastdistill.errors import InputError
from fastdistill.models.specs import per_stage

_UP_BLOCK = re.compile(r"up_blocks\.(\d+)(?:\.(resnets|attentions)\.(\d+))?(?=\.)")


@dataclass(frozen=True)
class CopyReport:
    """Where a student's weights came from: student tensor -> teacher tensor, and the teacher's tensors left behind."""

    sources: dict[str, str]
    unused: tuple[str, ...]

    @property
    def moved(self) -> dict[str, str]:
        """Only the tensors whose name differs between student and teacher."""
        return {own: source for own, source in self.sources.items() if own != source}

    def __str__(self) -> str:
        return (
            f"{len(self.sources)} tensors copied from the teacher, {len(self.moved)} of them under another name; "
            f"{len(self.unused)} of the teacher's left out"
        )


def copy_from_teacher(
    student: nn.Module, teacher: nn.Module, source_of: Callable[[str], str] | None = None
) -> CopyReport:
    """Copy into every tensor of ``student`` the teacher's tensor it stands for (BK-SDM, arXiv 2305.15798).

    ``source_of``: the teacher's name for a name of the student's; None: that of ``copy_sources`` for U-Nets. Nothing is
    copied unless all of it fits; values are cast to the student's dtype. Raises as ``copy_sources``.
    """
    sources = copy_sources(student, teacher, source_of)
    own, theirs = student.state_dict(), teacher.state_dict()
    with torch.no_grad():
        for key, source in sources.items():
            own[key].copy_(theirs[source])
    used = set(sources.values())
    return CopyReport(sources, tuple(key for key in theirs if key not in used))


def copy_sources(
    student: nn.Module, teacher: nn.Module, source_of: Callable[[str], str] | None = None
) -> dict[str, str]:
    """The map student tensor -> teacher tensor, by name; either model may be on the meta device.

    ``source_of`` tells; None: as for U-Nets, where under ``up_blocks`` a block's last layer is the teacher's last, as
    only that one takes the channels of the next stage, and blocks are counted from the outermost; every other name is
    the teacher's own. Copying equal names alone would mismatch some tensors and silently take others from the wrong
    layer.

    Raises ``InputError`` for students of another width, and naming both tensors where a pair does not match.
    """
    if source_of is None:
        source_of = _of_unets(student, teacher)
    own, theirs = student.state_dict(), teacher.state_dict()
    sources = {key: source_of(key) for key in own}
    for key, source in sources.items():
        if source not in theirs:
            raise InputError.of(f"student {key}", "a tensor of the teacher to copy", f"none, as it has no {source}")
        if theirs[source].shape != own[key].shape:
            rule = f"the shape of the teacher's {source} {tuple(theirs[source].shape)}"
            raise InputError.of(f"student {key}", rule, f"{tuple(own[key].shape)} (use init='random')")
    return sources


def _of_unets(student: Any, teacher: Any) -> Callable[[str], str]:
    """InputError for students of another width."""
    widths, limits = student.config["block_out_channels"], teacher.config["block_out_channels"]
    if tuple(widths) != tuple(limits)[: len(widths)]:
        rule = f"the teacher's channels {tuple(limits)} to copy its weights (use init='random')"
        raise InputError.of("student.block_out_channels", rule, tuple(widths))
    return _source_of(student.config, teacher.config)


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
