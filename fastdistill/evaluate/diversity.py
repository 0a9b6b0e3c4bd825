# SPDX-License-Identifier: Apache-2.0
"""How much of a distribution the samples cover, and how guidance or distillation changed it, for any features.

Features are [N, D], tensors or arrays of any float dtype; computed in float64 on their own device. Distances are
computed in chunks: 50,000 features of 2048 values need about 2 GB in addition to the features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastdistill.errors import InputError, described

_CHUNK = 2**26  # number of distances in memory at once; there are three copies of them
_EPS = torch.finfo(torch.float64).eps


class PrecisionRecall(NamedTuple):
    """precision: share of fake samples that look real. recall: share of real samples that the model could make."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """density: the number of real neighbourhoods that contain a fake sample, divided by k (can be above 1). coverage:
    share of the real neighbourhoods that contain a fake sample."""

    density: float
    coverage: float


class Interval(NamedTuple):
    """A value and its confidence interval."""

    value: float
    low: float
    high: float

    def within(self, low: float, high: float = math.inf) -> Interval:
        """The same interval, with ends clipped to the possible values ``low`` to ``high``."""
        return Interval(self.value, min(max(self.low, low), high), min(max(self.high, low), high))


#: The figures by neighbours, and the highest possible value of each.
LIMITS = {"precision": 1.0, "recall": 1.0, "density": math.inf, "coverage": 1.0}


def precision_recall(real: Any, fake: Any, k: int = 5) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991, eq. 1 and 2).

    The manifold of a set is the union of closed balls around its samples, each with the radius of the k-th nearest
    neighbour in the set. Precision is the share of ``fake`` [M, D] in the manifold of ``real`` [N, D], recall the
    reverse. InputError unless both have more than k samples.
    """
    real, fake = _pair(real, fake)
    near, far = _radii(real, k, "real"), _radii(fake, k, "fake")
    precise = torch.zeros(len(fake), dtype=torch.bool, device=real.device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for part, distances, slack in _distances(real, fake):
        precise |= (distances <= near[part, None] + slack).any(0)
        recalled[part] = (distances <= far + slack).any(1)
    return PrecisionRecall(_share(precise), _share(recalled))


def density_coverage(real: Any, fake: Any, k: int = 5) -> DensityCoverage:
    """Density and coverage (Naeem et al., arXiv 2002.09797) of ``fake`` [M, D] in ``real`` [N, D].

    If both sets have the same distribution, the density is 1 on average and the coverage
    1 - prod_{i=1..k} (N - i) / (M + N - i). InputError unless there are more than k real samples.
    """
    real, fake = _pair(real, fake)
    near = _radii(real, k, "real")
    inside, covered = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for part, distances, slack in _distances(real, fake):
        within = distances <= near[part, None] + slack
        inside += int(within.sum())
        covered[part] = within.any(1)
    return DensityCoverage(inside / (k * len(fake)), _share(covered))


def vendi_score(features: Any, kernel: Literal["cosine"] | Callable[[Tensor, Tensor], Tensor] = "cosine") -> float:
    """The effective number of different samples among ``features`` [N, D], from 1 to N (arXiv 2210.02410).

    exp of the entropy of the eigenvalues of K / N, K being the similarities of all pairs.

    Args:
        kernel: ``cosine``, or a positive semi-definite function of two feature matrices [N, D] -> [N, N] with ones on
            the diagonal.

    Raises:
        InputError: a feature of zeros with ``cosine``; a kernel matrix of another shape, asymmetric or not 1 on the
            diagonal.
    """
    x = _features(features, "features")
    if callable(kernel):
        similarity = _similarities(kernel(x, x), len(x))
    elif kernel == "cosine":
        norms = x.norm(dim=1, keepdim=True)
        if not (norms > 0).all():
            row = int((norms[:, 0] == 0).nonzero()[0])
            raise InputError.of("features", "vectors other than 0, for their cosines", f"zeros in row {row}")
        x = x / norms
        similarity = x @ x.T if len(x) <= x.shape[1] else x.T @ x  # both have the same eigenvalues, except for zeros
    else:
        raise InputError.of("kernel", "'cosine' or a function", described(kernel))
    values = torch.linalg.eigvalsh(similarity / len(x)).clamp(min=0)
    return float(torch.special.entr(values / values.sum()).sum().exp())


def variance_ratio(features: Any, labels: Any, reference: Any, reference_labels: Any) -> float:
    """Trace of the covariance within a class divided by that in the reference, mean over classes: below 1 if guidance
    reduced diversity.

    features: [N, D], with classes labels [N] (integers). reference: [M, D] with reference_labels [M]: the same
        classes, each with at least two samples and some variance.
    """
    own, theirs = _classes(features, labels, reference, reference_labels, 2)
    spreads = [(_spread(own[label]), _spread(theirs[label])) for label in theirs]
    for label, (_, spread) in zip(theirs, spreads, strict=True):
        if spread == 0:
            raise InputError.of("reference", "classes with a variance", f"none in class {label}")
    return math.fsum(spread / whole for spread, whole in spreads) / len(spreads)


def mean_shift(features: Any, labels: Any, reference: Any, reference_labels: Any) -> float:
    """How far the mean of a class moved from the reference's, divided by the distance of the latter from the center of
    all classes; mean over classes. 0: nothing moved. Arguments as for ``variance_ratio``; at least two different means.
    """
    moved = _displacements(features, labels, reference, reference_labels)
    return math.fsum(float((own - theirs).norm() / theirs.norm()) for own, theirs in moved) / len(moved)


def class_separation(features: Any, labels: Any, reference: Any, reference_labels: Any) -> float:
    """How far the mean of a class is from the center, in the direction of the reference's mean and divided by its
    distance; mean over classes. 1: as in the reference, above 1: guidance overshoots. The center is the mean of the
    reference's class means. Arguments as for ``mean_shift``.
    """
    moved = _displacements(features, labels, reference, reference_labels)
    return math.fsum(float(own @ theirs / theirs.square().sum()) for own, theirs in moved) / len(moved)


def bootstrap(
    statistic: Callable[..., float],
    *samples: Any,
    n: int = 200,
    seed: int = 0,
    level: float = 0.95,
    replace: bool = True,
) -> Interval:
    """A statistic of samples (each [N, ...]), and its confidence interval by resampling the rows of each.

    The interval is the value plus the percentiles of the draws' deviations from their mean, because draws can be
    biased: those of a variance are smaller by 1 / N on average.

    Args:
        n: number of draws. level: of confidence.
        replace: True: as many rows, with replacement (Efron 1979). False: half of the rows, without replacement
            (delete-half jackknife, Shao and Wu 1989; the deviations have the same spread): for statistics that change
            with repeated rows, such as those of neighbours, and Vendi's.

    Raises:
        InputError: n below 2, a level that is not between 0 and 1, a sample with one row.
    """
    options: dict[str, Any] = {"n": n, "seed": seed, "level": level, "replace": replace}
    return bootstrap_all(lambda *rows: (statistic(*rows),), *samples, **options)[0]


def bootstrap_all(
    statistic: Callable[..., Sequence[float]],
    *samples: Any,
    n: int = 200,
    seed: int = 0,
    level: float = 0.95,
    replace: bool = True,
) -> list[Interval]:
    """``bootstrap`` for a statistic with several values, such as ``precision_recall``: an interval for each."""
    if n < 2:
        raise InputError.of("n", "at least 2", n)
    if not 0 < level < 1:
        raise InputError.of("level", "a number between 0 and 1", level)
    tensors = [torch.as_tensor(sample) for sample in samples]
    for place, sample in enumerate(tensors):
        if sample.ndim < 1 or len(sample) < 2:
            raise InputError.of(f"samples[{place}]", "at least two rows", tuple(sample.shape))
    random = torch.Generator().manual_seed(seed)

    def again(sample: Tensor) -> Tensor:
        rows = len(sample)
        if replace:
            chosen = torch.randint(rows, (rows,), generator=random)
        else:
            chosen = torch.randperm(rows, generator=random)[: rows // 2]
        return sample[chosen.to(sample.device)]

    values = torch.tensor([float(value) for value in statistic(*tensors)], dtype=torch.float64)
    drawn = torch.tensor([list(map(float, statistic(*map(again, tensors)))) for _ in range(n)], dtype=torch.float64)
    drawn += values - drawn.mean(0)
    ends = drawn.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64), 0)
    return [Interval(*three) for three in zip(values.tolist(), *ends.tolist(), strict=True)]


def _features(value: Any, name: str) -> Tensor:
    x = torch.as_tensor(value)
    if x.ndim != 2 or not x.is_floating_point() or 0 in x.shape:
        raise InputError.of(name, "features [N, D] of a float dtype", f"{x.dtype} {tuple(x.shape)}")
    if not x.isfinite().all():
        raise InputError.of(name, "finite values", "NaN or infinity")
    return x.double()


def _pair(real: Any, fake: Any) -> tuple[Tensor, Tensor]:
    """Both sets minus the mean of the real one: a common offset then costs the distances no precision."""
    real, fake = _features(real, "real"), _features(fake, "fake")
    if real.shape[1] != fake.shape[1]:
        raise InputError.of("fake", f"{real.shape[1]} values per feature, as real has", fake.shape[1])
    center = real.mean(0)
    return real - center, fake.to(real.device) - center


def _distances(one: Tensor, two: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Squared distances of ``one`` [N, D] from ``two`` [M, D] in chunks: (rows of one, [n, M], rounding error [n, M]).

    The rounding error of |a|^2 + |b|^2 - 2 a.b is about eps sqrt(D) (|a|^2 + |b|^2); closer distances count as equal.
    """
    squares = one.square().sum(1), two.square().sum(1)
    rows = max(1, _CHUNK // len(two))
    for first in range(0, len(one), rows):
        part = slice(first, min(first + rows, len(one)))
        sums = squares[0][part, None] + squares[1]
        yield part, torch.addmm(sums, one[part], two.T, alpha=-2), sums * (4 * _EPS * math.sqrt(one.shape[1]))


def _radii(x: Tensor, k: int, name: str) -> Tensor:
    """[N]: squared distance of each sample from its k-th nearest neighbour in the set."""
    if not isinstance(k, int) or k < 1:
        raise InputError.of("k", "at least 1", described(k))
    if len(x) <= k:
        raise InputError.of(name, f"more than k = {k} samples", len(x))
    radii = torch.empty(len(x), dtype=x.dtype, device=x.device)
    for part, distances, _ in _distances(x, x):
        distances.diagonal(part.start).fill_(math.inf)
        radii[part] = distances.topk(k, largest=False).values[:, -1]
    return radii


def _share(which: Tensor) -> float:
    return int(which.sum()) / len(which)


def _similarities(value: Any, n: int) -> Tensor:
    similarity = torch.as_tensor(value).double()
    if tuple(similarity.shape) != (n, n):
        raise InputError.of("kernel(features, features)", f"[{n}, {n}]", tuple(similarity.shape))
    near = math.sqrt(_EPS)  # a kernel may compute in float32
    if not ((similarity.diagonal() - 1).abs() <= near).all() or not ((similarity - similarity.T).abs() <= near).all():
        raise InputError.of("kernel(features, features)", "symmetric with ones on the diagonal", "another matrix")
    return (similarity + similarity.T) / 2


def _classes(
    features: Any, labels: Any, reference: Any, reference_labels: Any, least: int
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Features by class, with the same classes in both sets."""
    own = _by_class(features, labels, "features", "labels")
    theirs = _by_class(reference, reference_labels, "reference", "reference_labels")
    if own.keys() != theirs.keys():
        got = f"{sorted(own)} and {sorted(theirs)}"
        raise InputError.of("labels", "the classes of reference_labels", got if len(got) <= 80 else "others")
    for name, groups in (("labels", own), ("reference_labels", theirs)):
        for label, rows in groups.items():
            if len(rows) < least:
                raise InputError.of(name, f"at least {least} samples of a class", f"{len(rows)} of class {label}")
    width = next(iter(theirs.values())).shape[1]
    if next(iter(own.values())).shape[1] != width:
        raise InputError.of("reference", "as many values per feature as features", width)
    return own, theirs


def _by_class(features: Any, labels: Any, name: str, labels_name: str) -> dict[int, Tensor]:
    x = _features(features, name)
    y = torch.as_tensor(labels)
    if y.shape != x.shape[:1] or y.is_floating_point() or y.dtype == torch.bool:
        raise InputError.of(labels_name, f"{len(x)} integers, one for each of {name}", f"{y.dtype} {tuple(y.shape)}")
    return {label: x[(y == label).to(x.device)] for label in sorted(set(y.tolist()))}


def _spread(rows: Tensor) -> float:
    """Trace of the covariance (with n - 1)."""
    return float(rows.var(0).sum())


def _displacements(features: Any, labels: Any, reference: Any, reference_labels: Any) -> list[tuple[Tensor, Tensor]]:
    """For each class, its mean and the reference's, relative to the mean of the reference's class means."""
    own, theirs = _classes(features, labels, reference, reference_labels, 1)
    means = {label: rows.mean(0) for label, rows in theirs.items()}
    center = torch.stack(list(means.values())).mean(0)
    moved = [(own[label].mean(0).to(center.device) - center, mean - center) for label, mean in means.items()]
    for label, (_, mean) in zip(means, moved, strict=True):
        if float(mean.norm()) == 0:
            raise InputError.of("reference", "classes of different means", f"class {label} at the center of all")
    return moved
