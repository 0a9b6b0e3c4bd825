# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.errors import InputError
from fastdistill.evaluate import diversity
from fastdistill.evaluate.diversity import (
    bootstrap,
    bootstrap_all,
    class_separation,
    density_coverage,
    mean_shift,
    precision_recall,
    variance_ratio,
    vendi_score,
)
from tests.harness import EPS64, generator


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def counted(real: Tensor, fake: Tensor, k: int) -> tuple[float, float, float, float]:
    """Precision, recall, density and coverage, computed pair by pair."""

    def radius(points: Tensor, i: int) -> float:
        return sorted(float((points[i] - p).norm()) for j, p in enumerate(points) if j != i)[k - 1]

    near, far = ([radius(points, i) for i in range(len(points))] for points in (real, fake))
    inside = [[float((x - y).norm()) <= r for y in fake] for x, r in zip(real, near, strict=True)]
    made = [any(float((x - y).norm()) <= r for y, r in zip(fake, far, strict=True)) for x in real]
    precise = [any(row[j] for row in inside) for j in range(len(fake))]
    total = sum(map(sum, inside))
    return sum(precise) / len(fake), sum(made) / len(real), total / k / len(fake), sum(map(any, inside)) / len(real)


@pytest.mark.parametrize("chunk", [2**26, 40])
def test_neighbours_are_those_of_a_loop(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Also far from the origin, in chunks of one or two rows, and in lower precision."""
    monkeypatch.setattr(diversity, "_CHUNK", chunk)
    real, fake = normal(0, 23, 3), 0.7 * normal(1, 17, 3) + 0.4
    for k in (1, 4):
        expected = counted(real, fake, k)
        for shift in (0.0, 1e4):
            a, b = real + shift, fake + shift
            assert (*precision_recall(a, b, k), *density_coverage(a, b, k)) == expected
    half = real.half().numpy(), fake.half().numpy()
    exact = counted(real.half().double(), fake.half().double(), 3)
    assert (*precision_recall(*half, 3), *density_coverage(*half, 3)) == exact


def test_equal_samples_are_inside_of_balls_without_a_radius() -> None:
    x = normal(2, 6, 4) + 100
    twice = x.repeat(3, 1)
    assert precision_recall(twice, twice, 2) == (1, 1)
    assert density_coverage(twice, x, 2) == (1.5, 1)  # each is in the three balls of its copies, divided by k
    assert precision_recall(twice, x[:1].repeat(4, 1) + 1, 2) == (0, 0)


def test_density_and_coverage_of_one_distribution() -> None:
    n, k, repeats = 60, 3, 40
    found = [density_coverage(normal(2 * i, n, 4), normal(2 * i + 1, n, 4), k) for i in range(repeats)]
    expected = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    means = torch.tensor(found, dtype=torch.float64)
    errors = means.std(0) / math.sqrt(repeats)
    assert abs(float(means[:, 0].mean()) - 1) < 4 * float(errors[0])
    assert abs(float(means[:, 1].mean()) - expected) < 4 * float(errors[1])


def test_distant_sets_share_nothing() -> None:
    real = normal(3, 30, 2)
    assert precision_recall(real, real + 50) == (0, 0) and density_coverage(real, real + 50) == (0, 0)
    narrow = 0.01 * normal(4, 30, 2)  # all realistic, but similar
    precision, recall = precision_recall(real, narrow)
    assert precision > 0.9 and recall < 0.2


@pytest.mark.parametrize("width", [4, 50])
def test_vendi_counts_what_is_different(width: int) -> None:
    """With more samples than feature values, and with fewer."""
    kinds = torch.linalg.qr(normal(5, width, width)).Q[:4]
    near = 64 * EPS64 * 4
    assert abs(vendi_score(kinds.repeat_interleave(3, 0) * 7) - 4) < near
    assert abs(vendi_score(kinds[:1].repeat(12, 1)) - 1) < near
    shares = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    rows = kinds.repeat_interleave(torch.tensor([8, 4, 2, 2]), 0)
    assert abs(vendi_score(rows) - float(torch.special.entr(shares).sum().exp())) < near


def test_vendi_of_a_kernel() -> None:
    """For two samples with similarity s the eigenvalues are (1 +- s) / 2."""
    pair = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    s = math.exp(-0.5)
    shares = torch.tensor([1 + s, 1 - s], dtype=torch.float64) / 2
    found = vendi_score(pair, lambda x, y: (-torch.cdist(x, y).square() / 2).exp())
    assert abs(found - float(torch.special.entr(shares).sum().exp())) < 16 * EPS64
    wrong: list[tuple[Callable[..., Any], str]] = [
        (lambda x, y: x @ y.T, "ones on the diagonal"),
        (lambda x, y: torch.ones(2, 3), r"\[2, 2\], got \(2, 3\)"),
        (lambda x, y: torch.tensor([[1.0, 0.5], [0.1, 1.0]]), "symmetric"),
    ]
    for kernel, message in wrong:
        with pytest.raises(InputError, match=rf"^kernel\(features, features\): .*{message}"):
            vendi_score(pair, kernel)


def test_classes_that_were_moved_and_narrowed() -> None:
    labels = torch.arange(3).repeat_interleave(20)
    centers = normal(6, 3, 5)
    reference = centers[labels] + normal(7, 60, 5)
    means = torch.stack([reference[labels == c].mean(0) for c in range(3)])
    center = means.mean(0)
    within = reference - means[labels]
    order = torch.randperm(60, generator=generator(8))
    made = (center + 1.5 * (means - center))[labels] + 0.5 * within
    arguments = made[order], labels[order], reference, labels.tolist()
    near = 1e3 * EPS64
    assert abs(variance_ratio(*arguments) - 0.25) < near
    assert abs(mean_shift(*arguments) - 0.5) < near
    assert abs(class_separation(*arguments) - 1.5) < near
    across = torch.linalg.qr(torch.cat([means - center, normal(9, 2, 5)]).T).Q[:, -1]  # no class is in its direction
    aside = reference + 0.3 * across, labels, reference, labels
    assert abs(class_separation(*aside) - 1) < near and abs(variance_ratio(*aside) - 1) < near
    assert mean_shift(*aside) > 0.05


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """For a mean, both methods: 90 % of 80 intervals, within four standard errors."""
    repeats, level = 80, 0.9
    for replace in (True, False):
        hits = 0
        for i in range(repeats):
            found = bootstrap(lambda x: float(x.mean()), normal(i, 40), n=50, seed=i, level=level, replace=replace)
            assert found.low < found.value < found.high
            hits += found.low <= 0 <= found.high
        # 50 resamples of 40 values make the intervals slightly short
        assert abs(hits / repeats - level) < 0.03 + 4 * math.sqrt(level * (1 - level) / repeats)


def test_halves_of_a_sample_have_no_row_twice_and_the_seed_decides() -> None:
    x = torch.arange(11.0)
    seen: list[Tensor] = []

    def statistic(rows: Tensor, other: Tensor) -> float:
        seen.append(rows)
        return float(rows.sum() + other.sum())

    first = bootstrap(statistic, x, x + 1, n=5, seed=3, replace=False)
    assert [len(rows) for rows in seen] == [11] + [5] * 5 and all(len(rows.unique()) == len(rows) for rows in seen)
    assert bootstrap(statistic, x, x + 1, n=5, seed=3, replace=False) == first
    assert bootstrap(statistic, x, x + 1, n=5, seed=4, replace=False) != first
    assert bootstrap(statistic, x, x + 1, n=5).value == first.value == 55 + 66


def test_intervals_of_several_values_are_those_of_each() -> None:
    real, fake = normal(10, 30, 2), normal(11, 30, 2) + 0.5
    both = bootstrap_all(precision_recall, real, fake, n=10, seed=2, replace=False)
    for place, found in enumerate(both):
        assert found == bootstrap(
            lambda a, b, i=place: precision_recall(a, b)[i], real, fake, n=10, seed=2, replace=False
        )  # type: ignore[misc]
        assert found.low <= found.value <= found.high


_SOME = torch.ones(4, 2)
_CLASSES = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: precision_recall(_SOME, torch.ones(4, 3), 1), "fake: expected 2 values per feature"),
        (lambda: precision_recall(_SOME, _SOME, 4), "real: expected more than k = 4 samples, got 4"),
        (lambda: precision_recall(torch.ones(9, 2), _SOME), "fake: expected more than k = 5"),
        (lambda: density_coverage(_SOME, _SOME, 0), "k: expected at least 1, got 0"),
        (lambda: density_coverage(_SOME.long(), _SOME), r"real: expected features \[N, D\] of a float dtype"),
        (lambda: density_coverage(_SOME, _SOME / 0), "fake: expected finite values"),
        (lambda: vendi_score(torch.zeros(3, 2)), "features: expected vectors other than 0.*row 0"),
        (lambda: vendi_score(_SOME, "rbf"), "kernel: expected 'cosine' or a function, got 'rbf'"),  # type: ignore
        (lambda: variance_ratio(_SOME, _CLASSES[:3], _SOME, _CLASSES), "labels: expected 4 integers"),
        (lambda: variance_ratio(_SOME, _CLASSES, _SOME, _CLASSES + 1), "labels: expected the classes of reference"),
        (lambda: variance_ratio(_SOME, _CLASSES, _SOME, _CLASSES), "reference: expected classes with a variance"),
        (lambda: variance_ratio(_SOME[:2], [0, 1], _SOME, _CLASSES), "labels: expected at least 2 samples of a class"),
        (lambda: mean_shift(_SOME, _CLASSES, _SOME, _CLASSES), "reference: expected classes of different means"),
        (lambda: bootstrap(len, _SOME, n=1), "n: expected at least 2"),
        (lambda: bootstrap(len, _SOME, level=95), "level: expected a number between 0 and 1, got 95"),
        (lambda: bootstrap(len, _SOME[:1]), r"samples\[0\]: expected at least two rows"),
    ],
)
def test_refusals(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        call()
