# SPDX-License-Identifier: Apache-2.0
"""What guidance does to a Gaussian: closed forms compared with integration, the recursion with independent sampling."""

import math
import re

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from fastdistill.diffusion.distortion import closed_form, neutral_linear, neutral_window, recursion
from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Guidance
from fastdistill.diffusion.guided import sample
from fastdistill.diffusion.sampler import ddim
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.errors import InputError
from tests.harness import EPS64

MU, C, U = 1.3, 0.4, 2.0


def grid_of(sigmas, kind="ve"):
    """Levels with these sigmas in variance-exploding, variance-preserving or rectified-flow coordinates."""
    s = torch.as_tensor(sigmas, dtype=torch.float64)
    signal = {"ve": torch.ones_like(s), "vp": (1 + s**2).rsqrt(), "flow": 1 / (1 + s)}[kind]
    noise = torch.where(s.isfinite(), signal * s, 1.0)
    clock = torch.linspace(1, 0.1, len(s) - 1)
    return Grid(signal, noise, 1000 * clock, clock)


def karras(steps, high=80.0, low=0.002):
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return torch.cat([(high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7, torch.zeros(1)])


def by_scores(sigmas, weights, mu, c, u, m, V, method="ddim", eta=1.0):
    """The affine step of each method from the scores, in variance-exploding units, in plain Python."""

    def eps(sigma, w):  # as (slope, offset)
        slope = sigma * ((1 + w) / (c + sigma**2) - w / (u + sigma**2))
        return slope, -(1 + w) * sigma * mu / (c + sigma**2)

    for s, t, w in zip(sigmas, sigmas[1:], weights, strict=False):
        if s == math.inf:  # x is pure noise and has no information on the data
            m, V = (1 + w) * mu, t**2
            continue
        up = eta * math.sqrt(t**2 * (s**2 - t**2) / s**2) if method == "ancestral" else 0.0
        down = math.sqrt(t**2 - up**2)
        p, q = eps(s, w)
        A, B = 1 + (down - s) * p, (down - s) * q
        if method == "heun" and t > 0:
            p_end, q_end = eps(t, w)
            A, B = 1 + (t - s) / 2 * (p + p_end * A), (t - s) / 2 * (q + p_end * B + q_end)
        m, V = A * m + B, A * A * V + up**2
    return m, V


def integrated(w_of, mu, m, V, first, last, steps=500):
    """Mean and variance of the probability flow, from m and V at log(tau) = first to last, by Runge-Kutta."""

    def slope(log_tau, m):
        tau = math.exp(log_tau)
        w = w_of(tau)
        rate = tau / 2 * ((1 + w) / (C + tau) - w / (U + tau))
        return rate * m - tau / 2 * (1 + w) * mu / (C + tau), 2 * rate

    h, state = (last - first) / steps, (m, math.log(V))
    for i in range(steps):
        at, m = first + i * h, state[0]
        k1 = slope(at, m)
        k2 = slope(at + h / 2, m + h / 2 * k1[0])
        k3 = slope(at + h / 2, m + h / 2 * k2[0])
        k4 = slope(at + h, m + h * k3[0])
        state = [y + h / 6 * (p + 2 * q + 2 * r + s) for y, p, q, r, s in zip(state, k1, k2, k3, k4, strict=True)]
    return state[0], math.exp(state[1])


@pytest.mark.parametrize(
    ("process", "mean", "variance"), [("ode", 1.82, 0.016), ("sde", 1.612, 0.09997), ("tilted", 1.5, 0.1538)]
)
def test_the_example_of_the_three_laws(process, mean, variance):
    found = closed_form(MU, C, U, 2.0, process)
    assert round(float(found.mean), 4) == mean and round(float(found.variance), 4) == round(variance, 4)
    none = closed_form(MU, C, U, 0.0, process)
    assert none.mean.item() == pytest.approx(MU, rel=8 * EPS64) and none.variance.item() == pytest.approx(
        C, rel=8 * EPS64
    )


@pytest.mark.parametrize("log_ratio", [-4.0, -1.3, -0.2, 0.4, 2.0, 6.0])
@pytest.mark.parametrize("w", [-3.0, -2.25, -0.3, 0.0, 0.7, 2.0, 5.5, 8.0])
def test_closed_forms_against_scipy(w, log_ratio):
    special = pytest.importorskip("scipy.special")
    R = math.exp(log_ratio)
    ode = closed_form(1.0, 1.0, R, w)
    assert float(ode.mean) == pytest.approx((1 + w) * R ** (-w / 2) * special.hyp2f1(-w / 2, 0.5, 1.5, 1 - R), rel=1e-9)
    sde = closed_form(1.0, 1.0, R, w, "sde")
    if abs(log_ratio) > 0.01 and abs(2 * w + 1) > 0.01:
        factor = (R ** (2 * w + 1) - 1) / ((2 * w + 1) * (R - 1))
        assert float(sde.variance) == pytest.approx(R ** (-2 * w) * factor, rel=1e-9)
        assert float(sde.mean) == pytest.approx((R - R**-w) / (R - 1), rel=1e-9, abs=1e-9)


def test_limits_of_the_closed_forms():
    R = U / C
    half = closed_form(MU, C, U, -0.5, "sde")
    assert half.variance.item() == pytest.approx(C * R * math.log(R) / (R - 1), rel=8 * EPS64)
    for process in ("ode", "sde", "tilted"):
        same = closed_form(MU, C, C, 2.0, process)  # u = c: only the mean moves
        assert same.variance.item() == pytest.approx(C, rel=8 * EPS64)
        assert same.mean.item() == pytest.approx(3 * MU, rel=8 * EPS64)
        null = closed_form(MU, C, U, -1.0, process)
        assert null.variance.item() == pytest.approx(U, rel=16 * EPS64) and abs(null.mean.item()) < EPS64
        assert closed_form(9.0, C, U, 2.0, process).variance.equal(closed_form(MU, C, U, 2.0, process).variance)
    assert closed_form(MU, U, C, 2.0).variance > U and closed_form(MU, U, C, 2.0, "sde").variance > U  # u < c: it grows
    several = closed_form(torch.tensor([1.0, 2.0]), C, torch.tensor([[2.0], [3.0]]), 1.0)
    assert several.mean.shape == (2, 2) and several.mean.dtype == torch.float64


def test_the_flow_has_the_closed_forms_in_the_limit():
    m, V = integrated(lambda tau: 2.0, MU, MU, C + math.exp(25.0), 25.0, -14.0)
    exact = closed_form(MU, C, U, 2.0)
    assert m == pytest.approx(exact.mean.item(), rel=1e-4) and pytest.approx(exact.variance.item(), rel=1e-4) == V


@pytest.mark.parametrize(
    ("method", "process", "order"), [("ddim", "ode", 1), ("heun", "ode", 2), ("ancestral", "sde", 1)]
)
def test_finer_grids_approach_the_closed_forms(method, process, order):
    def at(steps):
        grid = grid_of([*torch.logspace(3, -3, steps, dtype=torch.float64).tolist(), 0.0])
        return torch.stack(recursion(grid, 2.0, MU, C, U, method=method))

    exact, coarse, fine = torch.stack(closed_form(MU, C, U, 2.0, process)), at(500), at(1000)
    limit = fine + (fine - coarse) / (2**order - 1)
    assert (limit / exact - 1).abs().max() < 1e-3
    errors = [abs(float(found[1] / exact[1] - 1)) for found in (coarse, fine)]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)  # of the variance


@pytest.mark.parametrize("method", ["ddim", "euler", "heun", "ancestral"])
def test_the_recursion_against_scores(method):
    sigmas = karras(25)
    window = Guidance.window(8, -1, 10, 2)
    weights = window.weights(grid_of(sigmas)).tolist()
    for start, m, V in (("exact", MU, C + 6400.0), ("noise", 0.0, 1 + 6400.0)):
        wanted = by_scores(sigmas.tolist(), weights, MU, C, U, m, V, method)
        for kind in ("ve", "vp", "flow"):  # the same sigmas give the same law
            found = recursion(grid_of(sigmas, kind), window, MU, C, U, start, method)
            assert [float(v) for v in found] == pytest.approx(wanted, rel=1e-10)


GRIDS = {
    "trailing": Grid.trailing(NoiseSchedule.scaled_linear(), 20),
    "karras": Grid.karras(NoiseSchedule.cosine(), 30, 30.0, 0.09),
    "flow": Grid.flow(28, 3.0),
    "ddim": Grid.of(DDIMScheduler(timestep_spacing="trailing"), 25),
    "euler": Grid.of(EulerDiscreteScheduler(use_karras_sigmas=True), 15),
    "flow of a pipeline": Grid.of(FlowMatchEulerDiscreteScheduler(shift=3.0), 20),
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    ("method", "eta"), [("ddim", 1), ("euler", 1), ("heun", 1), ("ancestral", 1), ("ancestral", 0.4)]
)
def test_the_recursion_on_the_grids_of_samplers(grid, method, eta):
    at = GRIDS[grid]
    sigmas, first = at.sigma.tolist(), float(at.sigma[0])
    for guidance in (Guidance.constant(2), Guidance.window(3, -1, 2.0, 0.6, 0.5), Guidance.linear(-0.5, 0.01)):
        if first == math.inf and guidance == Guidance.linear(-0.5, 0.01):
            continue  # no weight there
        weights = guidance.weights(at).tolist()
        unit = float((at.signal[0] ** 2 + at.noise[0] ** 2) / at.signal[0] ** 2) if first < math.inf else math.nan
        for start, m, V in (("exact", MU, C + first**2), ("noise", 0.0, unit)):
            wanted = by_scores(sigmas, weights, MU, C, U, m, V, method, eta)
            found = recursion(at, guidance, MU, C, U, start, method, eta)
            assert [float(v) for v in found] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(("method", "process"), [("ddim", "ode"), ("heun", "ode"), ("ancestral", "sde")])
@pytest.mark.parametrize("kind", ["flow", "vp"])
def test_the_limits_of_three_thousand_steps(kind, method, process):
    """Compared with the mean of the class and its variance without guidance."""
    exact = closed_form(MU, C, U, 2.0, process)

    def errors(steps):
        grid = Grid.flow(steps) if kind == "flow" else grid_of(Grid.flow(steps).sigma[1:], "vp")
        found = recursion(grid, 2.0, MU, C, U, method=method)
        return abs(float(found.mean - exact.mean)) / MU, abs(float(found.variance - exact.variance)) / C

    coarse, fine = errors(750), errors(3000)
    assert max(fine) < 1e-3 and fine[1] < 0.6 * coarse[1]


def test_a_rotation_changes_nothing():
    """Full covariances with common eigenvectors: the sampler's map of the unit vectors gives the whole distribution."""
    turn, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    c, u, mu = (torch.tensor(v, dtype=torch.float64) for v in ([0.4, 1.0, 2.0], [2.0, 1.0, 0.5], [1.3, -2.0, 0.0]))
    C_, U_, m_ = turn @ c.diag() @ turn.T, turn @ u.diag() @ turn.T, turn @ mu
    grid = GRIDS["karras"]
    level = dict(zip(grid.times.tolist(), zip(grid.signal.tolist(), grid.noise.tolist(), strict=False), strict=False))

    def model(x, t, encoder_hidden_states):
        a, b = level[float(t[0])]
        eye = torch.eye(3, dtype=torch.float64)
        inner = b * torch.linalg.solve(a**2 * C_ + b**2 * eye, (x - a * m_).T).T
        outer = b * torch.linalg.solve(a**2 * U_ + b**2 * eye, x.T).T
        return torch.where(encoder_hidden_states == 1, inner, outer)

    start = torch.cat([torch.zeros(1, 3), torch.eye(3)]).double()
    end = sample(model, start, torch.ones(4, 1), torch.zeros(1), grid, guidance=1.5)
    slopes, found = (end[1:] - end[0]).T, recursion(grid, 1.5, mu, c, u, "noise")
    rounding = 64 * EPS64 * 30
    assert (end[0] - turn @ found.mean).abs().max() < rounding * end[0].abs().max()
    wanted = turn @ found.variance.diag() @ turn.T
    assert (slopes @ slopes.T - wanted).abs().max() < rounding * wanted.abs().max()


def test_directions_are_independent():
    c, u, mu = (torch.tensor(v, dtype=torch.float64) for v in ([0.4, 1.0, 2.0], [2.0, 1.0, 0.5], [1.3, -2.0, 0.0]))
    grid = grid_of(karras(18), "vp")
    together = recursion(grid, 3.0, mu, c, u)
    for i in range(3):
        alone = recursion(grid, 3.0, float(mu[i]), float(c[i]), float(u[i]))
        assert alone.mean == together.mean[i] and alone.variance == together.variance[i]
    assert together.variance[2] > recursion(grid, 0.0, mu, c, u).variance[2]  # u < c: it grows


@pytest.mark.parametrize("method", ["ddim", "heun", "ancestral"])
def test_a_start_without_signal_is_exact(method):
    sigmas = torch.cat([torch.tensor([math.inf]), karras(40, high=20.0)])
    ends = [recursion(grid_of(sigmas, "flow"), 2.0, MU, C, U, start, method) for start in ("exact", "noise")]
    assert ends[0] == ends[1]
    far = recursion(grid_of([1e9, *sigmas[1:].tolist()], "vp"), 2.0, MU, C, U, "noise", "ddim")
    if method == "ddim":
        assert torch.stack(ends[0]).allclose(torch.stack(far), rtol=1e-6, atol=0)


@pytest.mark.parametrize("w", [-0.5, 0.0, 3.0])
def test_the_recursion_is_what_ddim_samples(w):
    """Two samples determine the affine map of the sampler with exact noise predictions."""
    schedule = NoiseSchedule.cosine(100)
    a, b = schedule.signal, schedule.noise

    def model(x, t, encoder_hidden_states):
        own, level = encoder_hidden_states, (slice(None), *[None] * (x.ndim - 1))
        s, n = a[t][level], b[t][level]
        inner, outer = s**2 * C + n**2, s**2 * U + n**2
        return torch.where(own == 1, n * (x - s * MU) / inner, n * x / outer)

    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    end = ddim(model, x, torch.ones(2, 1), torch.zeros(1), schedule, steps=12, guidance_scale=1 + w)
    offset, slope = float(end[0]), float(end[1] - end[0])
    found = recursion(Grid.trailing(schedule, 12), w, MU, C, U, "noise")
    assert float(found.mean) == pytest.approx(offset, rel=1e-9) and float(found.variance) == pytest.approx(
        slope**2, rel=1e-9
    )


def test_the_neutral_window():
    found = neutral_window(C, U, 2.0, 3.0)
    assert round(found.w, 6) == -0.630283 and found.reachable
    assert not neutral_window(C, U, 10.0, 3.0).reachable
    m, V = integrated(lambda tau: 2.0, MU, MU, C + math.exp(25.0), 25.0, math.log(3.0))
    m, V = integrated(lambda tau: found.w, MU, m, V, math.log(3.0), -14.0)
    assert abs(V / C - 1) < 1e-4 and m == pytest.approx(1.930391, rel=1e-4)


def test_the_neutral_line():
    found = neutral_linear(C, U, 0.02, 50.0)
    assert found.reachable and -1 < found.w < 0
    far = math.log(50.0)
    _, V = integrated(lambda tau: found.w + 0.02 * tau, MU, MU, C + 50, far, -14.0)
    assert abs(V / C - 1) < 1e-4
    limit = (math.log(U / C) - math.log((U + 50) / (C + 50))) / (U * math.log1p(50 / U) - C * math.log1p(50 / C))
    assert (
        neutral_linear(C, U, limit * 0.999, 50.0).reachable and not neutral_linear(C, U, limit * 1.001, 50.0).reachable
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: closed_form(MU, 0.0, U, 1), "c: expected variances above 0, got 0.0"),
        (lambda: closed_form(MU, C, -1.0, 1), "u: expected variances above 0, got -1.0"),
        (lambda: closed_form(math.nan, C, U, 1), "mu: expected finite values, got nan"),
        (lambda: closed_form(MU, C, U, "1"), "w: expected a number or a tensor, got '1'"),
        (lambda: closed_form(MU, C, U, 1, "pde"), "process: expected one of ode, sde, tilted, got 'pde'"),
        (lambda: closed_form(MU, U, C, 2, "tilted"), "w: expected weights at which (1 + w) u > w c, got 2.0"),
        (
            lambda: closed_form(torch.ones(2), torch.ones(3), U, 1),
            "mu, c, u, w: expected shapes that broadcast, got (2,), (3,)",
        ),
        (lambda: recursion(grid_of([2, 0]), 1.0, MU, torch.ones(3), torch.ones(2)), "mu, c, u: expected shapes that"),
        (
            lambda: recursion(grid_of([2, 0]), 1.0, MU, C, U, "noisy"),
            "start: expected one of exact, noise, got 'noisy'",
        ),
        (lambda: recursion(grid_of([2, 0]), 1.0, MU, C, U, method="dpm"), "method: expected one of ddim, euler, heun"),
        (lambda: recursion(grid_of([2, 0]), 1.0, MU, C, U, eta=2), "eta: expected a number in [0, 1], got 2"),
        (lambda: recursion([2, 0], 1.0, MU, C, U), "grid: expected a Grid, got [2, 0]"),
        (lambda: neutral_window(U, C, 2, 3), "u: expected a variance above c (2), as guidance widens"),
        (lambda: neutral_window(C, U, 2, 0), "tau: expected a number > 0, got 0"),
        (lambda: neutral_window(C, U, math.inf, 3), "w_plus: expected a finite number, got inf"),
        (lambda: neutral_linear(C, C, 1, 3), "u: expected a variance above c (0.4), as guidance widens"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=re.escape(message)):
        make()
