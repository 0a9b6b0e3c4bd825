# SPDX-License-Identifier: Apache-2.0
"""The student spec of a run's settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdistill.errors import InputError
from fastdistill.models import BLOCK_SPECS, SPECS, BlockSpec, StudentSpec
from fastdistill.runs.config import LoraSettings, StudentSettings


def student_spec_of(student: StudentSettings, transformer: bool) -> StudentSpec | BlockSpec | Mapping[str, Any]:
    """The spec for the settings of a student, for a transformer or a U-Net.

    Raises:
        InputError: no setting is given, or contradicting ones.
    """
    kinds = ("spec", "every", "first", "blocks", "channels")
    given = [name for name in kinds if getattr(student, name) is not None]
    if student.lora.rank is not None:
        given.append("lora.rank")
    elif student.lora != LoraSettings():
        rule = "a number, as other fields of lora are set, which have no effect without it"
        raise InputError.of("student.lora.rank", rule, None)
    alone = student.width is not None and (not given or given[0] in ("every", "first", "blocks"))
    if len(given) > 1 or (student.width is not None and not alone) or not (given or alone):
        rule = "one of spec, every, first, blocks, width, channels and lora.rank (width goes with the blocks too)"
        given += ["width"] if student.width is not None else []
        hint = f" (--student.{given[0]} null takes the first away)" if given else ""
        raise InputError.of("student", rule, (" and ".join(given) or "none") + hint)
    if student.lora.rank is not None:
        alpha = student.lora.rank if student.lora.alpha is None else student.lora.alpha
        return {
            "peft_type": "LORA",
            "r": student.lora.rank,
            "lora_alpha": alpha,
            "target_modules": list(student.lora.targets),
        }
    if student.spec is not None:
        named: Mapping[str, StudentSpec | BlockSpec] = BLOCK_SPECS if transformer else SPECS
        if student.spec not in named:
            raise InputError.of("student.spec", f"one of {', '.join(named)}", repr(student.spec))
        return named[student.spec]
    if transformer:
        if student.channels is not None:
            raise InputError.of("student.channels", "none, as the teacher is a transformer (width)", student.channels)
        return BlockSpec(student.every, student.first, student.blocks, width=student.width)
    for name in ("every", "first", "blocks"):
        if getattr(student, name) is not None:
            raise InputError.of(f"student.{name}", "none, as the teacher is a U-Net (spec)", getattr(student, name))
    return StudentSpec(width=student.width, block_out_channels=student.channels)


def fields_of(student: StudentSettings) -> dict[str, str]:
    """The names that errors of ``make_student`` have, and the fields of the run file that set them."""
    size = "student.channels" if student.width is None else "student.width"
    whole = "student.lora" if student.lora.rank is not None else "student"
    sizes = dict.fromkeys(("spec.block_out_channels", "student.block_out_channels"), size)
    reads = "objective.guidance.scale (guidance_embedding)"
    return {"spec": whole, **sizes, "init": "student.init", "guidance_embedding": reads}
