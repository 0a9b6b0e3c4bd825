# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from fastdistill.errors import InputError
from fastdistill.models import (
    SPECS,
    Adapters,
    StudentSpec,
    Taps,
    check_config,
    check_parameters,
    make_student,
    student_config,
)

from .conftest import count, inputs

Make = Callable[..., UNet2DConditionModel]

PUBLISHED = {  # random conditioning states the widths in millions, BK-SDM's counts are exact
    "bk_base": 579_384_964,
    "bk_small": 482_346_884,
    "bk_tiny": 323_384_964,
    "channel_base": 553.2,
    "channel_small": 425.3,
    "channel_tiny": 314.1,
    "channel_micro": 219.8,
}


def test_teacher_is_sd1(sd1: UNet2DConditionModel) -> None:
    assert count(sd1) == 859_520_964


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_as_published(sd1: UNet2DConditionModel, name: str) -> None:
    student = make_student(sd1, name, init="teacher" if name.startswith("bk") else "random")
    assert next(student.model.parameters()).device.type == "meta"
    found, published = count(student.model), PUBLISHED[name]
    assert (found if isinstance(published, int) else round(found / 1e6, 1)) == published


@pytest.mark.parametrize(
    ("name", "taps", "elements"), [("bk_base", 8, 6_225_920), ("bk_small", 8, 6_225_920), ("bk_tiny", 6, 6_062_080)]
)
def test_tap_elements_of_an_image(sd1: UNet2DConditionModel, name: str, taps: int, elements: int) -> None:
    student = make_student(sd1, name)
    batch = inputs(sd1, size=64, batch=1, length=77)
    own = Taps(student.model, student.student_taps).shapes(**batch)
    theirs = Taps(sd1, student.teacher_taps).shapes(**batch)
    assert own == theirs
    assert len(own) == taps
    assert sum(torch.Size(shape).numel() for shape in own) == elements
    assert not student.needs_adapters


SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize(("name", "millions", "taps"), [("koala_700m", 782, 23), ("koala_1b", 1160, 26)])
def test_koala_is_as_published(name: str, millions: int, taps: int) -> None:
    """782M and 1.16B parameters; taps on self-attentions; the second of an up block is compared with the teacher's
    third."""
    with torch.device("meta"):
        teacher = UNet2DConditionModel(**SDXL)
    assert count(teacher) == 2_567_463_684
    student = make_student(teacher, name)
    assert count(student.model) // 10**6 in (millions, millions + 1)
    pairs = list(zip(student.teacher_taps, student.student_taps, strict=True))
    assert len(pairs) == taps and student.copied is not None and not student.needs_adapters
    deep = "up_blocks.0.attentions.{}.transformer_blocks.4.attn1"
    assert (deep.format(2), deep.format(1)) in pairs and ("down_blocks.0.downsamplers.0.conv",) * 2 in pairs
    assert ("up_blocks.2.resnets.2.conv2", "up_blocks.2.resnets.1.conv2") in pairs
    assert (
        student.copied.sources["up_blocks.1.attentions.1.proj_in.weight"] == "up_blocks.1.attentions.2.proj_in.weight"
    )


def test_taps_of_tiny(sd1: UNet2DConditionModel) -> None:
    student = make_student(sd1, "bk_tiny")
    assert list(zip(student.teacher_taps, student.student_taps, strict=True)) == [
        ("down_blocks.0", "down_blocks.0"),
        ("down_blocks.1", "down_blocks.1"),
        ("down_blocks.2.attentions.1.proj_out", "down_blocks.2.attentions.0.proj_out"),
        ("up_blocks.1", "up_blocks.0"),
        ("up_blocks.2", "up_blocks.1"),
        ("up_blocks.3", "up_blocks.2"),
    ]


def test_taps_of_narrow_students(sd1: UNet2DConditionModel) -> None:
    student = make_student(sd1, "channel_tiny", init="random")
    assert student.teacher_taps == student.student_taps
    assert set(student.student_taps) == {
        *(f"up_blocks.{i}.upsamplers.0.conv" for i in range(3)),
        *(f"down_blocks.{i}.downsamplers.0.conv" for i in range(3)),
        "up_blocks.3.attentions.2.proj_out",
        "mid_block.attentions.0.proj_out",
        "down_blocks.3.resnets.1.conv2",
    }
    assert student.needs_adapters
    batch = inputs(sd1, size=64, batch=1, length=77)
    own = Taps(student.model, student.student_taps).shapes(**batch)
    theirs = Taps(sd1, student.teacher_taps).shapes(**batch)
    assert student.channels == tuple((s[1], t[1]) for s, t in zip(own, theirs, strict=True))
    with torch.device("meta"):
        adapters = Adapters(student.channels).to("meta")
    adapted = adapters([torch.empty(shape, device="meta") for shape in own])
    assert [tuple(feature.shape) for feature in adapted] == theirs


@pytest.mark.parametrize(
    ("spec", "init"),
    [
        ("bk_small", "teacher"),
        ("channel_micro", "random"),
        (StudentSpec(block_out_channels=(24, 48)), "random"),
        (StudentSpec(remove_mid=True, width=0.5), "random"),
        ({"block_out_channels": [16, 32], "remove_mid": True}, "random"),
    ],
)
def test_students_of_the_digits_teacher(digits: UNet2DConditionModel, spec: object, init: str) -> None:
    student = make_student(digits, spec, init=init)  # type: ignore[arg-type]
    assert count(student.model) < count(digits)
    assert student.model(**inputs(student.model)).sample.shape == (2, 3, 8, 8)
    own = Taps(student.model, student.student_taps).shapes(**inputs(digits))
    theirs = Taps(digits, student.teacher_taps).shapes(**inputs(digits))
    assert student.channels == tuple((s[1], t[1]) for s, t in zip(own, theirs, strict=True))
    assert [s[2:] for s in own] == [t[2:] for t in theirs]


def test_every_spec_runs_on_a_small_unet(small: Make) -> None:
    teacher = small()
    for name, spec in SPECS.items():
        if name.startswith("koala"):  # with three stages
            continue
        student = make_student(teacher, spec, init="random")
        assert student.model(**inputs(teacher)).sample.shape == (2, 4, 8, 8), name


def test_stages_with_their_own_depth_and_heads(small: Make) -> None:
    changes = {
        "layers_per_block": (1, 2, 3, 2),
        "attention_head_dim": (2, 4, 8, 8),
        "transformer_layers_per_block": (1, 2, 1, 1),
    }
    teacher = small(**changes)
    student = make_student(teacher, StudentSpec(layers_per_block=1, remove_stages=1, remove_mid=True))
    assert student.model.config["attention_head_dim"] == (2, 4, 8)
    assert student.student_taps[2] == "down_blocks.2.attentions.0.proj_out"
    assert student.teacher_taps[2] == "down_blocks.2.attentions.2.proj_out"
    assert student.model(**inputs(teacher)).sample.shape == (2, 4, 8, 8)


def test_heads_keep_their_size_where_their_number_no_longer_divides(small: Make) -> None:
    teacher = {**small().config, "block_out_channels": (20, 40, 80, 80), "attention_head_dim": (5, 10, 20, 20)}
    assert student_config(teacher, "channel_base")["attention_head_dim"] == (
        4,
        8,
        16,
        20,
    )  # the last stage has no attention
    with pytest.raises(InputError, match=r"block_out_channels: expected channels that divide into 5 heads, got 14"):
        student_config({**teacher, "norm_num_groups": 2}, StudentSpec(block_out_channels=(14, 40, 80, 80)))


def test_random_initialization_is_seeded_and_leaves_the_generator_alone(digits: UNet2DConditionModel) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    students = [
        make_student(digits, "channel_micro", init="random", seed=seed).model.state_dict() for seed in (3, 3, 4)
    ]
    adapters = [Adapters([(8, 16)], seed=seed).state_dict() for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), before)
    for first, second, other in (students, adapters):
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert any(not torch.equal(first[key], other[key]) for key in first)


def test_student_is_fp32_and_shares_nothing(digits: UNet2DConditionModel) -> None:
    student = make_student(digits.bfloat16(), "bk_small").model
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    kept = digits.conv_in.weight.clone()
    nn.init.zeros_(student.conv_in.weight)
    assert torch.equal(digits.conv_in.weight, kept)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bk_bass", r"spec: expected one of bk_base, .*, got 'bk_bass' \(did you mean bk_base\?\)"),
        ({"layers": 1}, r"spec: expected the fields layers_per_block, .*, got layers"),
        (StudentSpec(layers_per_block=3), r"student.layers_per_block: expected 1 to 2 in stage 0, .*, got 3"),
        (StudentSpec(layers_per_block=0), r"student.layers_per_block: expected 1 to 2 in stage 0, .*, got 0"),
        (StudentSpec(remove_stages=4), r"spec.remove_stages: expected 0 to 3, as the teacher has 4 stages, got 4"),
        (StudentSpec(width=1.5), r"spec.width: expected a factor above 0, at most 1 .*, got 1.5"),
        (
            StudentSpec(block_out_channels=(8, 16, 32, 36)),
            r"student.block_out_channels: expected 1 to 32 in stage 3.*got 36",
        ),
        (
            StudentSpec(block_out_channels=(8, 18, 32, 32)),
            r"spec.block_out_channels: expected multiples of norm_num_groups \(4\)",
        ),
        (StudentSpec(block_out_channels=(8, 16)), r"spec.block_out_channels: expected one value for each of 4 stages"),
        (
            StudentSpec(width=0.5, block_out_channels=(4, 8, 16, 16)),
            r"spec: expected width or block_out_channels, got both",
        ),
        (StudentSpec(layers_per_block=2), r"spec: expected a part to remove .* removes nothing"),
        (StudentSpec(remove_stages=3), r"student up_blocks.0.resnets.0"),
    ],
)
def test_specs_that_do_not_fit(small: Make, spec: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_student(small(), spec)  # type: ignore[arg-type]


def test_student_that_would_not_see_the_prompt(digits: UNet2DConditionModel) -> None:
    with pytest.raises(InputError, match="cross-attention"):
        student_config(digits.config, "bk_tiny")


def test_larger_students_are_refused(digits: UNet2DConditionModel) -> None:
    config = dict(digits.config)
    wrong = {
        "layers_per_block": (1, 2),
        "block_out_channels": (32, 96),
        "in_channels": 4,
        "cross_attention_dim": 16,
    }
    for field, value in wrong.items():
        with pytest.raises(InputError, match=f"student.{field}: expected"):
            check_config(config, {**config, field: value})
    stages = {"block_out_channels": (32, 64, 64), "down_block_types": ("CrossAttnDownBlock2D",) * 3}
    with pytest.raises(InputError, match=r"student.block_out_channels: expected 1 to 2 stages, .*, got 3"):
        check_config(config, {**config, **stages})
    with pytest.raises(InputError, match=r"student\.mid_block_type: expected None"):
        check_config({**config, "mid_block_type": None}, config)
    with pytest.raises(InputError, match=r"student: expected at most the teacher's 6 parameters, got 12"):
        check_parameters(nn.Linear(2, 2), nn.Linear(3, 3))


def test_other_models_are_refused() -> None:
    with pytest.raises(InputError, match=r"teacher: expected a model of diffusers, one of UNet2D.*, got Linear"):
        make_student(nn.Linear(2, 2), "bk_base")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="UNet2DConditionModel's config, got DiTTransformer2DModel"):
        student_config({"_class_name": "DiTTransformer2DModel"}, "bk_base")


def test_config_from_json_gives_the_same(small: Make) -> None:
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in small().config.items()}
    assert student_config(config, "bk_tiny") == student_config(small().config, "bk_tiny")
