# SPDX-License-Identifier: Apache-2.0
"""Variances of classes and of all data by direction, measured from data; guidance windows that keep the variance."""

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
_MOST_PASSES = 20  # passes over the data for the directions
_SETTLED = 1e-4  # change of their variance between passes, as a share, at which iteration stops
_MORE = 8  # additional directions in the iteration, for faster convergence
_LOWEST = -64.0  # lowest weight in the search
_MOST_STEPS = 4096


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Variances by direction: c of each class, u of all data.

    c: [K, r] float64, per class, > 0, or 0 if a class does not vary. u: [r] or [K, r] float64 > 0, of all data.
    multiplicity: [r] float64, the number of dimensions that a direction stands for: 1, or many for the isotropic
    remainder. labels: [K] int64. fingerprint: JSON values that identify the data.

    Raises:
        InputError: variances that are not finite or below 0, shapes that do not fit, no class with variance.
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
        """For one class with given variances: numbers or tensors [r] above 0."""
        inner, outer = (value.reshape(1, -1) for value in directions(c=c, u=u))
        return cls(inner, outer, torch.ones(inner.shape[1]), torch.zeros(1, dtype=torch.int64))

    @classmethod
    def estimate(
        cls, data: LatentCache | Any, labels: Tensor | None = None, rank: int = 16, *, progress: Progress | None = None
    ) -> Spectrum:
        """From a latent cache, whose classes are its prompts, or from images [N, *S] and labels [N] int64.

        The directions are those in which classes vary most: the first ``rank`` principal components of the data around
        the means of their classes, by subspace iteration from a fixed start. The rest is one isotropic remainder.
        Unbiased (n - 1), in float64; data on disk are read in blocks, in several passes. Needs memory for K class means
        and rank + 8 directions.

        c and u are variances along these directions; this is exact for guidance if the covariances share eigenvectors.

        Args:
            data: Tensor or ``StoredRows`` of a float dtype.

        Raises:
            InputError: a class with one sample, a wrong number of labels, a rank below 1, values that are not finite.
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
        """The spectrum of the latent cache in a directory: from ``<directory>.spectrum.json`` beside it if that belongs
        to this cache and rank, else measured and saved there."""
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
        """Save as JSON; ``load`` makes an equal spectrum."""
        content = {name: getattr(self, name).tolist() for name in ("c", "u", "multiplicity", "labels")}
        content |= {"kind": "spectrum", "version": SPECTRUM.version, "fingerprint": dict(self.fingerprint)}
        atomic_write(located(path), json.dumps(content).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, expect: Mapping[str, Any] | None = None) -> Spectrum:
        """A saved spectrum; ``expect`` has the required values of some fields of the fingerprint.

        Raises:
            StorageError: the file is missing, damaged, of other data, or from a newer fastdistill.
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
        """Variance within a class of a sampler's results on a grid, summed over dimensions and classes."""
        weight = self.multiplicity.expand_as(self.c)
        counted = (self.c > 0) & (weight > 0)
        c, u = self.c[counted], self.u.expand_as(self.c)[counted]
        _check.require(bool((u > 0).all()), "u", "variances above 0 where a class varies", 0.0)
        return float((weight[counted] * recursion(grid, guidance, 0.0, c, u, start, method).variance).sum())


@dataclass(frozen=True)
class Solved:
    """A window of guidance and the variance with it.

    w_minus: the weight that restores the whole variance, however low (NaN: none above -64); reachable: whether it is
    at least the floor. schedule: the window with w_minus, or with the floor if w_minus is not reachable. ratio: the
    variance with ``schedule`` divided by that of w = 0. steps: number of steps of a grid of this kind on which the
    wanted window is reachable (None: not up to 4096).
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

    w_minus is solved by bisection on ``recursion`` for this sampler and grid, so that the variance within the classes,
    summed over directions, is that of w = 0. (A window that is neutral in the limit is not neutral on a coarse grid.)

    Args:
        switch: None: the lowest level of the grid at which it is reachable, so that w_plus acts as long as possible;
            if there is none, the level that comes nearest.
        floor: the lowest weight that counts as reachable, at most 0.
        start, method: as for ``recursion``.

    Raises:
        InputError: u <= c in every direction, or so often that w_plus does not reduce the variance; w_plus <= 0; a
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
        """The variance with a window divided by that of w = 0."""
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
    """The lowest level above ``stop`` at which the floor restores the whole variance; if there is none, the best."""
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
    """The first w below 0 at which ``excess`` (which is below 0 at w = 0) is 0; NaN: none."""
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
    """The smallest number of steps above the grid's with which it is reachable (assumed monotonic)."""
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
    """Levels spaced like those of a grid, but in more steps: the logarithm of sigma is interpolated."""
    sigma = grid.sigma[:-1]
    known = sigma[sigma.isfinite()].log()
    first = len(sigma) - len(known)  # 1 if the grid starts at infinity
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
        """c [K, r], u [r] and the multiplicities [r]; if there is a remainder, it comes last."""
        N, K, D = len(self.data), len(self.counts), self.size
        rank = min(rank, D, N - K)
        basis = self._directions(rank)
        inside = torch.zeros(K, rank + 1, dtype=torch.float64)  # the last column is the trace
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
        """[D, rank]: principal components of the data around the means of their classes."""
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
        """(rows [n, D] float64, their classes [n]), block by block, in one pass."""
        for first, block in values.blocks(self.data):
            rows = block.detach().cpu().double().reshape(len(block), -1)
            yield rows, self.place[first : first + len(rows)]
            self.read += len(rows)
            self.report(self.read, -(-self.read // len(self.data)) * len(self.data))


def _squares(rows: Tensor, basis: Tensor) -> Tensor:
    """[n, r + 1]: squared norms along each direction, and in total (last)."""
    return torch.cat([(rows @ basis).square(), rows.square().sum(1, keepdim=True)], 1)
