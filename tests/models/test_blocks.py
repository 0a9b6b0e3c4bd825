# SPDX-License-Identifier: Apache-2.0
"""Students of transformers: which blocks they keep, the source of their weights, and that they can be trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdistill.errors import InputError
from fastdistill.models import BlockSpec, make_student
from tests import tiny
from tests.models import tiny_families as small

TRANSFORMERS = [name for name, (family, _) in small.TINY.items() if family != "unet"]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_half_of_the_blocks(name: str) -> None:
    """Each tensor is that of the kept teacher block; the student has a tap at the end of each of its blocks."""
    teacher: Any = small.model(name)
    made = make_student(teacher, "half_depth")
    theirs = teacher.state_dict()
    for key, value in made.model.state_dict().items():
        head, _, rest = key.partition(".")
        number, _, tail = rest.partition(".")
        source = f"{head}.{2 * int(number) + 1}.{tail}" if head.endswith("transformer_blocks") else key
        assert torch.equal(value, theirs[source]), key
    assert ("transformer_blocks.1", "transformer_blocks.0") in zip(made.teacher_taps, made.student_taps, strict=True)
    taps = tuple(zip(made.teacher_taps, made.student_taps, strict=True))
    run = tiny.trainer(teacher, made, tiny.features(*taps), latents=small.cache(name), prompts=small.bank(name))
    assert run.fit().history[0]["feature"] > 0 and not made.needs_adapters
    assert list(made.channels) == list(run.step.objective._knowledge.adapters.pairs)  # type: ignore[attr-defined]


def test_a_list_a_prefix_and_odd_depths() -> None:
    flux: Any = small.model("flux")
    made = make_student(flux, BlockSpec(blocks=(0,)))
    assert made.model.config["num_layers"] == 1 and made.model.config["num_single_layers"] == 2
    assert make_student(flux, {"single_blocks": [1]}).model.config["num_single_layers"] == 1
    dit = make_student(small.model("dit"), BlockSpec(first=3))
    assert dit.teacher_taps == dit.student_taps == tuple(f"transformer_blocks.{i}" for i in range(3))
    assert make_student(dit.model, "half_depth").teacher_taps == ("transformer_blocks.0", "transformer_blocks.2")
    sd35 = make_student(small.model("sd35"), BlockSpec(blocks=(1, 2, 3)))
    assert sd35.model.config["dual_attention_layers"] == (0,)
    fresh = make_student(small.model("dit"), "half_depth", init="random")
    assert fresh.copied is None


@pytest.mark.parametrize(("name", "spec", "message"), [
    ("dit", "half_dept", r"spec: expected one of half_depth, .* \(did you mean half_depth\?\)"),
    ("dit", {"blocks": [0, 4]}, r"spec.blocks: expected rising numbers of blocks, 0 to 3, got \(0, 4\)"),
    ("dit", {"blocks": [1, 0]}, r"spec.blocks: expected rising numbers"),
    ("dit", {"widths": 0.5}, r"spec: expected the fields every, first, .*, got widths"),
    ("dit", {}, r"spec: expected one of every, first and blocks, or a width, got none"),
    ("dit", {"every": 2, "first": 1}, r"spec: expected one of .*, got every and first"),
    ("dit", {"every": "2"}, r"spec.every: expected a whole number or none, got '2'"),
    ("dit", {"first": 1.5}, r"spec.first: expected a whole number or none, got 1.5"),
    ("dit", {"blocks": 3}, r"spec.blocks: expected a list of whole numbers or none, got 3"),
    ("dit", {"width": "half"}, r"spec.width: expected a number or none, got 'half'"),
    ("sd", {"remove_mid": 1}, r"spec.remove_mid: expected true or false, got 1"),
    ("sd", {"layers_per_block": True}, r"spec.layers_per_block: expected a whole number or none, got True"),
    ("dit", {"first": 4}, r"spec: expected a part to remove"),
    ("dit", {"first": 5}, r"spec.first: expected 1 to 4"),
    ("dit", {"single_blocks": [0]}, r"spec.single_blocks: expected None"),
    ("sd", BlockSpec(every=2), r"spec: expected a StudentSpec, for a U-Net"),
])  # fmt: skip
def test_specs_that_do_not_fit(name: str, spec: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_student(small.model(name), spec)
