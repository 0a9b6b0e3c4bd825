# SPDX-License-Identifier: Apache-2.0
"""The teachers of the context task."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from fastdistill.errors import InputError
from fastdistill.models.weights import weights_hash
from fastdistill.tasks.context import data, teacher
from fastdistill.tasks.context.measures import Judge, chroma, within
from fastdistill.tasks.context.teacher import TeacherConfig, train_teacher
from fastdistill.tasks.digits import teacher as digits
from fastdistill.tasks.shades.sampling import sample

KINDS = ("broad", "same")


def test_prompts_are_in_the_order_of_the_digits() -> None:
    bank = teacher.prompts()
    assert bank.texts == list(data.PROMPTS) and bank.texts[7] == "a seven"
    assert bank.embeddings.shape == (11, 5, 32) and torch.equal(bank.null, digits.prompt_bank().null)
    assert bank.identity == teacher.provenance()["prompts"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["broad", "same"])
def test_a_teacher_is_trained_on_from_the_digits(kind: str, tmp_path: Path) -> None:
    recipe = TeacherConfig(kind=kind, images_per_prompt=2, output=str(tmp_path))
    train = dataclasses.replace(recipe.train, steps=1, batch=2)
    made = train_teacher(dataclasses.replace(recipe, train=train))
    assert made["start"] == digits.provenance()["sha256"] and made["data"] == data.fingerprint()
    assert made["recipe"]["kind"] == kind and made["metrics"]["images"] == 20
    begun, trained = digits.load_teacher(), digits.load_teacher(tmp_path / "teacher.safetensors")
    for one, two in zip(begun.parameters(), trained.parameters(), strict=True):
        assert (one - two).abs().max() < 0.01  # one step of AdamW from there
    assert "kind: expected" in digits.other_recipe(made, made | {"recipe": made["recipe"] | {"kind": "other"}})[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_teachers_are_what_they_say(kind: str) -> None:
    """Checked by their figures, and by 40 samples: the requested digit, with hues like those of the data."""
    made = teacher.provenance(kind)
    assert teacher.weights(kind).stat().st_size <= 5_000_000 and made["start"] == digits.provenance()["sha256"]
    assert made["data"] == data.fingerprint() and made["recipe"]["kind"] == kind
    assert made["recipe"]["train"]["steps"] == TeacherConfig().train.steps
    metrics = made["metrics"]
    assert metrics["right"] > 0.95 and metrics["round_trip"] < 0.04 and abs(metrics["hue_variance"] - 1) < 0.3
    digit = torch.arange(40) % 10
    images = sample(teacher.load_teacher(kind), teacher.prompts(), digit, torch.arange(40), 5, "karras:12@30..0.09")
    assert Judge().right(images, digit).double().mean() > 0.9
    assert (within(chroma(images), digit) > 0.25) == (kind == "broad")  # half of the variance of uniform hues


def test_the_two_teachers_differ() -> None:
    assert weights_hash(teacher.load_teacher("broad")) != weights_hash(teacher.load_teacher("same"))


def test_bad_input() -> None:
    with pytest.raises(InputError, match="kind: expected one of broad, same, got 'other'"):
        teacher.load_teacher("other")
