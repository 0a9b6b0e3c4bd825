# SPDX-License-Identifier: Apache-2.0
"""Separation and variance of classes, with bootstrap draws within classes.

The figures are those of ``diversity``; here all draws are computed at once, from weighted sums. The error of a mean of
N samples adds the trace of their covariance divided by N to the square of the mean shift; here it is subtracted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistill.errors import InputError


class Spread:
    """Figures of samples by class, compared with a reference.

    Args:
        reference: features [M, D] of classes labels [M]. Its own error is not part of an interval, so use many samples.

    Raises:
        InputError: a class of the reference without variance, or with its mean at the center of all classes.
    """

    def __init__(self, reference: Tensor, labels: Tensor) -> None:
        self.classes = torch.unique(labels)
        groups = [reference[labels == label].double() for label in self.classes]
        self.means = torch.stack([group.mean(0) for group in groups])
        self.variances = torch.stack([group.var(0).sum() for group in groups])
        self.center = self.means.mean(0)
        self.directions = self.means - self.center
        for place, label in enumerate(self.classes.tolist()):
            if self.variances[place] == 0:
                raise InputError.of("reference", "classes with a variance", f"none in class {label}")
            if not self.directions[place].any():
                raise InputError.of("reference", "classes of different means", f"class {label} at the center of all")

    def __call__(self, x: Tensor, labels: Tensor, right: Tensor | None, draws: int) -> tuple[Tensor, Tensor]:
        """For samples [N, D]: separation, mean shift, variance ratio, share right, variance ratio among the right ones.

        The last two are NaN without ``right`` [N]; the last one also if a class has fewer than two right samples.

        Returns:
            The five values [5] and draws [draws, 5], float64; the mean of the draws is the values. Draw i uses the same
                rows for any samples with the same labels.
        """
        random = torch.Generator().manual_seed(0)
        totals = torch.zeros(draws + 1, 5, dtype=torch.float64)
        for place, label in enumerate(self.classes.tolist()):
            chosen = (labels == label).nonzero()[:, 0]
            n = len(chosen)
            picked = torch.randint(n, (draws, n), generator=random)
            weights = torch.zeros(draws, n, dtype=torch.float64)
            weights.scatter_add_(1, picked, torch.ones_like(picked, dtype=torch.float64))
            weights = torch.cat([torch.ones(1, n, dtype=torch.float64), weights])  # first the samples themselves
            own = x[chosen].double() - self.center
            mean, variance = moments(weights, own)
            direction = self.directions[place]
            length = direction.square().sum()
            # The square of a draw's shift contains that error twice: its own, and that of the samples it is drawn from.
            error = variance / n * torch.cat([torch.ones(1), torch.full((draws,), 2.0)]).double()
            shift = ((mean - direction).square().sum(1) - error).clamp(min=0)
            values = [mean @ direction / length, (shift / length).sqrt()]
            values.append(variance / self.variances[place])
            if right is None:
                values += [torch.full((draws + 1,), math.nan, dtype=torch.float64)] * 2
            else:
                judged = right[chosen].double()
                among = moments(weights * judged, own)[1]
                values += [weights @ judged / n, among / self.variances[place]]
            totals += torch.stack(values, 1)
        totals /= len(self.classes)
        value, drawn = totals[0], totals[1:]
        biased = [0, 1, 2, 4]  # all but the share
        drawn[:, biased] += (value - drawn.nanmean(0))[biased]
        return value, drawn


def moments(weights: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Means [n, D] and traces of the covariances [n] (with count - 1) of rows x [N, D] with multiplicities weights
    [n, N]; NaN for fewer than two."""
    count = weights.sum(1)
    middle = x.mean(0)
    x = x - middle
    mean = weights @ x / count[:, None]
    squares = weights @ x.square().sum(1) / count - mean.square().sum(1)
    variance = torch.where(count > 1, squares.clamp(min=0) * count / (count - 1), math.nan)
    return mean + middle, variance
