# SPDX-License-Identifier: Apache-2.0
"""Clusters, their agreement with classes, and intervals by leaving groups out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdistill.errors import InputError
from fastdistill.evaluate.clusters import kmeans, nmi, pooled
from fastdistill.evaluate.jackknife import interval, left_out, quantile
from tests.harness import EPS64


def blobs(apart: float, width: int = 300) -> tuple[Tensor, Tensor]:
    """Thirty rows in five classes; ``apart``: the distance of their centers."""
    random = torch.Generator().manual_seed(1)
    labels = torch.arange(30) % 5
    centers = apart * torch.randn(5, width, generator=random, dtype=torch.float64)
    return centers[labels] + torch.randn(30, width, generator=random, dtype=torch.float64), labels


@pytest.mark.parametrize("width", [2, 300])
def test_as_scikit_learn(width: int) -> None:
    """Known clusters are found; NMI equals scikit-learn's; for overlapping clusters the best of ten starts is as
    good."""
    sklearn = pytest.importorskip("sklearn.cluster")
    metrics = pytest.importorskip("sklearn.metrics")
    for apart in (30.0, 0.3):
        x, labels = blobs(apart, width)
        found, inertia = kmeans(x, 5)
        theirs = sklearn.KMeans(5, n_init=10, random_state=0).fit(x.numpy())
        score = nmi(found, labels)
        wanted = metrics.normalized_mutual_info_score(labels.numpy(), found[0].numpy())
        assert abs(float(score) - wanted) <= 64 * EPS64
        assert float(inertia) <= 1.05 * theirs.inertia_
        own = sum((x[found[0] == c] - x[found[0] == c].mean(0)).square().sum() for c in range(5))
        assert abs(float(inertia) - float(own)) <= 1e-9 * float(own)
        assert (float(score) == pytest.approx(1, abs=64 * EPS64)) == (apart == 30)
    random = torch.randint(4, (7, 40), generator=torch.Generator().manual_seed(2))
    for row, score in zip(random, nmi(random, random[0]), strict=True):
        assert abs(float(score) - metrics.normalized_mutual_info_score(random[0], row)) <= 64 * EPS64


def test_selections_are_clustered_by_themselves() -> None:
    """A selection is clustered like its rows alone; labels of other rows do not count; equal rows give equal
    results."""
    x, labels = blobs(0.5)
    kept = left_out(labels, 3)
    found, inertia = kmeans(x, 5, kept=kept, seed=4)
    assert kept.shape == (4, 30) and (found == -1).equal(~kept)
    for place, rows in enumerate(kept):
        alone, own = kmeans(x[rows], 5, starts=40, seed=4)
        assert float(own) <= float(inertia[place]) * (1 + 1e-9)
        assert float(nmi(found, labels)[place]) == pytest.approx(
            float(nmi(found[place : place + 1, rows], labels[rows]))
        )
        assert alone.shape == (1, 20 if place else 30)
    assert torch.equal(kmeans(x, 5, kept=kept, seed=4)[0], found)
    same, spread = kmeans(torch.ones(6, 3), 2)  # fewer different rows than clusters
    assert float(spread) == 0 and nmi(same, torch.zeros(6, dtype=torch.int64)) == pytest.approx(1)


def test_pooled() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(pooled(x), x.flatten(2).mean(2)) and torch.equal(pooled(x[:, :, 0]), x[:, :, 0].mean(1))
    assert torch.equal(pooled(x[:, :, 0, 0]), x[:, :, 0, 0])


def test_groups_and_intervals() -> None:
    """For a mean, the jackknife standard error is that of the textbook; the interval uses Student's t."""
    labels = torch.tensor([0, 1, 0, 1, 1, 0, 1])
    kept = left_out(labels, 10)
    assert kept.shape == (4, 7) and kept[0].all() and (~kept[1:]).sum(0).eq(1).all()
    for rows in ~kept[1:]:
        assert set(labels[rows].tolist()) == {0, 1}
    x = torch.tensor([1.0, 4, 2, 8, 5], dtype=torch.float64)
    every = left_out(torch.zeros(5, dtype=torch.int64), 5).double()
    low, high = interval(every @ x / every.sum(1))
    reach = quantile(4) * float(x.std()) / 5**0.5
    assert (low, high) == pytest.approx((4 - reach, 4 + reach))
    for freedom, wanted in ((1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (9, 2.262), (1000, 1.962)):
        assert quantile(freedom) == pytest.approx(wanted, rel=3e-4)
    assert interval(torch.tensor([1.0, 1.0]))[0] != interval(torch.tensor([1.0, 1.0]))[0]  # one group gives no interval


def test_wrong_arguments() -> None:
    x, labels = blobs(1)
    for call, message in (
        (lambda: kmeans(x / 0, 5), "features: expected finite values"),
        (lambda: kmeans(x, 31), "clusters: expected at most 30, the rows of a selection, got 31"),
        (lambda: kmeans(x, 5, kept=torch.ones(1, 3, dtype=torch.bool)), r"kept: expected \[any, 30\]"),
        (lambda: nmi(labels, labels), r"second: expected labels \[30\]"),
        (lambda: nmi(labels[None].float(), labels), "first: expected dtype int64"),
        (lambda: pooled(labels), r"features: expected features \[B, ...\]"),
    ):
        with pytest.raises(InputError, match=message):
            call()
