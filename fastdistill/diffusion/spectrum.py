# SPDX-License-Identifier: Apache-2.0
"""Variances of classes and of all data by direction, measured from data, and the window of guidance that keeps them."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdistill.data import values
from fastdistill.data.fingerprint import differences, listed, plain
from fastdistill.data.latent_cache import LatentCache
from fastdistill.diffusion.distortion import Method, Start, directions, recursion
from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Guidance
from fastdistill.errors import InputError, StorageError, described
from fastdistill.files import atomic_write, json_value, located, reason
from fastdistill.ops import _check
from fastdistill.schemas import SPECTRUM

#: Called with (rows read, rows to read in all passes so far).
Progress = Callable[[int, int], object]
_MOST_PASSES = 20  # over the data for the directions
_SETTLED = 1e-4  # of the variance in them, from pass to pass
_MORE = 8  # directions than wanted that are followed, so that these settle faster
_LOWEST = -64.0  # weight that is looked for
_MOST_STEPS = 4096


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Variances by direction: c of each class, u of all data.

    c: [K, r] float64 > 0 or, where a class does not vary, 0. u: [r] or [K, r] float64 > 0. multiplicity: [r] float64,
    how many dimensions a direction stands for: 1, of the isotropic remainder many. labels: [K] int64. fingerprint: what
    it was measured from, JSON values.

    Raises:
        InputError: variances that are not finite or below 0, shapes that do not fit, no class that varies.
    """

    c: Tensor
    u: Tensor
    multiplicity: Tensor
    labels: Tensor
    fingerprint: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check.valued(c=self.c, u=self.u, multiplicity=self.multiplicity, labels=self.labels)
        _check.require(self.c.dim() == 2, "c", "variances [K, r]", tuple(self.c.shape))
        K, r = self.c.shape
        _check.shape(self.multiplicity, "multiplicity", (r,), f"one for each direction, [{r}]")
        _check.shape(self.labels, "labels", (K,), f"one for each class, [{K}]")
        _check.require(self.u.shape in ((r,), (K, r)), "u", f"variances [{r}] or [{K}, {r}]", tuple(self.u.shape))
        for name in ("c", "u", "multiplicity"):
            value = getattr(self, name).detach().to("cpu", torch.float64)
            _check.require(bool(value.isfinite().all()), name, "finite values", "NaN or infinity")
            _check.require(bool((value >= 0).all()), name, "values >= 0", float(value.min()))
            object.__setattr__(self, name, value)
        _check.require(bool((self.c * self.multiplicity > 0).any()), "c", "a class that varies", "variances of 0")
        object.__setattr__(self, "fingerprint", plain(self.fingerprint, "fingerprint"))

    @classmethod
    def of(cls, c: Any, u: Any) -> Spectrum:
        """Of one class with given variances: numbers or tensors [r] above 0."""
        inner, outer = (value.reshape(1, -1) for value in directions(c=c, u=u))
        return cls(inner, outer, torch.ones(inner.shape[1]), torch.zeros(1, dtype=torch.int64))

    @classmethod
    def estimate(
        cls, data: LatentCache | Any, labels: Tensor | None = None, rank: int = 16, *, progress: Progress | None = None
    ) -> Spectrum:
        """From a latent cache, whose classes are its prompts, or from images [N, *S] and labels [N] int64.

        The directions are those in which classes vary most: the first ``rank`` principal components of the data around
        their class's mean, by subspace iteration from a fixed start. What is left of each class and of all data is
        one isotropic remainder. Unbiased (n - 1), in float64; data on the disk are read in blocks, some passes. Needs
        memory for K class means and rank + 8 directions.

        c and u are variances along these directions: exact for guidance where the covariances have them in common.

        Args:
            data: Tensor or ``StoredRows`` of a float dtype.

        Raises:
            InputError: a class with one sample, another number of labels, a rank below 1, values that are not finite.
        """
        fingerprint: dict[str, Any] = {}
        if isinstance(data, LatentCache):
            _check.require(labels is None, "labels", "None with a cache, which has its prompts", "a tensor")
            fingerprint, labels, data = {"cache": data.identity}, data.prompt_index, data.latents
        values.require_bank(data, "images")
        _check.require(len(data.shape) >= 2, "images", "[N, ...]", tuple(data.shape))
        _check.whole(rank, "rank", "at least 1 direction")
        wanted = isinstance(labels, Tensor) and labels.dtype == torch.int64 and tuple(labels.shape) == (len(data),)
        _check.require(wanted, "labels", f"int64, one for each of {len(data)} images", described(labels))
        assert labels is not None
        known, place, counts = torch.unique(labels.cpu(), return_inverse=True, return_counts=True)
        for label, count in zip(known.tolist(), counts.tolist(), strict=True):
            _check.require(count > 1, "labels", "at least 2 samples of each class", f"1 of class {label}")
        values.check_finite(data, "images")
        c, u, multiplicity = _Passes(data, place, counts, progress).measured(rank)
        return cls(c, u, multiplicity, known, {**fingerprint, "rank": int(rank)})

    @classmethod
    def beside(cls, path: str | os.PathLike[str], rank: int = 16, *, progress: Progress | None = None) -> Spectrum:
        """Of the latent cache in a directory: from ``<directory>.spectrum.json`` beside it where that is of this cache
        and rank, else measured and saved there."""
        folder = located(path)
        cache = LatentCache.open(folder)
        file = folder.with_name(f"{folder.name}.spectrum.json")
        if file.exists():
            found = cls.load(file)
            if found.fingerprint == {"cache": cache.identity, "rank": rank}:
                return found
        made = cls.estimate(cache, rank=rank, progress=progress)
        made.save(file)
        return made

    def save(self, path: str | os.PathLike[str]) -> None:
        """As JSON, from which ``load`` makes an equal one."""
        content = {name: getattr(self, name).tolist() for name in ("c", "u", "multiplicity", "labels")}
        content |= {"kind": "spectrum", "version": SPECTRUM.version, "fingerprint": dict(self.fingerprint)}
        atomic_write(located(path), json.dumps(content).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, expect: Mapping[str, Any] | None = None) -> Spectrum:
        """A saved one; ``expect`` holds fields of the fingerprint that must have these values.

        Raises:
            StorageError: it is not there, damaged, of something else, or a newer fastdistill wrote it.
        """
        file = located(path)
        try:
            content = json_value(file.read_text(encoding="utf-8"))
            if content["kind"] != "spectrum":
                raise ValueError(f"kind {described(content['kind'])}")
            SPECTRUM.check(content["version"], file)
            c, u, many = (torch.tensor(content[name], dtype=torch.float64) for name in ("c", "u", "multiplicity"))
            found = cls(c, u, many, torch.tensor(content["labels"], dtype=torch.int64), content["fingerprint"])
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(f"{file}: could not be read: {reason(error)}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{file}: expected a spectrum, got another file ({error})") from error
        wanted = plain(expect or {}, "expect")
        changed = differences(wanted, {key: found.fingerprint.get(key) for key in wanted})
        if changed:
            raise StorageError(f"{file}: this spectrum is of something else ({listed(changed)}); measure it again")
        return found

    def variance(
        self, grid: Grid, guidance: Guidance | float, start: Start = "noise", method: Method = "ddim"
    ) -> float:
        """Variance within a class of what a sampler gives on a grid, summed over dimensions and classes."""
        weight = self.multiplicity.expand_as(self.c)
        counted = (self.c > 0) & (weight > 0)
        c, u = self.c[counted], self.u.expand_as(self.c)[counted]
        _check.require(bool((u > 0).all()), "u", "variances above 0 where a class varies", 0.0)
        return float((weight[counted] * recursion(grid, guidance, 0.0, c, u, start, method).variance).sum())


@dataclass(frozen=True)
class Solved:
    """A window of guidance and what it leaves of the variance.

    w_minus: the weight that gives all of it back, however low (NaN: none above -64); reachable: whether that is at
    least the floor. schedule: the window with it, or, if it is not reachable, with the floor. ratio: the variance
    with ``schedule`` over that of w = 0. steps: of a grid of this kind on which the wanted window is reachable (that
    of the grid where it is; None: on none of up to 4096).
    """

    schedule: Guidance
    w_minus: float
    reachable: bool
    ratio: float
    steps: int | None


def variance_neutral(
    spectrum: Spectrum,
    grid: Grid,
    w_plus: float,
    switch: float | None = None,
    stop: float = 0.0,
    floor: float = -1.0,
    *,
    start: Start = "noise",
    method: Method = "ddim",
) -> Solved:
    """The window w_plus while sigma > switch, w_minus while sigma > stop, then 0, that keeps the variance of w = 0.

    w_minus is solved by bisection on ``recursion`` for this sampler and grid: the variance within the classes, summed
    over directions, is that of w = 0. (A window that is neutral with infinitely many steps is not on a coarse grid.)

    Args:
        switch: None: the lowest level of the grid at which it is reachable, so that w_plus acts as long as it can;
            where it is at none, the one that comes nearest.
        floor: the lowest weight that counts as reachable, at most 0.
        start, method: as of ``recursion``.

    Raises:
        InputError: u <= c in every direction, or so much that w_plus does not shrink the variance; w_plus <= 0; a
            threshold outside of the grid.
    """
    if not isinstance(spectrum, Spectrum):
        raise InputError.of("spectrum", "a Spectrum (Spectrum.of(c, u) of given variances)", described(spectrum))
    wider = bool((spectrum.u > spectrum.c).any())
    rule = "a variance above c in some direction (guidance widens what it does not shrink)"
    _check.require(wider, "u", rule, spectrum.u.tolist() if spectrum.u.numel() < 8 else "none")
    if not isinstance(grid, Grid):
        raise InputError.of("grid", "a Grid", described(grid))
    w_plus, stop, floor = (
        _check.real(value, name) for name, value in (("w_plus", w_plus), ("stop", stop), ("floor", floor))
    )
    _check.require(0 < w_plus < math.inf, "w_plus", "a finite number > 0", w_plus)
    _check.require(-math.inf < floor <= 0, "floor", "a finite number <= 0", floor)

    @functools.cache
    def free(on: Grid) -> float:
        return spectrum.variance(on, 0.0, start, method)

    def share(on: Grid, w: float, switch: float) -> float:
        """The variance with a window over that of w = 0."""
        return spectrum.variance(on, Guidance.window(w_plus, w, switch, stop), start, method) / free(on)

    if switch is None:
        switch = _latest(grid, stop, lambda level: share(grid, floor, level))
    at = _check.real(switch, "switch")
    shrunk = share(grid, 0.0, at)
    rule = f"variances that w = {w_plus:g} above sigma = {at:g} shrinks"
    _check.require(shrunk < 1, "spectrum", rule, f"{shrunk:.6g} of that of w = 0: it grows there")
    wanted = _root(lambda w: share(grid, w, at) - 1)
    reachable = wanted >= floor
    w = wanted if reachable else floor
    steps = len(grid) if reachable else _enough(grid, lambda other: share(other, floor, at) >= 1)
    return Solved(Guidance.window(w_plus, w, at, stop), wanted, reachable, share(grid, w, at), steps)


def _latest(grid: Grid, stop: float, share: Callable[[float], float]) -> float:
    """The lowest level above ``stop`` at which the floor gives at least all of the variance, else the best."""
    levels: list[float] = [level for level in grid.sigma[1:-1].tolist() if level > stop]
    _check.require(bool(levels), "stop", f"a level below {float(grid.sigma[1]):g}, the second of the grid", stop)
    best, most = levels[0], -math.inf
    for level in reversed(levels):
        found = share(level)
        if found >= 1:
            return level
        if found > most:
            best, most = level, found
    return best


def _root(excess: Callable[[float], float]) -> float:
    """The first w below 0 at which ``excess``, below 0 at w = 0, is 0; NaN: none."""
    high, low = 0.0, -0.125
    while excess(low) < 0:
        high, low = low, 2 * low
        if low < _LOWEST:
            return math.nan
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if excess(middle) < 0 else (middle, high)
    return low


def _enough(grid: Grid, reachable: Callable[[Grid], bool]) -> int | None:
    """The smallest number of steps, above that of the grid, with which it is; a larger one is taken to be, too."""
    low, high = len(grid), 2 * len(grid)
    while not reachable(_refined(grid, high)):
        low, high = high, 2 * high
        if high > _MOST_STEPS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reachable(_refined(grid, middle)) else (middle, high)
    return high


def _refined(grid: Grid, steps: int) -> Grid:
    """Levels spaced as those of a grid, by interpolating the logarithm of sigma, in more steps."""
    sigma = grid.sigma[:-1]
    known = sigma[sigma.isfinite()].log()
    first = len(sigma) - len(known)  # 1 where the grid starts at infinity
    place = torch.linspace(0, len(known) - 1, steps - first, dtype=torch.float64, device="cpu")
    left = place.long().clamp(max=max(len(known) - 2, 0))
    right = (left + 1).clamp(max=len(known) - 1)
    between = known[left].lerp(known[right], place - left).exp()
    levels = torch.cat([sigma[:first], between, grid.sigma[-1:]])
    signal = torch.where(levels.isfinite(), (1 + levels**2).rsqrt(), 0.0)
    noise = torch.where(levels.isfinite(), signal * levels, 1.0)
    clock = torch.linspace(1, 1 / steps, steps, dtype=torch.float64, device="cpu")
    return Grid(signal, noise, clock, clock)


class _Passes:
    """Passes over data [N, *S] of classes ``place`` [N] with ``counts`` [K] samples, flattened to D values a row."""

    def __init__(self, data: Any, place: Tensor, counts: Tensor, progress: Progress | None) -> None:
        self.data, self.place, self.counts = data, place, counts
        self.size = data.shape[1:].numel()
        self.report = progress or (lambda done, total: None)
        self.read = 0
        self.means = torch.zeros(len(counts), self.size, dtype=torch.float64)
        for rows, classes in self._rows():
            self.means.index_add_(0, classes, rows)
        self.center = self.means.sum(0) / len(data)
        self.means /= counts[:, None]

    def measured(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """c [K, r], u [r] and the multiplicities [r]; the remainder is the last, if there is one."""
        N, K, D = len(self.data), len(self.counts), self.size
        rank = min(rank, D, N - K)
        basis = self._directions(rank)
        inside = torch.zeros(K, rank + 1, dtype=torch.float64)  # and the trace
        around = torch.zeros(rank + 1, dtype=torch.float64)
        for rows, classes in self._rows():
            own, all_of = rows - self.means[classes], rows - self.center
            inside.index_add_(0, classes, _squares(own, basis))
            around += _squares(all_of, basis).sum(0)
        inside /= (self.counts - 1)[:, None]
        around /= N - 1
        c, u = inside[:, :rank], around[:rank]
        multiplicity = torch.ones(rank, dtype=torch.float64)
        rest = D - rank
        if rest:
            left = [
                (table[..., -1:] - table[..., :-1].sum(-1, keepdim=True)).clamp(min=0) for table in (inside, around)
            ]
            c, u = torch.cat([c, left[0] / rest], 1), torch.cat([u, left[1] / rest])
            multiplicity = torch.cat([multiplicity, torch.tensor([float(rest)], dtype=torch.float64)])
        return c, u, multiplicity

    def _directions(self, rank: int) -> Tensor:
        """[D, rank]: principal components of the data around their class's mean."""
        width = min(self.size, rank + _MORE)
        random = torch.Generator().manual_seed(0)
        basis, _ = torch.linalg.qr(torch.randn(self.size, width, dtype=torch.float64, generator=random))
        before = -1.0
        for _ in range(_MOST_PASSES):
            product, small = torch.zeros_like(basis), torch.zeros(width, width, dtype=torch.float64)
            for rows, classes in self._rows():
                own = rows - self.means[classes]
                along = own @ basis
                product += own.T @ along
                small += along.T @ along
            held, turn = torch.linalg.eigh(small)
            found = float(held[-rank:].sum())
            if width == self.size or abs(found - before) <= _SETTLED * found:
                break
            before = found
            basis, _ = torch.linalg.qr(product)
        found_directions: Tensor = basis @ turn[:, -rank:].flip(1)
        return found_directions

    def _rows(self) -> Any:
        """(rows [n, D] float64, their classes [n]) of a pass."""
        for first, block in values.blocks(self.data):
            rows = block.detach().cpu().double().reshape(len(block), -1)
            yield rows, self.place[first : first + len(rows)]
            self.read += len(rows)
            self.report(self.read, -(-self.read // len(self.data)) * len(self.data))


def _squares(rows: Tensor, basis: Tensor) -> Tensor:
    """[n, r + 1]: squares along each direction, and in all of them together."""
    return torch.cat([(rows @ basis).square(), rows.square().sum(1, keepdim=True)], 1)
