# SPDX-License-Identifier: Apache-2.0
"""p(t) of random conditioning (Kim et al., CVPR 2025, arXiv 2504.02011): when a random prompt replaces the paired one.

At large t a model follows the prompt, at small t the image; p(t) rises with t, so that prompts meet images that
were not made for them where the images no longer tell.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastdistill.errors import InputError, described


def exp(u: float, rate: float = 5.0) -> float:
    """The paper's default: exp(-rate (1 - u)), u = t / T."""
    return math.exp(-rate * (1 - u))


def sigmoid(u: float, slope: float = 20.0, center: float = 0.7) -> float:
    """1 / (1 + exp(-slope (u - center)))."""
    return 1 / (1 + math.exp(-slope * (u - center)))


def exp_two_sided(u: float, rate: float = 5.0) -> float:
    """exp(-rate (1 - u)) above the middle, exp(-rate u) up to it: often random at both ends."""
    return math.exp(-rate * (1 - u if u > 0.5 else u))


def quadratic(u: float) -> float:
    """(2 (u - 1/2))^2: 1 at t = 0, 0 in the middle."""
    return (2 * (u - 0.5)) ** 2


def const(u: float, value: float) -> float:
    """The same at every timestep; 0 is paired prompts only, 1 is random prompts only."""
    return value


REPLACEMENT: dict[str, Callable[..., float]] = {f.__name__: f for f in (exp, sigmoid, exp_two_sided, quadratic, const)}


def replacement_probability(p: str | Callable[..., float], T: int, **parameters: float) -> Tensor:
    """p(t) for t = 0..T-1, float64 [T] on the CPU.

    ``p`` is a name (``exp``, ``sigmoid``, ``exp_two_sided``, ``quadratic``, ``const``) or a function of u = t / T,
    called with one float at a time; ``parameters`` are passed on to it (``rate=5.0``). The table is made once on the
    host in double precision, because ``exp`` in float32 differs between libraries.
    InputError for an unknown name (near ones are shown) or parameter, and where a value is not in [0, 1].
    """
    if T < 1:
        raise InputError.of("T", "at least 1 timestep", T)
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
    for t in range(T):
        try:
            value = float(function(t / T, **parameters))
        except OverflowError:
            value = math.inf
        if not 0 <= value <= 1:  # NaN too
            raise InputError.of(f"p(t) {name}", "probabilities, within [0, 1]", f"{value} at t = {t} of {T}")
        values.append(value)
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def thresholds(p: Tensor | float) -> Tensor:
    """floor(p 2^32) as int64, in the shape of ``p``: a 32-bit random word below it is an event of probability p.

    p = 1 gives 2^32, which every word is below. InputError where p is not in [0, 1].
    """
    p = p.to(torch.float64) if isinstance(p, Tensor) else torch.tensor(p, dtype=torch.float64, device="cpu")
    outside = p[~((p >= 0) & (p <= 1))]
    if outside.numel():
        raise InputError.of("p", "probabilities, within [0, 1]", float(outside[0]))
    return (p * 2.0**32).floor().to(torch.int64)  # a power of two: the product is exact
