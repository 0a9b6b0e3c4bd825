# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import sys

import pytest
import torch

from fastdistill.errors import FastdistillError, InputError
from fastdistill.evaluate import bootstrap, frechet_distance, mean_spread, wilson_interval


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (7, 10), (450, 512)])
def test_wilson_interval_solves_its_equation(successes: int, n: int) -> None:
    """The ends are the p for which the observed fraction is z standard errors away: (share - p)^2 = z^2 p (1 - p) /
    n."""
    z = 1.959963984540054
    for end in wilson_interval(successes, n):
        assert (successes / n - end) ** 2 == pytest.approx(z * z * end * (1 - end) / n, abs=1e-12)
    low, high = wilson_interval(successes, n)
    assert 0 <= low < high <= 1
    wide = wilson_interval(successes, n, confidence=0.99)
    assert wide[0] <= low and high <= wide[1] and wide != (low, high)


def test_wilson_interval_refuses() -> None:
    for arguments, name in (((1, 0), "n"), ((5, 4), "successes"), ((-1, 4), "successes"), ((1, 4, 1.0), "confidence")):
        with pytest.raises(InputError, match=f"^{name}: expected"):
            wilson_interval(*arguments)


def test_missing_package_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(FastdistillError, match=r"scipy: .*pip install 'fastdistill\[demo\]'"):
        wilson_interval(1, 2)


def test_mean_spread() -> None:
    assert mean_spread([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7)))
    for values in ([1.0], [], [1.0, math.nan]):
        with pytest.raises(InputError, match="values"):
            mean_spread(values)


def test_its_interval_holds_what_so_many_samples_have_on_average() -> None:
    """Halves have a larger bias, which the interval excludes; its spread is that of new samples."""

    def sampled(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        random = torch.Generator().manual_seed(seed)
        one, noise = torch.randn(2, 80, 4, generator=random, dtype=torch.float64)
        return one, 0.8 * one + 0.3 * noise  # from the same noise, like a student

    drawn = torch.tensor([frechet_distance(*sampled(seed)) for seed in range(200)])
    pair = sampled(0)
    rows = torch.arange(80)
    found = bootstrap(lambda i: frechet_distance(pair[0][i], pair[1][i]), rows, replace=False)
    halves = torch.stack([torch.randperm(80, generator=torch.Generator().manual_seed(k))[:40] for k in range(100)])
    biased = sum(frechet_distance(pair[0][i], pair[1][i]) for i in halves) / 100
    assert found.low < drawn.mean() < found.high and biased > found.value
    spread = (found.high - found.low) / (2 * 1.96 * float(drawn.std()))
    assert 0.5 < spread < 2  # the standard deviation of 80 samples is known to about 10 %


def test_frechet_distance_of_known_gaussians() -> None:
    """For N(m, diag a) and N(0, diag b) with exact moments: |m|^2 + sum (sqrt a - sqrt b)^2."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, generator=random, dtype=torch.float64)
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    a, b, mean = torch.tensor([4.0, 1.0, 0.25]), torch.tensor([1.0, 9.0, 0.25]), torch.tensor([1.0, 0.0, -2.0])
    turn = torch.linalg.qr(torch.randn(3, 3, generator=random, dtype=torch.float64)).Q
    first, second = (white * a.sqrt() + mean) @ turn, (white * b.sqrt()) @ turn
    assert frechet_distance(first, second) == pytest.approx(5 + 1 + 4, rel=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-7)
    assert frechet_distance(first[:, :1], first[:, :1] + 3) == pytest.approx(9, rel=1e-9)
    with pytest.raises(InputError, match="second: expected 3 features"):
        frechet_distance(first, second[:, :2])
