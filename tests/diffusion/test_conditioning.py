# SPDX-License-Identifier: Apache-2.0
"""p(t) of random conditioning: published values, thresholds, refusals."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdistill.diffusion.conditioning import REPLACEMENT, replacement_probability, thresholds
from fastdistill.errors import InputError
from tests.harness import EPS64


def test_the_default_of_the_paper():
    p = replacement_probability("exp", 1000)
    assert p.dtype == torch.float64 and p.shape == (1000,)
    published = {0: 0.006738, 250: 0.023518, 500: 0.082085, 700: 0.223130, 900: 0.606531, 999: 0.995012}
    assert {t: round(float(p[t]), 6) for t in published} == published
    assert round(float(p.mean()), 6) == 0.198156


def test_the_others():
    sigmoid = replacement_probability("sigmoid", 1000)
    assert round(float(sigmoid.mean()), 4) == 0.2996 and float(sigmoid[700]) == 0.5
    two_sided = replacement_probability("exp_two_sided", 1000)
    one_sided = replacement_probability("exp", 1000)
    assert torch.equal(two_sided[501:], one_sided[501:])
    assert float(two_sided[0]) == 1 and float(two_sided[500]) == math.exp(-2.5) == float(two_sided.min())
    torch.testing.assert_close(two_sided[1:500], two_sided[501:].flip(0), rtol=16 * EPS64, atol=0)
    quadratic = replacement_probability("quadratic", 1000)
    assert [float(quadratic[t]) for t in (0, 250, 500, 750)] == [1, 0.25, 0, 0.25]
    assert replacement_probability("const", 7, value=0.3).tolist() == [0.3] * 7


def test_parameters_and_functions():
    assert float(replacement_probability("exp", 1000, rate=2.0)[500]) == math.exp(-1)
    assert float(replacement_probability("sigmoid", 10, slope=1.0, center=0.2)[2]) == 0.5
    assert replacement_probability(lambda u: u * u, 4).tolist() == [0, 1 / 16, 1 / 4, 9 / 16]
    assert replacement_probability(lambda u, k: u**k, 2, k=3).tolist() == [0, 0.125]


@pytest.mark.parametrize(
    ("p", "parameters", "message"),
    [
        ("sigmiod", {}, "got 'sigmiod'; did you mean sigmoid?"),
        ("exponential", {}, "did you mean exp"),
        (
            "zzz",
            {},
            "p(t): expected one of exp, sigmoid, exp_two_sided, quadratic, const, or a function of t/T, got 'zzz'",
        ),
        ("exp", {"lam": 5.0}, "p(t) exp: got an unexpected keyword argument 'lam'; it takes (rate: 'float' = 5.0)"),
        ("const", {"value": 1.5}, "p(t) const: expected probabilities, within [0, 1], got 1.5 at t = 0 of 10"),
        ("exp", {"rate": -5.0}, "p(t) exp: expected probabilities"),
        ("sigmoid", {"slope": 1e9}, "p(t) sigmoid: expected probabilities, within [0, 1], got inf"),
        (lambda u: float("nan"), {}, "p(t) <lambda>: expected probabilities, within [0, 1], got nan at t = 0"),
    ],
)
def test_refusals(p, parameters, message):
    with pytest.raises(InputError, match=re.escape(message)):
        replacement_probability(p, 10, **parameters)


@given(st.integers(0, 2**32), st.floats(0, 1, exclude_max=True))
def test_thresholds_are_exact(numerator, fraction):
    assert int(thresholds(numerator / 2**32)) == numerator
    assert int(thresholds(min(1.0, (numerator + fraction) / 2**32))) in (numerator, min(numerator + 1, 2**32))
    p = torch.tensor([0.0, 1.0, fraction], dtype=torch.float64)
    low, high, between = thresholds(p).tolist()
    assert (low, high) == (0, 2**32) and between == math.floor(fraction * 2**32)


def test_thresholds_refuse_what_is_no_probability():
    assert thresholds(replacement_probability("exp", 1000)).dtype == torch.int64
    for bad in (-1e-300, 1.0000000000000002, math.nan):
        with pytest.raises(InputError, match=r"p: expected probabilities, within \[0, 1\]"):
            thresholds(torch.tensor([0.5, bad], dtype=torch.float64))


def test_every_name_works_at_every_length():
    for name in REPLACEMENT:
        for T in (1, 2, 7):
            p = replacement_probability(name, T, **({"value": 0.5} if name == "const" else {}))
            assert p.shape == (T,) and bool(((p >= 0) & (p <= 1)).all())
