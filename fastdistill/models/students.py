# SPDX-License-Identifier: Apache-2.0
"""Smaller students made from a teacher: by removing blocks (BK-SDM, arXiv 2305.15798) or by narrowing every stage.

The narrower students and their taps are those of random conditioning (arXiv 2504.02011).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from fastdistill.errors import InputError, described
from fastdistill.models import families, peft
from fastdistill.models.blocks import BLOCK_SPECS, BlockSpec, block_plan
from fastdistill.models.copying import CopyReport, copy_from_teacher, copy_sources
from fastdistill.models.specs import StudentSpec, cross_attends, per_stage, spec_of, student_config, student_spec
from fastdistill.models.taps import resolve
from fastdistill.models.weights import quantized
from fastdistill.ops import _check


@dataclass(frozen=True)
class Student:
    """A student, with what is needed to distill it.

    model: of the teacher's class, float32, on the teacher's device.
    teacher_taps, student_taps: names of modules whose outputs are compared, in pairs.
    channels: (student channels, teacher channels) of each pair, for ``Adapters``; empty if the teacher has no known
        family, because such a student has the teacher's width.
    copied: the tensors of the teacher from which its weights were copied.
    """

    model: Any
    teacher_taps: tuple[str, ...]
    student_taps: tuple[str, ...]
    channels: tuple[tuple[int, int], ...]
    copied: CopyReport | None

    @property
    def needs_adapters(self) -> bool:
        return any(student != teacher for student, teacher in self.channels)


def make_student(
    teacher: nn.Module,
    spec: str | StudentSpec | BlockSpec | Mapping[str, Any] | Any,
    *,
    init: Literal["teacher", "random"] = "teacher",
    seed: int = 0,
    guidance_embedding: bool = False,
) -> Student:
    """Make a student of ``teacher`` by ``spec``, initialized from the teacher's weights or randomly from ``seed``.

    A ``StudentSpec`` (``SPECS``) is for U-Nets, a ``BlockSpec`` (``BLOCK_SPECS``) for the transformers of the other
    families; without a width it is also for any model of diffusers with lists of blocks. A configuration of PEFT, such
    as ``LoraConfig``, or a mapping with ``peft_type`` as in ``adapter_config.json``, gives the teacher itself with new
    adapters: the weights below them are frozen and share the teacher's memory, so merging adapters into them would
    change the teacher.

    A student with the teacher's width is initialized from copies of its tensors, a narrower one from slices of them
    (``fastdistill.models.slicing``).

    guidance_embedding: the student gets the guidance weight as an input (``GuidanceDistillation.scale``), like latent
    consistency models and Flux, even if the teacher does not have it. The new weights are zero at first, so that the
    student starts as if it had no such input. For U-Nets and Flux.

    The global random state does not change. For a teacher on the meta device the student is there too, for counting and
    planning. Raises ``InputError``, before anything is allocated, if the spec does not fit the teacher, and
    ``FastdistillError`` if PEFT is needed and not installed.
    """
    family = families.family_of(teacher, "teacher")
    if init not in ("teacher", "random"):
        raise InputError.of("init", "'teacher' or 'random'", repr(init))
    seed = _check.seed(seed)
    if not isinstance(guidance_embedding, bool):
        raise InputError.of("guidance_embedding", "True or False", described(guidance_embedding))
    if peft.is_config(spec):
        if guidance_embedding and not family.reads_guidance(families.unwrapped(teacher).config):
            rule = "False with adapters on a teacher that does not read the guidance weight"
            raise InputError.of("guidance_embedding", rule, True)
        return _adapted(family, teacher, spec, init, seed)
    if init == "teacher" and quantized(teacher):
        rule = "weights to copy, such as the model's before it was quantized (or use init='random')"
        raise InputError.of("teacher", rule, "quantized ones")
    whole: Any = families.unwrapped(teacher)
    source_of: Callable[[str], str] | None = None
    if isinstance(family, families.Other) and not family.blocks:
        rule = "blocks in lists whose lengths its configuration says, to keep some of them (adapters need none)"
        raise InputError.of("teacher", rule, f"{family} without")
    if family.blocks:
        blocks = block_plan(family, whole.config, spec_of(BlockSpec, BLOCK_SPECS, spec, ", for a transformer"))
        config, taps, source_of = blocks.config, blocks.taps, blocks.source_of
    else:
        if isinstance(spec, BlockSpec):
            raise InputError.of("spec", "a StudentSpec, for a U-Net", described(spec))
        spec = student_spec(spec)
        config = student_config(whole.config, spec)
        taps = (student_taps if spec.taps == "blocks" else self_attention_taps)(whole.config, config)
    new = ""
    if guidance_embedding:
        read = family.reading_guidance(dict(config))
        new, config = "" if read == config else family.guidance[2], read
    with torch.device("meta"):
        plan = _made(whole, config)
    check_parameters(whole, plan)
    if init == "teacher":
        copy_sources(plan, whole, source_of, new)
    theirs = resolve(whole, [pair[0] for pair in taps])
    own = resolve(plan, [pair[1] for pair in taps])
    if isinstance(family, families.Other):
        pairs: tuple[tuple[int, int], ...] = ()
    elif family.blocks:
        pairs = ((family.width(config), family.width(whole.config)),) * len(taps)
    else:
        pairs = tuple((_channels(s), _channels(t)) for s, t in zip(own, theirs, strict=True))
    device = next(whole.parameters()).device
    model = plan if device.type == "meta" else _build(whole, config, seed).to(device)
    if new:
        *_, last = (layer for layer in model.get_submodule(new).modules() if isinstance(layer, nn.Linear))
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
    report = copy_from_teacher(model, whole, source_of, new) if init == "teacher" else None
    return Student(model, tuple(pair[0] for pair in taps), tuple(pair[1] for pair in taps), pairs, report)


def _adapted(family: families.Family, teacher: nn.Module, config: Any, init: str, seed: int) -> Student:
    """A teacher with adapters, tapped at each of its blocks."""
    if init != "teacher":
        raise InputError.of("init", "'teacher' with adapters, as they are for its weights", repr(init))
    whole = families.unwrapped(teacher)
    if family.blocks:
        names = [f"{name}.{i}" for name, field in family.blocks.items() for i in range(int(whole.config[field]))]
        channels = [] if isinstance(family, families.Other) else [family.width(whole.config)] * len(names)
    elif isinstance(family, families.Other):
        names, channels = [], []
    else:
        names = [name for name, _ in student_taps(whole.config, whole.config)]
        channels = [_channels(module) for module in resolve(whole, names)]
    pairs = tuple((count, count) for count in channels)
    return Student(peft.with_adapters(whole, config, seed), tuple(names), tuple(names), pairs, None)


def check_parameters(teacher: nn.Module, student: nn.Module) -> None:
    """InputError for a student that trains more parameters than its teacher has.

    Frozen parameters do not count (for example below LoRA), nor do those for the guidance weight. With a quantized
    teacher there is no check, because its parameters do not show the number of its weights.
    """
    if quantized(teacher):
        return
    family = families.find(student)
    new = f"{family.guidance[2]}." if family and family.guidance[2] else None
    most = sum(p.numel() for p in teacher.parameters())
    own = sum(p.numel() for n, p in student.named_parameters() if p.requires_grad and not (new and new in n))
    if own > most:
        raise InputError.of("student", f"at most the teacher's {most:,} parameters", f"{own:,}")


def student_taps(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs (teacher module, student module) to compare, for two configurations of a teacher and its student.

    Equal widths: the outputs of the blocks. If innermost stages were removed, the student's innermost down block is
    compared at its last transformer instead, because the teacher's block also downsamples. Other widths: the last
    convolution of every block, with 1x1 adapters.
    """
    stages, removed = (
        len(student["block_out_channels"]),
        len(teacher["block_out_channels"]) - len(student["block_out_channels"]),
    )
    own, theirs = per_stage(student, "layers_per_block"), per_stage(teacher, "layers_per_block")
    narrow = tuple(student["block_out_channels"]) != tuple(teacher["block_out_channels"])[:stages]
    down = [f"down_blocks.{i}" for i in range(stages)]
    pairs = [(name, name) for name in down]
    if removed or narrow:
        last = stages - 1
        kind = student["down_block_types"][last]
        pairs[last] = (_last_layer(down[last], kind, theirs[last]), _last_layer(down[last], kind, own[last]))
    if narrow:
        pairs[:-1] = [(f"{name}.downsamplers.0.conv",) * 2 for name in down[:-1]]
        if student["mid_block_type"] is not None:
            mid = "attentions.0.proj_out" if cross_attends(student["mid_block_type"]) else "resnets.1.conv2"
            pairs.append((f"mid_block.{mid}", f"mid_block.{mid}"))
    for block in range(stages):
        names = f"up_blocks.{block + removed}", f"up_blocks.{block}"
        if narrow and block < stages - 1:
            names = f"{names[0]}.upsamplers.0.conv", f"{names[1]}.upsamplers.0.conv"
        elif narrow:
            kind = student["up_block_types"][block]
            layers = theirs[stages - 1 - block] + 1, own[stages - 1 - block] + 1
            names = _last_layer(names[0], kind, layers[0]), _last_layer(names[1], kind, layers[1])
        pairs.append(names)
    return pairs


def self_attention_taps(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs (teacher module, student module) to compare as in KOALA (arXiv 2312.04005): every self-attention in the
    student's down and up blocks; in blocks without attention the downsampler or the last convolution."""
    stages, pairs = len(student["block_out_channels"]), []
    removed = len(teacher["block_out_channels"]) - stages
    own, theirs = per_stage(student, "layers_per_block"), per_stage(teacher, "layers_per_block")
    depths = per_stage(student, "transformer_layers_per_block")

    def attentions(names: tuple[str, str], layers: list[tuple[int, int]], depth: int) -> list[tuple[str, str]]:
        inner = [f"transformer_blocks.{k}.attn1" for k in range(depth)]
        return [
            (f"{names[0]}.attentions.{source}.{name}", f"{names[1]}.attentions.{layer}.{name}")
            for source, layer in layers
            for name in inner
        ]

    for i, kind in enumerate(student["down_block_types"]):
        block = f"down_blocks.{i}"
        if cross_attends(kind):
            pairs += attentions((block, block), [(k, k) for k in range(own[i])], depths[i])
        elif i < stages - 1:
            pairs.append((f"{block}.downsamplers.0.conv",) * 2)
    for i, kind in enumerate(student["up_block_types"]):
        stage, names = stages - 1 - i, (f"up_blocks.{i + removed}", f"up_blocks.{i}")
        if cross_attends(kind):
            layers = [(theirs[stage] if k == own[stage] else k, k) for k in range(own[stage] + 1)]
            pairs += attentions(names, layers, depths[stage])
        else:
            pairs.append((f"{names[0]}.resnets.{theirs[stage]}.conv2", f"{names[1]}.resnets.{own[stage]}.conv2"))
    return pairs


def _last_layer(block: str, kind: str, layers: int) -> str:
    """The last convolution of a block before its resampler."""
    return f"{block}.attentions.{layers - 1}.proj_out" if cross_attends(kind) else f"{block}.resnets.{layers - 1}.conv2"


def _channels(module: nn.Module) -> int:
    """Number of output channels of this module, a block or its last layer."""
    if isinstance(module, Attention):
        return int(module.out_dim)
    blocks = getattr(module, "resnets", None)
    owner = module if blocks is None else blocks[-1]
    return int(getattr(owner, "out_features" if isinstance(owner, nn.Linear) else "out_channels"))


def _build(teacher: Any, config: Mapping[str, Any], seed: int) -> Any:
    """A model with initial weights from ``seed``, on the CPU. Only the CPU's generator is used, and it is restored."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return _made(teacher, config)


def _made(teacher: Any, config: Mapping[str, Any]) -> Any:
    """A model of the teacher's class."""
    return type(teacher).from_config(dict(config))
