# SPDX-License-Identifier: Apache-2.0
"""The effect of guidance on a Gaussian: closed forms, and the exact distribution that a sampler gives on its grid.

p(x | c) = N(mu, c) and p(x) = N(0, u) in one dimension; if the covariances commute, this holds for each common
eigenvector. R = u / c, tau = sigma^2. Guidance s_c + w (s_c - s_u) with w > 0 moves the mean away from 0 and, if R > 1,
reduces the variance (Ventura et al. 2026, 2602.00716). The closed forms are integrals of the linear equations.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Guidance
from fastdistill.errors import InputError, described
from fastdistill.ops import _check

Process = Literal["ode", "sde", "tilted"]
Method = Literal["ddim", "euler", "heun", "ancestral"]
Start = Literal["exact", "noise"]
_POINTS = 256  # number of quadrature points; the error is then at the level of float64 rounding


class Moments(NamedTuple):
    """Mean and variance in each direction, float64."""

    mean: Tensor
    variance: Tensor


class Neutral(NamedTuple):
    """The weight at small noise that restores the variance without guidance, and whether it is at least the floor."""

    w: float
    reachable: bool


def closed_form(mu: Any, c: Any, u: Any, w: Any, process: Process = "ode") -> Moments:
    """Moments of samples with constant guidance, in the limit of infinitely many steps.

    ``ode``, the probability flow: variance c R^-w, mean mu (1 + w) R^(-w/2) 2F1(-w/2, 1/2; 3/2; 1 - R), where 2F1 is
    the integral of (1 + (R - 1) x^2)^(w/2) over x from 0 to 1. ``sde``, the reverse process: variance
    c R^-2w (R^(2w+1) - 1) / ((2w + 1) (R - 1)), mean mu (R - R^-w) / (R - 1). ``tilted``, the density proportional to
    p_c^(1+w) p_u^-w, which guidance does not sample: variance c u / ((1 + w) u - w c), mean mu (1 + w) / c times that.

    Args:
        mu, c, u, w: numbers or tensors of shapes that broadcast.

    Raises:
        InputError: a variance that is not finite and above 0, a mean or weight that is not finite, a tilted density
            that does not exist.
    """
    _check.require(
        process in get_args(Process), "process", f"one of {', '.join(get_args(Process))}", described(process)
    )
    mean, c, u, weight = directions(mu=mu, c=c, u=u, w=w)
    if process == "tilted":
        precision = (1 + weight) * u - weight * c
        _check.require(bool((precision > 0).all()), "w", "weights at which (1 + w) u > w c", weight.tolist())
        return Moments((1 + weight) * u / precision * mean, c * u / precision)
    log = (u / c).log()
    if process == "sde":
        shrunk = (-weight * log).exp() * _sinhc((2 * weight + 1) * log) / _sinhc(log)
        moved = (1 + weight) * (-weight * log / 2).exp() * _sinhc((1 + weight) * log) / _sinhc(log)
        return Moments(mean * moved, c * shrunk)
    return Moments(mean * (1 + weight) * _mean_integral(u / c, weight), c * (-weight * log).exp())


def recursion(
    grid: Grid,
    guidance: Guidance | float,
    mu: Any,
    c: Any,
    u: Any,
    start: Start = "exact",
    method: Method = "ddim",
    eta: float = 1.0,
) -> Moments:
    """Exact moments of the samples of a sampler with exact scores on a grid.

    With signal a and noise b, each step is x' = A x + B + (new noise), so that m' = A m + B and V' = A^2 V + (its
    variance). ``ddim`` is x' = a' x_0 + b' eps with the guided x_0 and eps at x (Song et al. 2010.02502, eq. 12);
    Euler's step in sigma, and in the time of rectified flow, is the same one. ``heun`` corrects it with eps at its end
    (Karras et al. 2206.00364, algorithm 1), with the weight of the step, except from sigma = infinity and to 0.
    ``ancestral`` goes to sigma_down and adds noise: sigma_up^2 = eta^2 sigma'^2 (1 - sigma'^2 / sigma^2).

    Args:
        guidance: a ``Guidance`` or a constant w. mu, c, u: numbers or tensors of shapes that broadcast.
        start: ``exact``: the law of the first level; ``noise``: no signal, variance a^2 + b^2, as from N(0, 1) where
            that is 1.

    Returns:
        Moments of x / a at the last level, where a = 1 unless the grid ends elsewhere.
    """
    _among(start, "start", get_args(Start))
    _among(method, "method", get_args(Method))
    _check.require(0 <= _check.real(eta, "eta") <= 1, "eta", "a number in [0, 1]", eta)
    mean, c, u = directions(mu=mu, c=c, u=u)
    weights = Guidance.parse(guidance).weights(grid)
    shape = (-1, *[1] * c.dim())  # steps, then directions
    (a, a_next), (b, b_next) = ((v[:-1].view(shape), v[1:].view(shape)) for v in (grid.signal, grid.noise))
    w = weights.view(shape)
    up = torch.zeros_like(b_next)
    if method == "ancestral":
        up = eta * b_next * (1 - (b_next * a / (a_next * b)) ** 2).clamp(min=0).sqrt()
    x0, eps = _guided(a, b, w, mean, c, u)
    A, B = (a_next * P + (b_next**2 - up**2).sqrt() * p for P, p in zip(x0, eps, strict=True))
    if method == "heun":
        end, change = _guided(a_next, b_next, w, mean, c, u)[1], (b_next - a_next * b / a) / 2
        corrected = a_next / a + change * (eps[0] + end[0] * A), change * (eps[1] + end[0] * B + end[1])
        A, B = (torch.where((a > 0) & (b_next > 0), new, old) for new, old in zip(corrected, (A, B), strict=True))
    m = a[0] * mean if start == "exact" else torch.zeros_like(mean)
    V = a[0] ** 2 * (c if start == "exact" else torch.ones_like(c)) + b[0] ** 2
    for factor, push, added in zip(A.unbind(), B.unbind(), up.square().unbind(), strict=True):
        m, V = factor * m + push, factor.square() * V + added
    return Moments(m / grid.signal[-1], V / grid.signal[-1] ** 2)


def neutral_window(c: float, u: float, w_plus: float, tau: float) -> Neutral:
    """The weight below sigma^2 = tau that gives back the variance that w_plus above it takes, for the probability flow.

    w_minus = -w_plus L(tau) / (L(0) - L(tau)) with L(tau) = ln((u + tau) / (c + tau)); reachable: w_minus >= -1.

    Raises:
        InputError: R = u / c <= 1, where positive guidance does not shrink the variance.
    """
    c, u = _wider(c, u)
    weight = _finite(w_plus, "w_plus")
    tau = _positive(tau, "tau")
    above = _log_ratio(c, u, tau)
    w = -weight * above / (_log_ratio(c, u, 0.0) - above)
    return Neutral(w, w >= -1)


def neutral_linear(c: float, u: float, omega: float, T: float) -> Neutral:
    """w0 with which w0 + omega tau keeps the variance from tau = T to 0, for the probability flow.

    w0 = -omega (u ln(1 + T / u) - c ln(1 + T / c)) / (L(0) - L(T)), L as in ``neutral_window``; reachable: w0 >= -1.

    Raises:
        InputError: R = u / c <= 1, where positive guidance does not shrink the variance.
    """
    c, u = _wider(c, u)
    omega, T = _finite(omega, "omega"), _positive(T, "T")
    w = -omega * (u * math.log1p(T / u) - c * math.log1p(T / c)) / (_log_ratio(c, u, 0.0) - _log_ratio(c, u, T))
    return Neutral(w, w >= -1)


def _guided(
    a: Tensor, b: Tensor, w: Tensor, mu: Tensor, c: Tensor, u: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The guided x_0 and eps at x as P x + Q, each as (P, Q) [steps, ...]."""
    inside, around = a**2 * c + b**2, a**2 * u + b**2
    x0 = (1 + w) * a * c / inside - w * a * u / around, (1 + w) * b**2 * mu / inside
    eps = (1 + w) * b / inside - w * b / around, -(1 + w) * a * b * mu / inside
    return x0, eps


def _mean_integral(R: Tensor, w: Tensor) -> Tensor:
    """The integral of ((1 + (R - 1) x^2) / R)^(w/2) over [0, 1].

    x = sinh(s) / k (R > 1) or sin(s) / k (R < 1) with k^2 = |R - 1| keeps the singularities away from the interval."""
    points, factors = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(_POINTS))
    y, k = ((points + 1) / 2), (R - 1).abs().sqrt().clamp(min=1e-150)
    above = (R > 1)[..., None]
    length = torch.where(R > 1, k.asinh(), k.clamp(max=1).asin())
    s = length[..., None] * y
    root = torch.where(above, s.cosh(), s.cos())
    inside = (root / R.sqrt()[..., None]) ** w[..., None] * root * (length / k)[..., None]
    return (inside * factors / 2).sum(-1)


def _sinhc(z: Tensor) -> Tensor:
    """sinh(z / 2) / (z / 2), 1 at 0."""
    half = z / 2
    return torch.where(half == 0, 1.0, half.sinh() / torch.where(half == 0, 1.0, half))


def _log_ratio(c: float, u: float, tau: float) -> float:
    return math.log1p((u - c) / (c + tau))


def _among(value: Any, argument: str, kinds: tuple[str, ...]) -> None:
    known = isinstance(value, str) and value in kinds
    _check.require(known, argument, f"one of {', '.join(kinds)}", described(value))


def _tensor(value: Any, argument: str) -> Tensor:
    if not isinstance(value, Tensor):
        try:
            value = torch.tensor(value, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise InputError.of(argument, "a number or a tensor", described(value)) from None
    _check.valued(**{argument: value})
    found: Tensor = value.detach().to("cpu", torch.float64)
    _check.require(bool(found.isfinite().all()), argument, "finite values", found.tolist())
    return found


def directions(**given: Any) -> list[Tensor]:
    """Each argument as float64, broadcast to the common shape."""
    found = {name: _tensor(value, name) for name, value in given.items()}
    for name in ("c", "u"):
        _check.require(bool((found[name] > 0).all()), name, "variances above 0", found[name].tolist())
    try:
        return list(torch.broadcast_tensors(*found.values()))  # type: ignore[no-untyped-call]
    except RuntimeError:
        shapes = ", ".join(str(tuple(value.shape)) for value in found.values())
        raise InputError.of(", ".join(found), "shapes that broadcast", shapes) from None


def _finite(value: Any, argument: str) -> float:
    number = _check.real(value, argument)
    _check.require(math.isfinite(number), argument, "a finite number", number)
    return number


def _positive(value: Any, argument: str) -> float:
    number = _finite(value, argument)
    _check.require(number > 0, argument, "a number > 0", number)
    return number


def _wider(c: Any, u: Any) -> tuple[float, float]:
    inner, outer = _positive(c, "c"), _positive(u, "u")
    rule = f"a variance above c ({inner:g}), as guidance widens what it does not shrink: no negative weight gives back"
    _check.require(outer > inner, "u", rule, outer)
    return inner, outer
