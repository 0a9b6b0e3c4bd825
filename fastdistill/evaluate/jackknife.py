# SPDX-License-Identifier: Apache-2.0
"""Intervals of any figure of labelled samples, from the same figure of most of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistill.ops import _check

_NORMAL = 1.959963984540054  # 97.5 % quantile


def left_out(labels: Tensor, groups: int) -> Tensor:
    """[1 + G, N] bool: all of N labels, then all but one group, G of them; a group has some samples of every class.

    G is ``groups``, or the samples of the smallest class where these are fewer.
    """
    _check.whole(groups, "groups", "at least 1")
    number = numbers(labels)
    G = min(groups, int(torch.bincount(torch.unique(labels, return_inverse=True)[1]).min()))
    rest = number % G != torch.arange(G, device=labels.device)[:, None]
    return torch.cat([torch.ones_like(rest[:1]), rest])


def numbers(labels: Tensor) -> Tensor:
    """[N] int64, how many of the same label come before each."""
    found = torch.zeros_like(labels)
    for label in torch.unique(labels):
        own = labels == label
        found[own] = torch.arange(int(own.sum()), device=labels.device)
    return found


def interval(values: Tensor) -> tuple[float, float]:
    """The 95 % interval of a figure from ``values`` [1 + G], those of the selections of ``left_out``.

    Delete-a-group jackknife (Kott 2001): the variance is (G - 1) / G times the sum of squares around the mean of the G
    figures, with t of G - 1 degrees of freedom. (nan, nan) with fewer than two groups or where one has no figure.
    """
    value, each = float(values[0]), values[1:].double()
    G = len(each)
    if G < 2 or not bool(values.isfinite().all()):
        return math.nan, math.nan
    reach = quantile(G - 1) * math.sqrt((G - 1) / G * float((each - each.mean()).square().sum()))
    return value - reach, value + reach


def quantile(freedom: int) -> float:
    """97.5 % of Student's t, exact for 1 and 2 degrees of freedom, else by the expansion around the normal distribution
    (Abramowitz and Stegun 26.7.5), within .3 %."""
    if freedom < 3:
        return math.tan(0.475 * math.pi) if freedom == 1 else 0.95 / math.sqrt(2 * 0.025 * 0.975)
    z = _NORMAL
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + float(sum(term / freedom ** (power + 1) for power, term in enumerate(terms)))
