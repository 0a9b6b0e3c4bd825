# SPDX-License-Identifier: Apache-2.0
"""Agreement of clusters of features with classes: K-means and normalized mutual information, many at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.errors import InputError, described
from fastdistill.ops import _check
from fastdistill.ops.philox import CLUSTERS, uniform, words

_MOST = 100  # iterations of Lloyd's algorithm


def kmeans(
    features: Tensor, clusters: int, *, starts: int = 10, seed: int = 0, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The best of several runs of Lloyd's algorithm from k-means++ (Arthur, Vassilvitskii 2007), in float64.

    Args:
        features: [n, ...], flattened.
        clusters: 1 to n. starts: runs, each from centers drawn by counter from (seed, start).
        kept: [R, n] bool, R selections of the rows; each is clustered separately; None: one selection of all rows.

    Returns:
        The cluster of each row [R, n] int64, -1 for rows that are not kept, and the sum of squares [R] within clusters.

    Raises:
        InputError: features that are not finite or not rows, a selection with fewer rows than clusters.
    """
    _check.valued(features=features)
    _check.require(features.ndim >= 2 and len(features) > 0, "features", "rows [n, ...]", tuple(features.shape))
    _check.require(bool(features.isfinite().all()), "features", "finite values", "NaN or infinity")
    n = len(features)
    _check.whole(starts, "starts", "at least 1")
    _check.whole(clusters, "clusters", "at least 1")
    if kept is None:
        kept = torch.ones(1, n, dtype=torch.bool, device=features.device)
    _check.dtype(kept, "kept", torch.bool)
    _check.shape(kept, "kept", (None, n), f"[any, {n}], the rows of each selection")
    fewest = int(kept.sum(1).min()) if len(kept) else n
    _check.require(clusters <= fewest, "clusters", f"at most {fewest}, the rows of a selection", clusters)
    points = _coordinates(features)
    alive = kept.to(points.dtype).repeat_interleave(starts, 0)  # [R starts, n]
    drawn = _uniform(seed, starts, clusters, points.device).repeat(len(kept), 1)
    centers = _spread_out(points, alive, drawn)
    assigned = torch.full(alive.shape, -1, dtype=torch.int64, device=points.device)
    nearest = _distances(points, centers)
    for _ in range(_MOST):
        before, assigned = assigned, nearest.argmin(2)
        if torch.equal(before, assigned):
            break
        members = torch.nn.functional.one_hot(assigned, clusters).to(points.dtype) * alive[:, :, None]
        count = members.sum(1)[:, :, None]
        centers = torch.where(count > 0, members.mT @ points / count.clamp(min=1), centers)
        nearest = _distances(points, centers)
    inertia = (nearest.gather(2, assigned[:, :, None])[:, :, 0] * alive).sum(1).view(-1, starts)
    best = inertia.min(1)
    chosen = assigned.view(-1, starts, n)[torch.arange(len(kept), device=points.device), best.indices]
    return torch.where(kept, chosen, -1), best.values


def nmi(first: Tensor, second: Tensor) -> Tensor:
    """[R] float64: mutual information divided by the mean of both entropies, for labels [R, n] and [R, n] or [n] int64.

    Rows with a negative label in either argument are ignored. 1 if neither has more than one label.
    """
    for name, labels in (("first", first), ("second", second)):
        _check.valued(**{name: labels})
        _check.dtype(labels, name, torch.int64)
    if first.ndim != 2 or second.shape not in (first.shape, first.shape[1:]):
        raise InputError.of("second", f"labels {list(first.shape)} or {list(first.shape[1:])}", tuple(second.shape))
    second = second.expand_as(first)
    counted = ((first >= 0) & (second >= 0)).double()
    one, two = (
        torch.nn.functional.one_hot(labels.clamp(min=0)).double() * counted[:, :, None] for labels in (first, second)
    )
    total = counted.sum(1)[:, None, None].clamp(min=1)
    both = one.mT @ two / total
    rows, columns = both.sum(2, keepdim=True), both.sum(1, keepdim=True)
    shared = torch.where(both > 0, both * (both / (rows * columns)).log(), 0).sum((1, 2))
    entropy = -(torch.special.xlogy(rows, rows).sum((1, 2)) + torch.special.xlogy(columns, columns).sum((1, 2)))
    return torch.where(entropy > 0, (2 * shared / entropy).clamp(0, 1), 1.0)


def pooled(features: Tensor) -> Tensor:
    """Features of one vector per sample: means over pixels [B, C, *S] or tokens [B, L, D]."""
    if not isinstance(features, Tensor) or features.ndim < 2:
        raise InputError.of("features", "features [B, ...]", described(features))
    if features.ndim < 3:
        return features
    return features.mean(1) if features.ndim == 3 else features.flatten(2).mean(2)


def _coordinates(features: Tensor) -> Tensor:
    """[n, at most n], with the same distances: the cost of wide features is limited by the number of rows."""
    flat = features.detach().flatten(1).double()
    flat = flat - flat.mean(0)
    if flat.shape[1] <= len(flat):
        return flat
    values, vectors = torch.linalg.eigh(flat @ flat.T)
    coordinates: Tensor = vectors * values.clamp(min=0).sqrt()
    return coordinates


def _uniform(seed: int, starts: int, clusters: int, device: torch.device) -> Tensor:
    """[starts, clusters] in (0, 1)."""
    key, zero = torch.tensor([_check.seed(seed), 0], dtype=torch.int64, device=device)
    rows = torch.arange(starts, device=device)[:, None]
    block = torch.arange(clusters, device=device)
    return uniform(words(key, zero, rows, block, CLUSTERS)[0]).double()


def _spread_out(points: Tensor, alive: Tensor, drawn: Tensor) -> Tensor:
    """k-means++: each center is a row, drawn by its squared distance to the nearest center so far."""
    weights = alive
    centers: list[Tensor] = []
    nearest = torch.full_like(alive, torch.inf)
    for number in range(drawn.shape[1]):
        heap = weights.cumsum(1)
        place = torch.searchsorted(heap, drawn[:, number, None] * heap[:, -1:]).clamp(max=points.shape[0] - 1)
        centers.append(points[place])
        nearest = torch.minimum(nearest, _distances(points, centers[-1])[:, :, 0])
        weights = torch.where(alive > 0, nearest, 0)
        # If every row is a center already, any row is taken.
        weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, alive)
    return torch.cat(centers, 1)


def _distances(points: Tensor, centers: Tensor) -> Tensor:
    """Squared distances [R, n, C] of points [n, d] to centers [R, C, d]."""
    squares = points.square().sum(1)[:, None] + centers.square().sum(2)[:, None]
    return (squares - 2 * points @ centers.mT).clamp(min=0)
