# SPDX-License-Identifier: Apache-2.0
"""Students of transformers: some of the teacher's blocks, in order, with a number of heads that follows from the
width."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastdistill.errors import InputError
from fastdistill.models.families import Family


@dataclass(frozen=True)
class BlockSpec:
    """How a student differs from its teacher, a transformer: the blocks it keeps (by ``every``, ``first`` or
    ``blocks``; all of them if only ``width`` is given), and its width.

    every: with 2, every second block in every list of blocks, counted backwards from the last one. first: this number
    of blocks from the beginning. blocks: the numbers of the blocks (for Flux of its double blocks; all single blocks
    are kept unless ``single_blocks`` lists some).
    width: factor for the number of heads, whose size is the teacher's; all numbers of channels follow from it.
    """

    every: int | None = None
    first: int | None = None
    blocks: tuple[int, ...] | None = None
    single_blocks: tuple[int, ...] | None = None
    width: float | None = None


#: Students of transformers by name; whole: the teacher's own size.
BLOCK_SPECS: dict[str, BlockSpec] = {
    "half_depth": BlockSpec(every=2),
    "third_depth": BlockSpec(every=3),
    "half_width": BlockSpec(width=0.5),
    "whole": BlockSpec(every=1),
}


@dataclass(frozen=True)
class BlockPlan:
    """A student of a transformer before it is built: its configuration, the kept blocks of each list, and its taps
    (teacher module, student module) at the output of each kept block."""

    config: dict[str, Any]
    kept: dict[str, tuple[int, ...]]
    taps: list[tuple[str, str]]

    def source_of(self, key: str) -> str:
        """The teacher's tensor from which a tensor of the student is copied."""
        match = re.match(r"(\w+)\.(\d+)\.", key)
        if match is None or match[1] not in self.kept:
            return key
        return f"{match[1]}.{self.kept[match[1]][int(match[2])]}.{key[match.end() :]}"


def block_plan(family: Family, config: Mapping[str, Any], spec: BlockSpec) -> BlockPlan:
    """The student that ``spec`` makes from a teacher with this configuration.

    Raises:
        InputError: a spec without a choice or with two, a block that the teacher does not have, or a spec that removes
            nothing.
    """
    given = [name for name in ("every", "first", "blocks") if getattr(spec, name) is not None]
    if spec.single_blocks is not None and "single_transformer_blocks" not in family.blocks:
        raise InputError.of("spec.single_blocks", "None, as the teacher has no single blocks", spec.single_blocks)
    alone = spec.single_blocks is not None or spec.width is not None
    if len(given) > 1 or not (given or alone):
        raise InputError.of("spec", "one of every, first and blocks, or a width", " and ".join(given) or "none")
    if spec.width is not None and not 0 < spec.width <= 1:
        raise InputError.of("spec.width", "a factor above 0, at most 1 (the teacher's own width)", spec.width)
    kept = {}
    for name, field in family.blocks.items():
        own = spec.single_blocks if name.startswith("single") else spec.blocks
        kept[name] = _kept(spec, own, int(config[field]), "single_blocks" if name.startswith("single") else "blocks")
    changed = {field: len(kept[name]) for name, field in family.blocks.items()}
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    student = family.thinned(plain | changed, kept)
    if spec.width is not None:
        student = family.narrowed(student, spec.width)
    same = all(plain.get(field) == student.get(field) for field in (*changed, "num_attention_heads"))
    if same and spec != BLOCK_SPECS["whole"]:
        raise InputError.of("spec", "a part to remove from the teacher", f"{spec}, which removes nothing of it")
    taps = [
        (f"{name}.{source}", f"{name}.{own}") for name, sources in kept.items() for own, source in enumerate(sources)
    ]
    return BlockPlan(student, kept, taps)


def _kept(spec: BlockSpec, own: tuple[int, ...] | None, depth: int, argument: str) -> tuple[int, ...]:
    if spec.every is not None and own is None:
        if not 1 <= spec.every <= depth:
            raise InputError.of("spec.every", f"1 to {depth}, the blocks of the teacher", spec.every)
        return tuple(range(depth - 1, -1, -spec.every))[::-1]
    if spec.first is not None and own is None:
        if not 1 <= spec.first <= depth:
            raise InputError.of("spec.first", f"1 to {depth}, the blocks of the teacher", spec.first)
        return tuple(range(spec.first))
    if own is None:
        return tuple(range(depth))
    if not own or list(own) != sorted(set(own)) or not 0 <= own[0] <= own[-1] < depth:
        raise InputError.of(f"spec.{argument}", f"rising numbers of blocks, 0 to {depth - 1}", own)
    return own
