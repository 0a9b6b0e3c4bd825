# SPDX-License-Identifier: Apache-2.0
"""Metrics for a report: accuracies with confidence intervals, and the distance between two sets of features."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill.errors import InputError
from fastdistill.evaluate._optional import require


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval (1927) for ``successes`` in ``n`` independent trials. Needs scipy."""
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
    """Mean and sample standard deviation (with n - 1) of at least two finite values."""
    if len(values) < 2:
        raise InputError.of("values", "at least two values", len(values))
    if not all(math.isfinite(value) for value in values):
        raise InputError.of("values", "finite numbers", list(values))
    return statistics.fmean(values), statistics.stdev(values)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features [N, D] and [M, D], computed in float64.

    |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1^1/2 C_2 C_1^1/2)^1/2), the FID for Inception features (Heusel et al. 2017,
    eq. 6). On average it is too large by about c (1 / N + 1 / M), so compare only distances with equal N and M. With
    fewer samples than features the covariances are singular, and the error is larger than that.
    """
    for name, features in (("first", first), ("second", second)):
        if features.ndim != 2 or len(features) < 2:
            raise InputError.of(name, "features [N, D] with N >= 2", tuple(features.shape))
    if first.shape[1] != second.shape[1]:
        raise InputError.of("second", f"{first.shape[1]} features per sample, as in first", second.shape[1])
    one, two = first.double(), second.double().to(first.device)
    roots = [_root(x) for x in (one, two)]
    means = (one.mean(0) - two.mean(0)).square().sum()
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()  # the trace of the square root of C_1 C_2
    return float(means + roots[0].square().sum() + roots[1].square().sum() - 2 * cross)


def _root(x: Tensor) -> Tensor:
    """R [at most D, D]; R^T R is the covariance of x [N, D]."""
    centered = (x - x.mean(0)) / math.sqrt(len(x) - 1)
    return torch.linalg.qr(centered, mode="r").R if len(x) > x.shape[1] else centered
