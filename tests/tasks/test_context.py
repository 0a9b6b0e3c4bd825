# SPDX-License-Identifier: Apache-2.0
"""Data and measures of the context task: digits in front of colored backgrounds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastdistill.errors import InputError
from fastdistill.tasks.context import data, measures
from tests.harness import EPS, EPS64


def _apart(one: Tensor, two: Tensor) -> Tensor:
    return ((one - two + 0.5) % 1 - 0.5).abs()


def test_the_hue_tells_the_class_in_the_classifiers_data_alone() -> None:
    """As often as specified, within four standard errors; in the broad data the hues are uniform in every class."""
    students, broad, swapped = data.students(), data.broad(), data.held_out("swapped")
    assert students.images.shape == (1437, 3, 8, 8) and len(broad.images) == data.DRAWS * 1437
    own = students.hue == data.own_hue(students.digit)
    assert abs(float(own.double().mean()) - data.OWN) < 4 * math.sqrt(data.OWN * (1 - data.OWN) / 1437)
    assert torch.equal(swapped.hue, data.own_hue((swapped.digit + 3) % 10))
    for scenes in (broad, data.held_out("independent")):
        for digit in range(10):
            hue = scenes.hue[scenes.digit == digit].double()
            bound = 4 / math.sqrt(len(hue))
            assert abs(float((2 * math.pi * hue).cos().mean())) < bound and abs(float(hue.mean()) - 0.5) < bound / 3


def test_kinds_of_held_out_scans_differ_in_what_they_say() -> None:
    same, clutter = data.held_out("same"), data.held_out("clutter")
    for kind in data.HELD_OUT:
        scenes = data.held_out(kind)
        assert len(scenes.images) == 360 and torch.equal(scenes.scan, torch.arange(360))
        assert torch.equal(scenes.ink, same.ink) and scenes.images.abs().max() <= 1
    assert torch.equal(clutter.hue, same.hue)
    flat = data.backgrounds(same.hue, same.scan, 2, 0.0)
    once, twice = (data.backgrounds(same.hue, same.scan, 2, factor) - flat for factor in (1.0, 2.0))
    assert (twice - 2 * once).abs().max() < 16 * EPS
    assert once.abs().amax((1, 2, 3)).mean() > data.WAVE and once.abs().max() < data.WAVES * data.WAVE


def test_a_scene_depends_on_its_own_row_alone() -> None:
    """It is the same in every run: the first hues and waves are compared with words of the generator."""
    hue, rows = torch.tensor([0.1, 0.7, 0.4]), torch.tensor([5, 900, 3])
    whole = data.backgrounds(hue, rows, 1)
    assert torch.equal(data.backgrounds(hue[1:2], rows[1:2], 1), whole[1:2])
    assert len(data.broad().images[:1437].flatten(1).unique(dim=0)) == 1437
    first = data.broad()
    again = data._scenes(data.digits.scans()[0], first.scan[:100], 1, "independent")
    assert torch.equal(again.images, first.images[:100])


@pytest.mark.parametrize("kind", data.HELD_OUT)
def test_the_measures_read_what_was_composed(kind: str) -> None:
    scenes = data.held_out(kind)
    found = measures.chroma(scenes.images)
    hue = torch.atan2(found[:, 1], found[:, 0]) / (2 * math.pi)
    assert _apart(hue, scenes.hue).max() < (0.06 if kind == "clutter" else 0.03)  # the waves behind the ink
    plain = data.composed(scenes.ink, data.backgrounds(scenes.hue, scenes.scan, 2, 0.0))
    exact = measures.chroma(plain)
    assert _apart(torch.atan2(exact[:, 1], exact[:, 0]) / (2 * math.pi), scenes.hue).max() < 16 * EPS
    assert (exact.norm(dim=1) - data.CHROMA * math.sqrt(1.5)).abs().max() < 16 * EPS
    assert (measures.ink(plain) - scenes.ink).abs().max() < 16 * EPS
    assert measures.Judge().right(scenes.images, scenes.digit).double().mean() > 0.98


def test_the_measures_of_an_image_of_ink_alone() -> None:
    full = torch.full((2, 3, 8, 8), data.INK)
    assert measures.chroma(full).abs().max() < EPS
    assert len(measures.Judge().digits(full[:0])) == 0


def test_the_variance_within_a_class() -> None:
    """Around the mean of each class, averaged over classes: shifting a class changes nothing."""
    features = torch.randn(60, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(60) % 4
    shifted = features + 10.0 * labels[:, None, None]
    expected = sum(float(features[labels == one].flatten(1).T.cov().trace()) for one in range(4)) / 4
    assert abs(measures.within(features, labels) - expected) < 64 * EPS64 * expected
    assert abs(measures.within(shifted, labels) - expected) < 1e4 * EPS64 * expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.held_out("other"), "kind: expected one of same, independent, swapped, clutter, got 'other'"),
        (lambda: measures.chroma(torch.zeros(2, 1, 8, 8)), r"images: expected \[n, 3, 8, 8\], got \(2, 1, 8, 8\)"),
        (lambda: measures.ink(torch.full((1, 3, 8, 8), 255.0)), "images: expected finite values around .*, got 255"),
        (lambda: measures.Judge().digits(torch.full((1, 3, 8, 8), math.nan)), "images: expected finite .*, got inf"),
        (lambda: measures.within(torch.zeros(3, 2), torch.zeros(2).long()), r"labels: expected \[3\] integers"),
        (lambda: measures.within(torch.zeros(3, 2), torch.tensor([0, 0, 1])), r"two rows or more of each class, got"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
