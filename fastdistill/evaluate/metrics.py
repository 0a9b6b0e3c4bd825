# SPDX-License-Identifier: Apache-2.0
"""Numbers for a report: accuracies with their uncertainty, and the distance between two sets of features."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill.errors import InputError
from fastdistill.evaluate._optional import require


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) for ``successes`` in ``n`` independent trials. Needs scipy."""
    if n < 1:
        raise InputError.of("n", "at least one trial", n)
    if not 0 <= successes <= n:
        raise InputError.of("successes", f"0 to n ({n})", successes)
    if not 0 < confidence < 1:
        raise InputError.of("confidence", "a number between 0 and 1", confidence)
    test = require("scipy.stats").binomtest(int(successes), int(n))
    low, high = test.proportion_ci(confidence_level=confidence, method="wilson")
    return float(low), float(high)


def mean_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1 in the denominator), of at least two finite values."""
    if len(values) < 2:
        raise InputError.of("values", "at least two, to have a spread", len(values))
    if not all(math.isfinite(value) for value in values):
        raise InputError.of("values", "finite numbers", list(values))
    return statistics.fmean(values), statistics.stdev(values)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features [N, D] and [M, D], in fp64.

    |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1^1/2 C_2 C_1^1/2)^1/2): FID where the features are Inception's
    (Heusel et al. 2017, eq. 6). Needs more samples than D to mean anything.
    """
    for name, features in (("first", first), ("second", second)):
        if features.ndim != 2 or len(features) < 2:
            raise InputError.of(name, "features [N, D] with N >= 2", tuple(features.shape))
    if first.shape[1] != second.shape[1]:
        raise InputError.of("second", f"{first.shape[1]} features, as first has", second.shape[1])
    one, two = first.double(), second.double()
    covariances = [torch.cov(x.T).reshape(x.shape[1], x.shape[1]) for x in (one, two)]
    values, vectors = torch.linalg.eigh(covariances[0])
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    means = (one.mean(0) - two.mean(0)).square().sum()
    return float(means + covariances[0].trace() + covariances[1].trace() - 2 * cross)
