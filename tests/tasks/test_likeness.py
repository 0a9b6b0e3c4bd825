# SPDX-License-Identifier: Apache-2.0
"""The distance of samples from the teacher's, for samples with known distances."""

from __future__ import annotations

import pytest
import torch

from fastdistill.errors import InputError
from fastdistill.evaluate.metrics import frechet_distance
from fastdistill.tasks.digits import data
from fastdistill.tasks.digits.judge import Judge
from fastdistill.tasks.digits.likeness import PROMPTS, likeness

IMAGES = 3  # of each prompt


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


@pytest.fixture(scope="module")
def real() -> torch.Tensor:
    """Real scans for every prompt, [80 * 3, 3, 8, 8]."""
    images, rows = data.tinted(data.scans()[1])
    return torch.cat([images[rows == row][:IMAGES] for row in range(len(data.PROMPTS))])


def noisy(images: torch.Tensor, kind: str, size: float) -> torch.Tensor:
    """Add a difference of ``size`` to every value of the images for one kind of prompts."""
    signs = torch.randint(2, images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    chosen = torch.zeros(len(data.PROMPTS))
    chosen[list(data.KINDS[kind])] = size
    return images + signs * chosen.repeat_interleave(IMAGES).view(-1, 1, 1, 1)


def test_distances_are_those_that_were_added(judge: Judge, real: torch.Tensor) -> None:
    found = likeness(judge, real, [noisy(real, "unseen", 0.1), noisy(real, "unseen", 0.3)])
    assert found["seen"]["distance"]["value"] == found["seen"]["frechet"]["value"] == pytest.approx(0, abs=1e-6)
    distance = found["unseen"]["distance"]
    assert distance["each"] == pytest.approx([0.1, 0.3], rel=1e-5) and distance["value"] == pytest.approx(0.2, rel=1e-5)
    assert distance["interval"] == pytest.approx([0.2, 0.2], rel=1e-5)
    first, second = found["unseen"]["frechet"]["each"]
    assert 0 < first < second
    low, high = found["unseen"]["frechet"]["interval"]
    assert low < found["unseen"]["frechet"]["value"] < high


def test_the_frechet_distance_is_of_the_features_of_as_many_prompts(judge: Judge, real: torch.Tensor) -> None:
    student = noisy(real, "seen", 0.2)
    found = likeness(judge, real, [student])["seen"]["frechet"]["value"]
    assert {kind: len(rows) for kind, rows in PROMPTS.items()} == {"seen": 32, "unseen": 32}
    assert set(PROMPTS["seen"]) < set(data.SEEN) and PROMPTS["unseen"] == list(data.UNSEEN)
    rows = (torch.tensor(PROMPTS["seen"])[:, None] * IMAGES + torch.arange(IMAGES)).flatten()
    features = judge.features(real)
    assert features.shape == (len(real), 72) and features[:, 64:].argmin(1).equal(judge.unmixed(real)[0])
    assert found == pytest.approx(frechet_distance(features[rows], judge.features(student[rows])), rel=1e-9)


def test_what_two_samples_of_a_prompt_differ_by(judge: Judge, real: torch.Tensor) -> None:
    unrelated = likeness(judge, real, [real])["seen"]["distance"]["unrelated"]
    pairs = real.view(-1, IMAGES, 192)[torch.tensor(PROMPTS["seen"])]
    differences = [(pairs[:, i] - pairs[:, i - 1]).square().mean(1).sqrt() for i in range(IMAGES)]
    assert unrelated == pytest.approx(float(torch.stack(differences).mean()), rel=1e-5)
    assert likeness(judge, real[::IMAGES], [real[::IMAGES]])["seen"]["distance"]["unrelated"] is None


def test_other_numbers_of_images_are_refused(judge: Judge, real: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"students\[1\]: expected images of each of the 80 prompts"):
        likeness(judge, real, [real, real[:-1]])
