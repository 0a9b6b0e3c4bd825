# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from fastdistill.errors import InputError
from fastdistill.models import SPECS, StudentSpec, copy_from_teacher, make_student
from tests.harness import assert_alike

from .conftest import inputs

Make = Callable[..., UNet2DConditionModel]


def mark(model: nn.Module) -> dict[str, float]:
    """Fill every tensor with a different number."""
    values = {}
    for index, (key, tensor) in enumerate(model.state_dict().items()):
        tensor.fill_(index + 1)
        values[key] = float(index + 1)
    return values


def expected_source(key: str, blocks_removed: int) -> str:
    """BK-SDM's map for the structure of SD-1.x, written independently of the tested code."""
    match = re.match(r"up_blocks\.(\d)\.(.*)", key)
    if match is None:
        return key
    rest = re.sub(r"^(resnets|attentions)\.1\.", r"\1.2.", match[2])
    return f"up_blocks.{int(match[1]) + blocks_removed}.{rest}"


@pytest.mark.parametrize(("name", "blocks_removed"), [("bk_base", 0), ("bk_small", 0), ("bk_tiny", 1)])
def test_every_tensor_has_its_teacher_s_value(small: Make, name: str, blocks_removed: int) -> None:
    teacher = small()
    values = mark(teacher)
    student = make_student(teacher, name)
    for key, tensor in student.model.state_dict().items():
        source = expected_source(key, blocks_removed)
        assert torch.equal(tensor, torch.full_like(tensor, values[source])), key
    assert student.copied is not None
    assert student.copied.sources == {key: expected_source(key, blocks_removed) for key in student.model.state_dict()}
    assert set(student.copied.sources.values()).isdisjoint(student.copied.unused)
    assert len(set(student.copied.sources.values())) + len(student.copied.unused) == len(values)
    assert all(key.startswith("up_blocks.") for key in student.copied.moved)


def silence_resnet(resnet: nn.Module) -> None:
    """Make a residual layer return its hidden states and ignore the skip connection."""
    nn.init.zeros_(resnet.conv2.weight)
    nn.init.zeros_(resnet.conv2.bias)
    if resnet.conv_shortcut is not None:
        weight = resnet.conv_shortcut.weight
        nn.init.zeros_(resnet.conv_shortcut.bias)
        with torch.no_grad():
            weight.copy_(torch.eye(*weight.shape[:2])[..., None, None])


def silence_attention(attention: nn.Module) -> None:
    nn.init.zeros_(attention.proj_out.weight)
    nn.init.zeros_(attention.proj_out.bias)


@pytest.mark.parametrize("name", ["bk_base", "bk_small"])
def test_removing_layers_that_do_nothing_changes_nothing(small: Make, name: str) -> None:
    teacher = small()
    for block in [*teacher.down_blocks, *teacher.up_blocks]:
        silence_resnet(block.resnets[1])
        if getattr(block, "attentions", None):
            silence_attention(block.attentions[1])
    if SPECS[name].remove_mid:
        for resnet in teacher.mid_block.resnets:
            silence_resnet(resnet)
        silence_attention(teacher.mid_block.attentions[0])
    student = make_student(teacher, name).model
    exact = {k: v.double() if v.is_floating_point() else v for k, v in inputs(teacher).items()}
    with torch.no_grad():
        ours, theirs = student(**inputs(teacher)).sample, teacher(**inputs(teacher)).sample
        scratch = make_student(teacher, name, init="random").model(**inputs(teacher)).sample
    assert theirs.std() > 0.1
    with torch.no_grad():
        assert_alike(ours, theirs, teacher.double()(**exact).sample)
    assert (scratch - theirs).abs().max() > 0.1


def test_deeper_blocks_keep_their_last_layer(small: Make) -> None:
    teacher = small(layers_per_block=(3, 2, 1, 3))
    student = make_student(teacher, StudentSpec(layers_per_block=1))
    assert student.copied is not None
    sources = student.copied.sources
    last = {block: sources[f"up_blocks.{block}.resnets.1.conv1.weight"] for block in range(4)}
    assert last == {
        0: "up_blocks.0.resnets.3.conv1.weight",
        1: "up_blocks.1.resnets.1.conv1.weight",
        2: "up_blocks.2.resnets.2.conv1.weight",
        3: "up_blocks.3.resnets.3.conv1.weight",
    }


def test_nothing_is_copied_unless_all_fits(small: Make) -> None:
    teacher = small()
    student = make_student(teacher, "bk_base", init="random").model
    student.conv_out = nn.Conv2d(8, 5, 3)
    before = {key: tensor.clone() for key, tensor in student.state_dict().items()}
    message = (
        "student conv_out.weight: expected the shape of the teacher's conv_out.weight (4, 8, 3, 3), got (5, 8, 3, 3)"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        copy_from_teacher(student, teacher)
    assert all(torch.equal(tensor, before[key]) for key, tensor in student.state_dict().items())
    student = make_student(teacher, "bk_base", init="random").model
    student.extra = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"student extra.weight: expected a tensor of the teacher to copy, got none"):
        copy_from_teacher(student, teacher)


def test_stages_of_unequal_width_cannot_be_copied(small: Make) -> None:
    with pytest.raises(InputError, match=r"student.block_out_channels: .*use init='random'"):
        make_student(small(), "channel_tiny", init="teacher")


def test_stage_removal_where_the_channels_of_the_next_stage_differ(small: Make) -> None:
    teacher = small(block_out_channels=(8, 16, 32, 40))
    with pytest.raises(
        InputError, match=r"student up_blocks.0.resnets.0.*teacher's up_blocks.1.resnets.0.*init='random'"
    ):
        make_student(teacher, "bk_tiny")
    assert make_student(teacher, "bk_tiny", init="random").copied is None
