# SPDX-License-Identifier: Apache-2.0
"""Published models on the meta device, from their configurations: their sizes, students and taps."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from fastdistill.models import BlockSpec, Student, Taps, make_student
from fastdistill.models.taps import channels
from tests.models import real

SLOW = pytest.mark.slow
#: Published students, by teacher: exact numbers of parameters, or millions if only these are known.
PUBLISHED = {
    ("sd15", "bk_base"): 579_384_964,
    ("sd15", "bk_small"): 482_346_884,
    ("sd15", "bk_tiny"): 323_384_964,
    ("sdxl", "koala_1b"): 1161,
    ("sdxl", "koala_700m"): 782,
}
DEPTHS = {"sana": BlockSpec(blocks=(1, 5, 19)), "flux": BlockSpec(blocks=(0, 9, 18), single_blocks=(0, 37))}
#: Every kind of student for each model.
STUDENTS: list[tuple[str, str | BlockSpec]] = []
for name, (family, _) in real.MODELS.items():
    if family == "unet":
        specs = ("koala_1b", "koala_700m") if name == "sdxl" else ("bk_base", "bk_small", "bk_tiny")
        STUDENTS += [(name, spec) for spec in specs]
    else:
        STUDENTS += [(name, "half_width")]
        last = real.published(name)["config"]["num_layers"] - 1
        STUDENTS += [(name, "half_depth"), (name, DEPTHS.get(family, BlockSpec(blocks=(1, 5, last))))]


QUICK = [
    ("sd15", "bk_tiny"), ("sdxl", "koala_700m"), ("sana15", "half_width"), ("flux_dev", DEPTHS["flux"]),
    *((name, "half_depth") for name in ("dit_xl_2", "pixart_alpha", "sd35_medium")),
]  # fmt: skip


@functools.cache
def made(name: str, spec: str | BlockSpec) -> Student:
    return make_student(real.teacher(name), spec)


@pytest.mark.parametrize("name", real.MODELS)
def test_parameters_as_published(name: str) -> None:
    """All digits of an exact number, or of a rounded one."""
    published, count = real.published(name)["parameters"], real.count(real.teacher(name))
    if name == "dit_xl_2":  # diffusers has an embedder of times and labels in each block, the paper only one
        blocks = real.teacher(name).transformer_blocks
        count -= sum(real.count(block.norm1.emb) for block in blocks[1:])  # type: ignore[index]
    if isinstance(published, str):
        figure, unit = published.split()
        scale = {"B": 1e9, "M": 1e6}[unit]
        assert f"{count / scale:.{len(figure.partition('.')[2])}f}" == figure
    else:
        assert count == published


@pytest.mark.parametrize(("name", "spec"), [
    pytest.param(*case, marks=[] if case in QUICK else SLOW, id=str(case)) for case in STUDENTS
])  # fmt: skip
def test_each_tensor_of_a_student_has_a_source(name: str, spec: str | BlockSpec) -> None:
    student, teacher = made(name, spec), real.teacher(name)
    own, theirs = student.model.state_dict(), teacher.state_dict()
    assert student.copied is not None and student.copied.sources.keys() == own.keys()
    sliced = {key for key, source in student.copied.sources.items() if own[key].shape != theirs[source].shape}
    assert student.copied.sliced.keys() == sliced and bool(sliced) == (spec == "half_width")
    assert len(set(student.copied.sources.values())) == len(own), "a tensor of the teacher is copied twice"
    left = {key.split(".")[0] for key in student.copied.unused}
    assert left <= {"transformer_blocks", "single_transformer_blocks", "down_blocks", "up_blocks", "mid_block"}
    if (name, spec) in PUBLISHED:
        expected, count = PUBLISHED[name, spec], real.count(student.model)  # type: ignore[index]
        assert count == expected or count // 1_000_000 == expected


@pytest.mark.parametrize(("name", "spec"), [
    pytest.param(*case, marks=[] if case == ("sana", "half_depth") else SLOW, id=str(case)) for case in STUDENTS
])  # fmt: skip
def test_shapes_at_the_taps(name: str, spec: str | BlockSpec) -> None:
    student, teacher = made(name, spec), real.teacher(name)
    shapes = []
    for model, names in ((teacher, student.teacher_taps), (student.model, student.student_taps)):
        with Taps(model, names) as taps, torch.no_grad():
            real.forward(name, model)
            shapes.append([tuple(feature.shape) for feature in taps.features()])
    pairs = tuple((channels(one), channels(other)) for other, one in zip(*shapes, strict=True))
    assert pairs == student.channels and student.needs_adapters == (spec == "half_width")
    assert len(shapes[0]) == len(student.teacher_taps) and all(a[:2] == b[:2] for a, b in zip(*shapes, strict=True))
    if name == "sd15":
        assert shapes[0] == shapes[1]
        assert sum(math.prod(shape[1:]) for shape in shapes[0]) in (6_225_920, 6_062_080)
