# SPDX-License-Identifier: Apache-2.0
"""p(t) of random conditioning (Kim et al., CVPR 2025, arXiv 2504.02011): the probability of a random prompt.

At small t a noised latent still shows its image; at large t it shows hardly anything of it. p(t) usually increases with
t, so that random prompts are mainly combined with latents that contain little information about their own prompt.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastdistill.errors import InputError, described
from fastdistill.ops import _check


def exp(u: float, rate: float = 5.0) -> float:
    """The default of the paper: exp(-rate (1 - u)), u = t / T."""
    return math.exp(-rate * (1 - u))


def sigmoid(u: float, slope: float = 20.0, center: float = 0.7) -> float:
    """1 / (1 + exp(-slope (u - center)))."""
    return 1 / (1 + math.exp(-slope * (u - center)))


def exp_two_sided(u: float, rate: float = 5.0) -> float:
    """exp(-rate (1 - u)) for u > 1/2, exp(-rate u) otherwise: high at both ends."""
    return math.exp(-rate * (1 - u if u > 0.5 else u))


def quadratic(u: float) -> float:
    """(2 (u - 1/2))^2: 1 at u = 0, 0 at u = 1/2."""
    return (2 * (u - 0.5)) ** 2


def const(u: float, value: float = 0.0) -> float:
    """The same at every timestep; 0: only paired prompts, 1: only random prompts."""
    return value


REPLACEMENT: dict[str, Callable[..., float]] = {f.__name__: f for f in (exp, sigmoid, exp_two_sided, quadratic, const)}


def replacement_probability(p: str | Callable[..., float], T: int | Tensor, **parameters: float) -> Tensor:
    """p(t) for t = 0..T-1 as a table, float64 [T] on the CPU.

    It is computed on the host in double precision, because ``exp`` in float32 differs between libraries.

    Args:
        p: a name (``exp``, ``sigmoid``, ``exp_two_sided``, ``quadratic``, ``const``), or a function of u = t / T that
            takes one float.
        T: number of timesteps, or the t / T of each (``Schedule.clock``), [T] in [0, 1].
        parameters: keyword arguments of the function, such as ``rate=5.0``.

    Raises:
        InputError: an unknown name (with near matches) or parameter, or a value outside [0, 1].
    """
    if isinstance(T, Tensor):
        _check.valued(T=T)
        clock = T.tolist()
    else:
        _check.whole(T, "T", "at least 1 timestep")
        clock = [t / T for t in range(T)]
    if not clock:
        raise InputError.of("T", "at least 1 timestep", "none")
    if isinstance(p, str):
        if p not in REPLACEMENT:
            near = difflib.get_close_matches(p, REPLACEMENT, n=2, cutoff=0.4)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise InputError.of("p(t)", f"one of {', '.join(REPLACEMENT)}, or a function of t/T", repr(p) + hint)
        name, function = p, REPLACEMENT[p]
        try:
            inspect.signature(function).bind(0.0, **parameters)
        except TypeError as error:
            takes = [str(q) for q in inspect.signature(function).parameters.values()][1:]
            raise InputError(f"p(t) {name}: {error}; it takes ({', '.join(takes)})") from None
    else:
        if not callable(p) or isinstance(p, type):
            raise InputError.of("p(t)", f"one of {', '.join(REPLACEMENT)}, or a function of t/T", described(p))
        name, function = getattr(p, "__name__", "function"), p
    values = []
    for t, u in enumerate(clock):
        try:
            value = float(function(u, **parameters))
        except OverflowError:
            value = math.inf
        if not 0 <= value <= 1:  # NaN too
            raise InputError.of(f"p(t) {name}", "probabilities, within [0, 1]", f"{value} at t = {t} of {len(clock)}")
        values.append(value)
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def thresholds(p: Tensor | float) -> Tensor:
    """floor(p 2^32) as int64, in the shape of ``p``: a uniform 32-bit word is below it with probability p.

    ``noise_gather`` takes such a table as ``replace``. InputError for values outside [0, 1].
    """
    rule = "probabilities, within [0, 1]"
    if isinstance(p, Tensor):
        _check.valued(p=p)
        p = p.to(torch.float64)
    else:
        p = torch.tensor(_check.real(p, "p", rule), dtype=torch.float64, device="cpu")
    outside = p[~((p >= 0) & (p <= 1))]
    if outside.numel():
        raise InputError.of("p", rule, float(outside[0]))
    return (p * 2.0**32).floor().to(torch.int64)  # a power of two: the product is exact
