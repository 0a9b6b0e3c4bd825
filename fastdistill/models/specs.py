# SPDX-License-Identifier: Apache-2.0
"""What a student leaves out of its teacher: named specs, and the U-Net configuration for each."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args

from fastdistill.errors import InputError, described

Spec = TypeVar("Spec")

# One value per stage, outermost first; `up_block_types` and `reverse_transformer_layers_per_block` are in reverse.
_PER_STAGE = (
    "down_block_types",
    "block_out_channels",
    "layers_per_block",
    "attention_head_dim",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "only_cross_attention",
)

StudentTaps = Literal["blocks", "self_attention"]


@dataclass(frozen=True)
class StudentSpec:
    """How a student differs from its teacher, a ``UNet2DConditionModel``. By default nothing differs.

    layers_per_block: layers in every down block (up blocks have one more); the innermost ones of each block are
    dropped.
    remove_mid: drop the mid block. remove_stages: drop this many of the innermost stages.
    width: factor for the channels of every stage, rounded to the groups of the norms.
    block_out_channels: the channels of every remaining stage, instead of ``width``.
    transformer_layers: number of transformer blocks in each attention of every stage; the teacher's first ones are
        kept.
    taps: where student and teacher are compared: at the outputs of the ``blocks``, or at every ``self_attention``
        (KOALA, arXiv 2312.04005).
    """

    layers_per_block: int | None = None
    remove_mid: bool = False
    remove_stages: int = 0
    width: float | None = None
    block_out_channels: tuple[int, ...] | None = None
    transformer_layers: tuple[int, ...] | None = None
    taps: StudentTaps = "blocks"


#: Students by name. bk_*: BK-SDM's block-removed students; channel_*: random conditioning's narrower students;
#: koala_*: for SDXL. whole: the teacher's own size, for an objective that changes what a model computes.
SPECS: dict[str, StudentSpec] = {
    "bk_base": StudentSpec(layers_per_block=1),
    "bk_small": StudentSpec(layers_per_block=1, remove_mid=True),
    "bk_tiny": StudentSpec(layers_per_block=1, remove_mid=True, remove_stages=1),
    "channel_base": StudentSpec(width=0.8),
    "channel_small": StudentSpec(width=0.7),
    "channel_tiny": StudentSpec(width=0.6),
    "channel_micro": StudentSpec(width=0.5),
    "koala_1b": StudentSpec(layers_per_block=1, transformer_layers=(1, 2, 6), taps="self_attention"),
    "koala_700m": StudentSpec(layers_per_block=1, remove_mid=True, transformer_layers=(1, 2, 5), taps="self_attention"),
    "whole": StudentSpec(),
}


def spec_of(kind: type[Spec], named: Mapping[str, Spec], spec: object, of: str = "") -> Spec:
    """The spec with this name or these fields (as read from YAML), or the spec itself; ``of``: the kind of teachers,
    for the message."""
    if isinstance(spec, kind):
        return _of_its_types(spec)
    if isinstance(spec, str):
        if spec not in named:
            near = difflib.get_close_matches(spec, named, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise InputError.of("spec", f"one of {', '.join(named)}{of}", f"{spec!r}{hint}")
        return named[spec]
    if not isinstance(spec, Mapping):
        raise InputError.of("spec", f"a name, a {kind.__name__} or a mapping of its fields{of}", described(spec))
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if unknown := [str(key) for key in spec if key not in known]:
        raise InputError.of("spec", f"the fields {', '.join(known)}{of}", ", ".join(unknown))
    return _of_its_types(
        kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in spec.items()})
    )


#: The expected value of a field, in words, by its annotation.
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "bool": ("true or false", lambda v: isinstance(v, bool)),
    "int": ("a whole number", lambda v: isinstance(v, numbers.Integral) and not isinstance(v, bool)),
    "float": ("a number", lambda v: isinstance(v, numbers.Real) and not isinstance(v, bool)),
    "tuple[int, ...]": (
        "a list of whole numbers",
        lambda v: isinstance(v, tuple | list) and all(map(_TYPES["int"][1], v)),
    ),
}


def _of_its_types(spec: Spec) -> Spec:
    for field in fields(spec):  # type: ignore[arg-type]
        value, optional = getattr(spec, field.name), field.type.endswith(" | None")
        rule, fits = _TYPES.get(field.type.removesuffix(" | None"), ("", lambda v: True))
        if not fits(value) and not (optional and value is None):
            raise InputError.of(f"spec.{field.name}", rule + " or none" * optional, described(value))
    return spec


def student_spec(spec: str | StudentSpec | Mapping[str, Any]) -> StudentSpec:
    """The spec with this name in ``SPECS`` or these fields, or the spec itself."""
    return spec_of(StudentSpec, SPECS, spec)


def student_config(teacher_config: Mapping[str, Any], spec: str | StudentSpec | Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the student of a teacher with ``teacher_config`` (of a ``UNet2DConditionModel``).

    Raises ``InputError`` for a spec that requires more than the teacher has, removes nothing, or leaves no input for
    the prompt.
    """
    if "down_block_types" not in teacher_config or "cross_attention_dim" not in teacher_config:
        raise InputError.of(
            "teacher", "a UNet2DConditionModel's config", teacher_config.get("_class_name", "another one")
        )
    spec = student_spec(spec)
    if spec.taps not in get_args(StudentTaps):
        raise InputError.of("spec.taps", f"one of {', '.join(get_args(StudentTaps))}", described(spec.taps))
    teacher = _shorten({key: value for key, value in teacher_config.items() if not key.startswith("_")}, 0)
    config = _shorten(teacher, spec.remove_stages)
    if spec.layers_per_block is not None and set(per_stage(config, "layers_per_block")) != {spec.layers_per_block}:
        config["layers_per_block"] = spec.layers_per_block
    if spec.transformer_layers is not None:
        stages = len(config["down_block_types"])
        if len(spec.transformer_layers) != stages:
            raise InputError.of(
                "spec.transformer_layers", f"one value for each of {stages} stages", spec.transformer_layers
            )
        config["transformer_layers_per_block"] = spec.transformer_layers
    if spec.remove_mid:
        config["mid_block_type"] = None
    if spec.width is not None and spec.block_out_channels is not None:
        raise InputError.of("spec", "width or block_out_channels", "both")
    widths = config["block_out_channels"]
    if spec.width is not None:
        config["block_out_channels"] = _scaled(config, spec.width)
    if spec.block_out_channels is not None:
        config["block_out_channels"] = _given(config, spec.block_out_channels)
    config["attention_head_dim"] = _heads(config, widths)
    check_config(teacher, config)
    if spec != StudentSpec() and all(teacher[key] == value for key, value in config.items()):
        raise InputError.of("spec", "a part to remove from the teacher", f"{spec}, which removes nothing of it")
    return config


def check_config(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> None:
    """InputError for a student configuration that does not fit the teacher's inputs, or is deeper or wider."""
    for key in ("in_channels", "out_channels"):
        if teacher[key] != student[key]:
            raise InputError.of(f"student.{key}", f"the teacher's {teacher[key]}", student[key])
    stages, most = len(student["block_out_channels"]), len(teacher["block_out_channels"])
    if not 1 <= stages <= most:
        raise InputError.of("student.block_out_channels", f"1 to {most} stages, as the teacher has {most}", stages)
    for key in ("layers_per_block", "block_out_channels", "transformer_layers_per_block"):
        pairs = zip(per_stage(student, key), per_stage(teacher, key), strict=False)
        for stage, (own, limit) in enumerate(pairs):
            if _deepest(own) < 1 or _deepest(own) > _deepest(limit):
                raise InputError.of(f"student.{key}", f"1 to {limit} in stage {stage}, as the teacher has {limit}", own)
    if per_stage(student, "cross_attention_dim") != per_stage(teacher, "cross_attention_dim")[:stages]:
        rule = f"the teacher's {teacher['cross_attention_dim']}"
        raise InputError.of("student.cross_attention_dim", rule, student["cross_attention_dim"])
    if student["mid_block_type"] is not None and teacher["mid_block_type"] is None:
        raise InputError.of(
            "student.mid_block_type", "None, as the teacher has no mid block", student["mid_block_type"]
        )
    if _conditioned(teacher) and not _conditioned(student):
        raise InputError.of("spec", "a student that keeps some cross-attention", "one that would not see the prompt")


def per_stage(config: Mapping[str, Any], key: str) -> list[Any]:
    """``config[key]`` as one value per stage, outermost first."""
    value = config[key]
    return list(value) if isinstance(value, list | tuple) else [value] * len(config["down_block_types"])


def cross_attends(block_type: str | None) -> bool:
    """Whether blocks of this type contain transformers (with a ``proj_out``) that attend to the prompt."""
    return block_type is not None and "CrossAttn" in block_type and "Simple" not in block_type


def _shorten(config: Mapping[str, Any], stages: int) -> dict[str, Any]:
    """``config`` without its ``stages`` innermost stages."""
    total = len(config["down_block_types"])
    if not 0 <= stages < total:
        raise InputError.of("spec.remove_stages", f"0 to {total - 1}, as the teacher has {total} stages", stages)
    short = dict(config)
    for key in _PER_STAGE:
        if isinstance(config.get(key), list | tuple):
            short[key] = tuple(config[key][: total - stages])
    for key in ("up_block_types", "reverse_transformer_layers_per_block"):
        if config.get(key) is not None:
            short[key] = tuple(config[key][stages:])
    return short


def _scaled(config: Mapping[str, Any], factor: float) -> tuple[int, ...]:
    """Every stage's channels times ``factor``, rounded to the groups of the norms (at least one group)."""
    if not 0 < factor <= 1:
        raise InputError.of("spec.width", "a factor above 0, at most 1 (the teacher's own width)", factor)
    groups = config.get("norm_num_groups") or 1
    return tuple(max(groups, round(factor * width / groups) * groups) for width in config["block_out_channels"])


def _given(config: Mapping[str, Any], widths: tuple[int, ...]) -> tuple[int, ...]:
    groups = config.get("norm_num_groups") or 1
    if len(widths) != len(config["block_out_channels"]):
        raise InputError.of(
            "spec.block_out_channels", f"one value for each of {len(config['block_out_channels'])} stages", widths
        )
    if any(width % groups for width in widths):
        raise InputError.of("spec.block_out_channels", f"multiples of norm_num_groups ({groups})", widths)
    return widths


def _heads(config: Mapping[str, Any], before: Sequence[int]) -> int | tuple[int, ...]:
    """Heads per stage for channels that were ``before``: the teacher's number of heads, else heads of the teacher's
    size.

    (``attention_head_dim`` is the number of heads if blocks cross-attend: a misnomer of diffusers.)
    """
    heads = per_stage(config, "attention_head_dim")
    chosen = []
    stages = zip(heads, before, config["block_out_channels"], config["down_block_types"], strict=True)
    for head, old, new, kind in stages:
        if not cross_attends(kind) or new % head == 0:
            chosen.append(head)
        elif old % head == 0 and new % (old // head) == 0:
            chosen.append(new // (old // head))
        else:
            raise InputError.of("student.block_out_channels", f"channels that divide into {head} heads", new)
    return config["attention_head_dim"] if chosen == heads else tuple(chosen)


def _deepest(value: int | Sequence[Any]) -> int:
    return value if isinstance(value, int) else max(_deepest(item) for item in value)


def _conditioned(config: Mapping[str, Any]) -> bool:
    kinds = [*config["down_block_types"], *config["up_block_types"], config["mid_block_type"] or ""]
    return any("CrossAttn" in kind for kind in kinds)
