# SPDX-License-Identifier: Apache-2.0
"""Data, reader and teacher of the shades."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch

from fastdistill.tasks.digits import teacher as digits
from fastdistill.tasks.digits.judge import Judge
from fastdistill.tasks.shades import data, teacher
from fastdistill.tasks.shades.judge import read, right
from fastdistill.tasks.shades.sampling import sample
from fastdistill.tasks.shades.teacher import TeacherConfig, exact, moments, train_teacher
from tests.harness import EPS64


def test_tints_are_normal_around_the_corners_of_a_cube() -> None:
    """As read by the reader (the slope of the five darkest pixels), within four standard errors; also the
    accuracies."""
    images, rows = data.held_out()
    n = 3 * len(rows)
    along = read(images).tint * data.corners(rows)
    ink = data.digits.scans()[1].ink.flatten(1).double()
    slope = float((ink.topk(5).values.mean(1) / ink.amax(1)).mean())
    assert abs(float(along.mean()) - slope) < 4 * data.SPREAD / math.sqrt(n)
    assert moments(images, rows) == (1, 1)
    few = slice(None, None, 19)
    found = right(Judge(), images[few], rows[few])
    n = len(found.color)
    expected = (0.5 * math.erfc(-1 / data.SPREAD / math.sqrt(2))) ** 3
    assert abs(float(found.color.double().mean()) - expected) < 4 * math.sqrt(expected * (1 - expected) / n)
    assert found.digit.double().mean() > 0.97


def test_every_scan_is_there_in_every_color() -> None:
    images, rows = data.held_out()
    ink = data.digits.scans()[1].ink
    assert images.shape == (8 * data.DRAWS * len(ink), 3, 8, 8) and rows.bincount().gt(0).sum() == 80
    kept, _ = data.training()
    assert len(kept) == 8 * data.DRAWS * 1437
    first = torch.cat([kept[:100], images[:100]]).flatten(1)
    assert len(first.unique(dim=0)) == 200


def test_the_reader_finds_tint_and_ink() -> None:
    """For tints of any sign, and with noise; an empty image has no tint."""
    part = data.digits.scans()[1]
    ink, n = part.ink.double(), len(part.ink)
    tint = 2 * torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = ink[:, None] * tint[:, :, None, None]
    found = read(images)
    slope = found.tint / tint
    both = torch.corrcoef(torch.stack([found.tint.flatten(), tint.flatten()]))[0, 1]
    assert both > 0.999 and 0.97 < slope.mean() < 1 and slope.min() > 0.8 and slope.max() < 1 + 1e3 * EPS64
    assert (found.ink - (ink / slope[:, :1, None]).clamp(max=1)).abs().max() < 1e3 * EPS64
    noise = 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    noisy = torch.corrcoef(torch.stack([read(images + noise).tint.flatten(), tint.flatten()]))[0, 1]
    assert noisy > 0.99
    nothing = read(torch.zeros(1, 3, 8, 8))
    assert nothing.tint.abs().max() == nothing.ink.max() == 0


def test_the_exact_world_without_guidance() -> None:
    """A grid that starts at a finite sigma with pure noise loses s / sqrt(s^2 + sigma^2) of the mean, up to its own
    error; a finer grid that starts with more noise loses nothing."""
    color, mean, variance = exact()
    lost = data.SPREAD * data.norm() / math.hypot(data.SPREAD * data.norm(), 30.0)
    assert abs(1 - mean - lost) < 0.01 and 0.88 < variance < 0.92 and 0.75 < color < 0.79
    fine = exact("karras:400@2000..0.01")
    assert abs(fine[1] - 1) < 0.01 and abs(fine[2] - 1) < 0.04


def test_the_teacher_is_trained_on_from_the_digits(tmp_path: Path) -> None:
    recipe = TeacherConfig(images_per_prompt=1, output=str(tmp_path))
    train = dataclasses.replace(recipe.train, steps=1, batch=2)
    made = train_teacher(dataclasses.replace(recipe, train=train))
    assert made["start"] == digits.provenance()["sha256"] and made["data"] == data.fingerprint()
    assert made["metrics"]["images"] == 80 and made["metrics"]["digit"] > 0.5
    begun, trained = digits.load_teacher(), digits.load_teacher(tmp_path / "teacher.safetensors")
    for one, two in zip(begun.parameters(), trained.parameters(), strict=True):
        assert (one - two).abs().max() < 0.01  # one step of AdamW from there
    other = made | {"start": "0" * 64}
    assert digits.other_recipe(made, other) == [f"start: expected '{made['start']}', got '{'0' * 64}'"]


def test_the_shipped_teacher_is_what_it_says() -> None:
    """Its figures without guidance for 640 images, compared with exact scores; and that it draws the requested
    image."""
    made = teacher.provenance()
    assert teacher.WEIGHTS.stat().st_size <= 5_000_000 and made["start"] == digits.provenance()["sha256"]
    assert made["data"] == data.fingerprint() and made["recipe"]["train"]["steps"] == TeacherConfig().train.steps
    metrics = made["metrics"]
    assert abs(metrics["color"] - metrics["exact_color"]) < 0.03 and metrics["digit"] > 0.9
    rows = torch.arange(3, 80, 4)
    images = sample(teacher.load_teacher(), digits.prompt_bank(), rows, rows, 123, "karras:12@30..0.09", 2.0)
    found = right(Judge(), images, rows)
    assert found.color.double().mean() > 0.9 and found.digit.double().mean() > 0.9


def test_an_image_depends_on_its_own_row_alone() -> None:
    model, bank = digits.load_teacher(), digits.prompt_bank()
    rows = torch.tensor([5, 17, 44])
    few = "karras:4@30..0.09"
    whole = sample(model, bank, rows, rows, 1, few, 1.0, batch=2)
    alone = sample(model, bank, rows[1:2], rows[1:2], 1, few, 1.0)
    near = 64 * torch.finfo(torch.float32).eps * 4 * whole.abs().max()  # 64 layers; other sums in a batch of four
    assert (alone - whole[1:2]).abs().max() < near
    assert sample(model, bank, rows[:0], rows[:0], 1).shape == (0, 3, 8, 8)
