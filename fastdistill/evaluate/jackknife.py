# SPDX-License-Identifier: Apache-2.0
"""Intervals for any figure of labelled samples, computed from the same figure of subsets."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistill.evaluate._optional import require
from fastdistill.ops import _check


def left_out(labels: Tensor, groups: int) -> Tensor:
    """[1 + G, N] bool: all of N labels, then all but one of G groups; every group has samples of every class.

    G is ``groups``, or the size of the smallest class if that is less.
    """
    _check.whole(groups, "groups", "at least 1")
    number = numbers(labels)
    G = min(groups, int(torch.bincount(torch.unique(labels, return_inverse=True)[1]).min()))
    rest = number % G != torch.arange(G, device=labels.device)[:, None]
    return torch.cat([torch.ones_like(rest[:1]), rest])


def numbers(labels: Tensor) -> Tensor:
    """[N] int64, for each label the number of equal labels before it."""
    found = torch.zeros_like(labels)
    for label in torch.unique(labels):
        own = labels == label
        found[own] = torch.arange(int(own.sum()), device=labels.device)
    return found


def interval(values: Tensor) -> tuple[float, float]:
    """The 95 % interval of a figure from ``values`` [1 + G], one for each selection of ``left_out``.

    Delete-a-group jackknife (Kott 2001): the variance is (G - 1) / G times the sum of squares around the mean of the G
    figures, with t of G - 1 degrees of freedom. (nan, nan) with fewer than two groups or if a figure is missing.
    """
    value, each = float(values[0]), values[1:].double()
    G = len(each)
    if G < 2 or not bool(values.isfinite().all()):
        return math.nan, math.nan
    reach = quantile(G - 1) * math.sqrt((G - 1) / G * float((each - each.mean()).square().sum()))
    return value - reach, value + reach


def quantile(freedom: int) -> float:
    """97.5 % of Student's t. Needs scipy."""
    return float(require("scipy.stats").t.ppf(0.975, freedom))
