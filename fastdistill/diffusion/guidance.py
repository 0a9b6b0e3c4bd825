# SPDX-License-Identifier: Apache-2.0
"""Schedules of classifier-free guidance: the weight w in s_c + w (s_c - s_u) as a function of the noise.

w = 0 is the conditional model, w = -1 the unconditional one; ``guidance_scale`` of diffusers is g = 1 + w. Constant
guidance moves means and reduces variances; negative weights at small noise restore variance (Ventura et al. 2026,
2602.00716). ``distortion`` computes both effects.
"""

from __future__ import annotations

import itertools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.schedule import Schedule
from fastdistill.errors import InputError, described
from fastdistill.ops import _check

By = Literal["sigma", "t", "step"]
_UNITS: dict[By, str] = {"sigma": "", "t": "t", "step": "%"}
FORMS = (
    "2 or 8@10,-1@2,0 (8 while sigma > 10, -1 while sigma > 2, then 0), 6.5@50%,-1, linear:-0.5+0.02, power:2^0.9 or"
    " cads:0.6..0.9,0.25,1:2"
)


class Guidance(ABC):
    """A schedule of the guidance weight w, made by ``parse`` or one of the methods below. Immutable, comparable.

    A step of a sampler uses the weight at the level where it starts. ``by`` is the unit of the thresholds: ``sigma``
    (noise / signal), ``t`` (the timestep as a share of the training timesteps; for rectified flow: sigma), or ``step``
    (the share of the sampler's steps that is done).

    ``str`` gives the text of a schedule, from which ``parse`` makes an equal one.
    """

    by: By

    @staticmethod
    def constant(w: float) -> Guidance:
        """The same w at every level. Text: ``2``."""
        return Piecewise((), w)

    @staticmethod
    def interval(w: float, above: float, below: float = math.inf, *, by: By = "sigma") -> Guidance:
        """w where above < sigma <= below, the conditional model elsewhere (Kynkaanniemi et al. 2024, 2404.07724).

        With ``by="step"``: from the share ``above`` of the steps on, until ``below``.
        """
        low, high = _check.real(above, "above"), _check.real(below, "below")
        _check.require(low < high, "above", f"less than below ({high:g}): the interval is empty", low)
        if by == "step":
            before: tuple[tuple[float, float], ...] = ((low, 0.0),) if low > 0 else ()
            return Piecewise((*before, (high, w)), 0.0, by) if high < 1 else Piecewise(before, w, by)
        noisier = ((high, 0.0),) if high < math.inf else ()
        return Piecewise((*noisier, (low, w)), 0.0, by)

    @staticmethod
    def window(
        w_plus: float,
        w_minus: float,
        switch: float,
        stop: float = 0.0,
        tail: float = 0.0,
        *,
        by: By = "sigma",
        floor: float = -math.inf,
    ) -> Guidance:
        """w_plus while sigma > switch, w_minus while sigma > stop, then tail. Text: ``8@10,-1@2,0``.

        With ``by="step"`` and stop = 0: w_minus to the end. A w_minus below ``floor`` is refused.
        """
        lowest, w_minus = _check.real(floor, "floor"), finite(w_minus)
        _check.require(w_minus >= lowest, "w_minus", f"a weight of at least the floor, {lowest:g}", w_minus)
        if by == "step" and stop == 0:
            return Piecewise(((switch, w_plus),), w_minus, by)
        return Piecewise(((switch, w_plus), (stop, w_minus)), tail, by)

    @staticmethod
    def piecewise(stretches: Sequence[tuple[float, float]], tail: float, *, by: By = "sigma") -> Guidance:
        """Pairs (threshold, w): w is that of the first pair whose threshold is below the noise, else the tail.

        With ``by="step"``: w of the first pair whose share of the steps is not done yet.
        """
        return Piecewise(stretches, tail, by)  # type: ignore[arg-type] # checked and made tuples there

    @staticmethod
    def linear(w0: float, omega: float) -> Guidance:
        """w = w0 + omega sigma^2 (Ventura et al. 2026, 2602.00716). Text: ``linear:-0.5+0.02``."""
        return Linear(w0, omega)

    @staticmethod
    def function(f: Callable[[float], float], *, by: By = "sigma") -> Guidance:
        """w = f(sigma), or f of the share that ``by`` names. Such a schedule has no text."""
        return Function(f, by)

    @staticmethod
    def power_law(omega: float, alpha: float) -> Guidance:
        """w = omega |Delta_s|^alpha for each sample: ``hooks.PowerLaw``. Text: ``power:2^0.9``."""
        from fastdistill.diffusion.hooks import PowerLaw

        return PowerLaw(omega, alpha)

    @staticmethod
    def cads(base: Guidance | float | str, tau1: float, tau2: float, scale: float, mix: float = 1.0) -> Guidance:
        """A schedule whose prompts are noised while t > tau1 T: ``hooks.Cads``. Text: ``cads:0.6..0.9,0.25,1:2``."""
        from fastdistill.diffusion.hooks import Cads

        return Cads(Guidance.parse(base), tau1, tau2, scale, mix)

    @staticmethod
    def parse(text: str | float | Guidance) -> Guidance:
        """The schedule of a text, a number or a schedule.

        ``2``: constant. ``8@10,-1@2,0``: 8 while sigma > 10, -1 while sigma > 2, then 0. Thresholds are sigma; with the
        suffix ``t`` they are timesteps as a share of training's, with ``%`` the percentage of the steps that is done.
        ``linear:-0.5+0.02``: w = -0.5 + 0.02 sigma^2. ``power:2^0.9``: w = 2 |Delta_s|^0.9 for each sample.
        ``cads:0.6..0.9,0.25,1:2``: w = 2 with prompts noised from t = 0.6 T to 0.9 T by 0.25, rescaled in full.

        Raises:
            InputError: a text that is none of these, with the column of the first wrong character.
        """
        if isinstance(text, Guidance):
            return text
        if isinstance(text, Real) and not isinstance(text, bool):
            return Guidance.constant(_check.real(text, "guidance"))
        if not isinstance(text, str):
            raise InputError.of("guidance", f"a schedule such as {FORMS}", described(text))
        from fastdistill.diffusion.guidance_text import parsed

        return parsed(text)

    @abstractmethod
    def weights_at(self, values: Tensor) -> Tensor:
        """w at these values (in the unit ``by``), float64 in their shape."""

    @abstractmethod
    def describe(self) -> str:
        """What the schedule does, in words."""

    def weights(self, grid: Grid) -> Tensor:
        """w of each step, float64 [steps].

        Raises:
            InputError: a threshold outside of the grid, a stretch with no step in it, a weight that is not finite in
                float32.
        """
        if not isinstance(grid, Grid):
            raise InputError.of("grid", "a Grid", described(grid))
        count = torch.arange(len(grid), dtype=torch.float64, device="cpu")
        values = {"sigma": grid.sigma[:-1], "t": grid.clock, "step": count / len(grid)}[self.by]
        self._check_within(values, float(grid.sigma[-1]) if self.by == "sigma" else 0.0, True)
        return self._finite(values)

    def table(self, levels: Schedule | Tensor) -> Tensor:
        """w at each timestep of training, float64 [T], as ``match_table`` takes it.

        Args:
            levels: a schedule, or coefficients [T, 4] whose first two columns are signal and noise; t is then t/T.

        Raises:
            InputError: ``by="step"``, which has no meaning in training; a threshold outside of the levels; a weight
                that is not finite in float32.
        """
        if self.by == "step":
            rule = "thresholds as sigma or t for a table of timesteps, which are of no step"
            raise InputError.of("guidance", rule, repr(str(self)))
        if isinstance(levels, Schedule):
            sigma, clock = levels.noise / levels.signal, levels.clock
        else:
            _check.valued(levels=levels)
            _check.shape(levels, "levels", (None, 4), "a schedule or coefficients [T, 4]")
            signal, noise = levels[:, :2].detach().to("cpu", torch.float64).unbind(1)
            sigma, clock = noise / signal, torch.arange(len(signal), dtype=torch.float64, device="cpu") / len(signal)
        values = sigma if self.by == "sigma" else clock
        self._check_within(values, 0.0, False)
        return self._finite(values)

    def scales(self, grid: Grid) -> Tensor:
        """``guidance_scale`` of diffusers at each step, g = 1 + w, float64 [steps]."""
        return 1 + self.weights(grid)

    def passes(self, grid: Grid) -> Tensor:
        """Evaluations of the model for each step, int64 [steps]: 1 if w is 0 or -1, else 2."""
        scales = self.scales(grid)
        return torch.where((scales == 0) | (scales == 1), 1, 2)

    def evaluations(self, grid: Grid, order: int = 1) -> int:
        """Evaluations of the model for one image. ``order`` 2: Heun's method, which evaluates each step at both ends,
        except one from sigma = infinity or to sigma = 0."""
        if order not in (1, 2):
            raise InputError.of("order", "1 or 2", described(order))
        passes, sigma = self.passes(grid), grid.sigma
        corrected = sigma[:-1].isfinite() & (sigma[1:] > 0)
        return int(passes.sum() + (passes[corrected].sum() if order == 2 else 0))

    def _check_within(self, values: Tensor, end: float, steps: bool) -> None:  # noqa: B027
        """InputError for a part of the schedule that has no effect at these values, which go to ``end``."""

    def _finite(self, values: Tensor) -> Tensor:
        w = self.weights_at(values)
        for weight, value in zip(w.tolist(), values.tolist(), strict=True):
            if not abs(weight) <= _check.LARGEST:
                rule = f"a finite weight at every level ({self})"
                if math.isfinite(weight):
                    rule = f"a weight within float32 at every level ({self})"
                raise InputError.of("guidance", rule, f"{weight} at {self.by} {value:g}")
        return w


@dataclass(frozen=True)
class Piecewise(Guidance):
    """w of the first (threshold, w) that the noise exceeds; below all of them the tail."""

    stretches: tuple[tuple[float, float], ...]
    tail: float
    by: By = "sigma"

    def __post_init__(self) -> None:
        _check_by(self.by)
        try:
            pairs = [(threshold, w) for threshold, w in self.stretches]
        except (TypeError, ValueError):
            rule = "pairs (threshold, weight)"
            raise InputError.of("stretches", rule, described(self.stretches)) from None
        checked = tuple((_threshold(threshold, self.by), finite(w)) for threshold, w in pairs)
        for (one, _), (other, _) in itertools.pairwise(checked):
            falls, order = (other > one, "increase") if self.by == "step" else (other < one, "decrease")
            _check.require(falls, "thresholds", f"values of {self.by} that {order}", f"{one:g}, then {other:g}")
        object.__setattr__(self, "stretches", checked)
        object.__setattr__(self, "tail", finite(self.tail))
        if not checked:
            object.__setattr__(self, "by", "sigma")  # a constant has no thresholds

    def __str__(self) -> str:
        unit = _UNITS[self.by]
        parts = [f"{shown(w)}@{shown(_of_text(threshold, self.by))}{unit}" for threshold, w in self.stretches]
        return ",".join([*parts, shown(self.tail)])

    def describe(self) -> str:
        unit = _UNITS[self.by].replace("t", " T")
        first, sign = ("until", "") if self.by == "step" else ("while", f"{self.by} > ")
        ends = [f"{shown(w)} {first} {sign}{shown(_of_text(at, self.by))}{unit}" for at, w in self.stretches]
        return "w = " + ", ".join([*ends, f"then {shown(self.tail)}" if ends else shown(self.tail)])

    def weights_at(self, values: Tensor) -> Tensor:
        weights = [self.tail, *(w for _, w in self.stretches[::-1])]
        return torch.tensor(weights, dtype=torch.float64, device="cpu")[self._place(values)]

    def _place(self, values: Tensor) -> Tensor:
        """Number of the stretch of each value, counted from the end; 0 is the tail."""
        place = torch.zeros(values.shape, dtype=torch.int64, device="cpu")
        for number, (threshold, _) in enumerate(self.stretches[::-1], 1):
            place[values < threshold if self.by == "step" else values > threshold] = number
        return place

    def _check_within(self, values: Tensor, end: float, steps: bool) -> None:
        start = 1.0 if self.by == "step" else float(values.max())
        for threshold, _ in self.stretches:
            if not end <= threshold < start:
                rule = f"thresholds of {self.by} from {end:.6g} to below {start:.6g}, the ends of the levels"
                raise InputError.of("guidance", rule, f"{threshold:g} in {str(self)!r}")
        empty = set(range(1, 1 + len(self.stretches))) - set(self._place(values).tolist())
        if steps and empty:
            threshold, w = self.stretches[len(self.stretches) - max(empty)]
            got = f"none for w = {w:g} at {threshold:g} in {str(self)!r}"
            raise InputError.of("guidance", "stretches in each of which a step of the grid starts", got)


@dataclass(frozen=True)
class Linear(Guidance):
    """w = w0 + omega sigma^2."""

    w0: float
    omega: float
    by: By = "sigma"

    def __post_init__(self) -> None:
        _check.require(self.by == "sigma", "by", "sigma, of which linear is a function", described(self.by))
        object.__setattr__(self, "w0", finite(self.w0, "w0"))
        object.__setattr__(self, "omega", finite(self.omega, "omega"))

    def __str__(self) -> str:
        return f"linear:{shown(self.w0)}{'' if shown(self.omega).startswith('-') else '+'}{shown(self.omega)}"

    def describe(self) -> str:
        return f"w = {shown(self.w0)} + {shown(self.omega)} sigma^2"

    def weights_at(self, values: Tensor) -> Tensor:
        return self.w0 + self.omega * values.double() ** 2


@dataclass(frozen=True)
class Function(Guidance):
    """w = f(value), one value at a time."""

    f: Callable[[float], float]
    by: By = "sigma"

    def __post_init__(self) -> None:
        _check_by(self.by)
        _check.require(callable(self.f), "f", "a function of one number", described(self.f))

    def __str__(self) -> str:
        return f"function {getattr(self.f, '__name__', type(self.f).__name__)} of {self.by}"

    def describe(self) -> str:
        return f"w = {self}"

    def weights_at(self, values: Tensor) -> Tensor:
        found = [_check.real(self.f(value), "f(value)") for value in values.flatten().tolist()]
        return torch.tensor(found, dtype=torch.float64, device="cpu").reshape(values.shape)


def _check_by(by: Any) -> None:
    known = isinstance(by, str) and by in get_args(By)
    _check.require(known, "by", f"one of {', '.join(get_args(By))}", described(by))


def finite(value: Any, argument: str = "w") -> float:
    number = _check.real(value, argument, "a finite weight")
    _check.require(math.isfinite(number) and value is not True, argument, "a finite weight", described(value))
    _check.require(abs(number) <= _check.LARGEST, argument, "a weight within float32", described(value))
    return number


def _threshold(value: Any, by: By) -> float:
    number = _check.real(value, "threshold", "a number")
    low, high = number >= 0, number < math.inf if by == "sigma" else number <= 1
    step = by != "step" or number > 0
    rule = {"sigma": "a finite sigma >= 0", "t": "a share t/T in [0, 1]", "step": "a share of the steps in (0, 1]"}[by]
    _check.require(low and high and step, "threshold", rule, value)
    return number


def _of_text(threshold: float, by: By) -> float | Decimal:
    """A threshold as it is written; steps in percent, exactly."""
    return Decimal(repr(threshold)).scaleb(2) if by == "step" else threshold


def shown(value: float | Decimal) -> str:
    """The shortest text that is read as the same number."""
    text = f"{value:f}" if isinstance(value, Decimal) else repr(value)
    return re.sub(r"\.0*$", "", text.rstrip("0")) if "." in text and "e" not in text else text
