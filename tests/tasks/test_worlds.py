# SPDX-License-Identifier: Apache-2.0
"""Worlds with exact scores, compared with explicit mixtures, closed forms, the recursion and quadrature."""

import math
import re

import numpy as np
import pytest
import torch

from fastdistill.diffusion.distortion import closed_form, recursion
from fastdistill.diffusion.flow import FlowSchedule
from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guided import sample
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.diffusion.spectrum import Spectrum, variance_neutral
from fastdistill.errors import InputError
from fastdistill.tasks.guidance.measure import measure
from fastdistill.tasks.guidance.worlds import Gaussian, Hypercube, RandomCentres, TwoClass
from tests.harness import EPS64

SHADES = Grid.karras(NoiseSchedule.cosine(), 30, 30.0, 0.09)
INK = 3.8743  # norm of a digit's ink; it multiplies the tint
SMALL = Grid.karras(NoiseSchedule.cosine(), 12, 20.0, 0.05)
WORLDS = {
    "gaussian": lambda levels, **o: Gaussian(levels, [1.0, -0.5, 0.3], [0.4, 1.0, 0.1], [2.0, 1.5, 0.1], **o),
    "two_class": lambda levels, **o: TwoClass(levels, 3, 0.8, **o),
    "hypercube": lambda levels, **o: Hypercube(levels, 3, 0.8, **o),
    "random_centres": lambda levels, **o: RandomCentres(levels, 3, 5, m=0.8, **o),
}


def centres(world):
    """All classes, as [K, d]."""
    return world.m * world.prompts(torch.arange(world.classes))


@pytest.mark.parametrize("kind", ["two_class", "hypercube", "random_centres"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_the_null_prompt_is_the_mixture_of_all_classes(kind, prediction_type):
    """Its score equals the derivative of the logarithm of the density."""
    world = WORLDS[kind](NoiseSchedule.cosine(50), prediction_type=prediction_type)
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for t in (3, 25, 45):
        a, b = NoiseSchedule.cosine(50).signal[t], NoiseSchedule.cosine(50).noise[t]
        v = a**2 * world.s**2 + b**2
        for prompt, of in (
            (torch.zeros(3), centres(world)),
            (world.prompts(torch.tensor([1]))[0], centres(world)[1:2]),
        ):
            log_density = (-(x[:, None] - a * of).square().sum(2) / (2 * v)).logsumexp(1).sum()
            (score,) = torch.autograd.grad(log_density, x)
            eps, x0 = -b * score, (x + b**2 * score) / a
            wanted = {"epsilon": eps, "sample": x0, "v_prediction": a * eps - b * x0, "flow_prediction": eps - x0}
            found = world(x.detach(), t, prompt.expand(6, 3)).sample
            scale = (x0.abs().max() + eps.abs().max()) / b  # eps is computed from x_0
            assert (found - wanted[prediction_type]).abs().max() < 64 * EPS64 * scale / a


@pytest.mark.parametrize("kind", WORLDS)
def test_a_call_is_that_of_a_denoiser(kind):
    world = WORLDS[kind](SMALL)
    x, prompts = torch.randn(4, 3), world.prompts(torch.arange(4))
    together = world(x, SMALL.times[2], encoder_hidden_states=prompts).sample
    assert together.dtype == x.dtype and together.shape == x.shape
    assert world(x, SMALL.times[2].expand(4), prompts, return_dict=False)[0].equal(together)
    mixed = prompts.clone()
    mixed[1:3] = 0
    one, null = (world(x, SMALL.times[2], p).sample for p in (mixed, torch.zeros_like(prompts)))
    assert one[[0, 3]].equal(together[[0, 3]]) and one[1:3].equal(null[1:3]) and not one.equal(together)
    with pytest.raises(InputError, match=r"timestep: expected times of the levels, got 7\.25"):
        world(x, 7.25, prompts)


def test_far_from_all_classes_nothing_overflows():
    for world in (TwoClass(SMALL, 900, 3.0), Hypercube(SMALL, 900, 3.0), RandomCentres(SMALL, 900, 7, m=3.0)):
        x = 1e6 * torch.ones(2, 900, dtype=torch.float64)
        assert world(x, SMALL.times[-1], torch.zeros(2, 900)).sample.isfinite().all()


def test_equal_worlds():
    """One dimension has two corners; two classes differ along one direction in any dimension; a rotated Gaussian."""
    random = torch.Generator().manual_seed(2)
    x = torch.randn(50, 1, dtype=torch.float64, generator=random)
    null = torch.zeros(50, 1)
    one, other = (kind(SMALL, 1)(x, SMALL.times[4], null).sample for kind in (TwoClass, Hypercube))
    assert one.equal(other)
    wide = torch.randn(50, 9, dtype=torch.float64, generator=random)
    line = wide.sum(1, keepdim=True) / 3
    far = TwoClass(SMALL, 9, 1.0)(wide, SMALL.times[4], torch.zeros(50, 9)).sample.sum(1, keepdim=True) / 3
    assert (
        far - TwoClass(SMALL, 1, 3.0)(line, SMALL.times[4], null).sample
    ).abs().max() < 64 * EPS64 * line.abs().max()
    turn, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=random))
    laws = [[1.0, -0.5, 0.3], [0.4, 1.0, 0.1], [2.0, 1.5, 0.1]]
    straight, turned = (measure(Gaussian(SMALL, *laws, basis=basis), SMALL, 1.5) for basis in (None, turn))
    assert straight.expected == turned.expected
    assert abs(turned.found.mean - turned.expected.mean) < 4 * turned.standard_error.mean
    assert abs(turned.found.variance - turned.expected.variance) < 4 * turned.standard_error.variance


@pytest.mark.parametrize("method", ["ddim", "heun", "ancestral"])
@pytest.mark.parametrize("grid", [SMALL, Grid.flow(10, 3.0)], ids=["karras", "flow"])
@pytest.mark.parametrize("kind", WORLDS)
def test_measured_moments_are_the_expected_ones(kind, grid, method):
    world = WORLDS[kind](grid)
    guidance = "2@2,-1@0.5,0" if kind == "gaussian" else 0.0
    found = measure(world, grid, guidance, method=method, samples=4096)
    assert found.source == "recursion"
    for name in ("mean", "variance"):
        error = getattr(found.found, name) - getattr(found.expected, name)
        assert abs(error) < 4 * getattr(found.standard_error, name)
    assert found.shift == found.separation - 1
    if kind != "gaussian":
        assert measure(world, grid, 1.0, method=method, samples=64).expected is None


@pytest.mark.parametrize(("method", "process"), [("heun", "ode"), ("ancestral", "sde")])
def test_many_steps_give_the_closed_form(method, process):
    grid = Grid.flow(100)
    found = measure(Gaussian(grid, 1.3, 0.4, 2.0), grid, 1.0, method=method, limit=True, samples=8192)
    exact = closed_form(1.3, 0.4, 2.0, 1.0, process)
    assert found.source == "closed_form" and found.expected.mean == pytest.approx(float(exact.mean))
    steps = recursion(grid, 1.0, 1.3, 0.4, 2.0, "noise", method)  # how far this number of steps is from the limit
    for name in ("mean", "variance"):
        error = getattr(found.found, name) - getattr(found.expected, name)
        limit = abs(float(getattr(steps, name) - getattr(exact, name)))
        assert abs(error) < 4 * getattr(found.standard_error, name) + limit


def quadrature(guidance, dimension=3, n=400):
    """Separation, variance ratio and accuracy of a hypercube on the grid of the shades. Coordinates are independent,
    and the sampler's map of one is monotone, so n quantiles of the noise are enough."""
    world = Hypercube(SHADES, 1, INK, 0.7 * INK)
    x = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]
    end = sample(world, x, torch.ones(n, 1), torch.zeros(1), SHADES, guidance=guidance, prediction_type="v_prediction")
    y = (end / INK).sort(0).values[:, 0]
    at = float(np.interp(0.0, y, np.linspace(0.5 / n, 1 - 0.5 / n, n), left=0.0, right=1.0))  # P(y < 0)
    return float(y.mean()), float(y.var()) / 0.49, (1 - at) ** dimension


def test_the_known_numbers_of_two_classes_on_the_shades_grid():
    """Also the goal: a window restores at least .55 of the variance that a constant with its separation loses."""
    constants = np.array([quadrature(w) for w in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)])
    exact = recursion(SHADES, 0.0, INK, 0.49 * INK**2, 1.0, "noise")
    assert constants[0, 0] == pytest.approx(float(exact.mean) / INK, rel=1e-3)
    assert constants[0, :2] == pytest.approx([0.914, 0.902], abs=3e-3) and abs(constants[0, 2] - 0.767) < 3e-3

    def recovered(schedule):
        separation, variance, right = quadrature(schedule)
        found = []
        for value, column in ((separation, 0), (right, 2)):
            order = np.argsort(constants[:, column])
            constant = np.interp(value, constants[order, column], constants[order, 1])
            found.append((variance - constant) / (constants[0, 1] - constant))
        return found

    early, half = recovered("4@8,-1@2,0"), recovered("4@10,-0.5@2,0")
    assert early[0] == pytest.approx(0.60, abs=0.01) and half[0] == pytest.approx(0.60, abs=0.01)
    assert 0.26 < early[1] < 0.31 and 0.26 < half[1] < 0.31
    assert early[0] >= 0.55


def test_the_window_solved_for_gaussians_is_a_good_one_for_classes():
    """Solved for variances c and u of a coordinate as if all were Gaussian. For classes it restores less than all of
    the variance, but it is as far above the constants as windows found by trial."""
    solved = variance_neutral(Spectrum.of(0.49 * INK**2, 1.49 * INK**2), SHADES, 4.0)
    assert solved.reachable and abs(solved.ratio - 1) < 1e-9
    separation, variance, _ = quadrature(solved.schedule)
    constants = np.array([quadrature(w) for w in (0.0, 0.5, 1.0, 1.5, 2.0)])
    constant = np.interp(separation, constants[:, 0], constants[:, 1])
    assert separation > 1.5 * constants[0, 0] and variance > 0.7 * constants[0, 1]
    assert (variance - constant) / (constants[0, 1] - constant) > 0.5


def test_samples_of_a_hypercube_are_those_of_one_coordinate():
    found = measure(Hypercube(SHADES, 3, INK, 0.7 * INK), SHADES, "4@8,-1@2,0", samples=4096)
    separation, ratio, right = quadrature("4@8,-1@2,0")
    assert abs(found.separation - separation) < 4 * found.standard_error.mean / INK
    assert abs(found.variance_ratio - ratio) < 4 * found.standard_error.variance / (0.49 * INK**2)
    assert abs(found.right - right) < 4 * math.sqrt(right * (1 - right) / 4096)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TwoClass([3, 2], 4), "levels: expected a Grid or a schedule, got [3, 2]"),
        (lambda: Hypercube(SMALL, 0), "dimension: expected at least 1 direction, got 0"),
        (lambda: Hypercube(SMALL, 2, m=-1), "m: expected a finite number > 0, got -1"),
        (lambda: TwoClass(SMALL, 2, s=math.inf), "s: expected a finite number > 0, got inf"),
        (lambda: RandomCentres(SMALL, 2, 0), "classes: expected at least 1 class, got 0"),
        (lambda: Gaussian(SMALL, 1.0, 0.0, 1.0), "c: expected variances above 0, got 0.0"),
        (lambda: Gaussian(SMALL, [1.0, 2.0], 1.0, 1.0, basis=torch.ones(2, 2)), "basis: expected orthonormal columns"),
        (lambda: TwoClass(FlowSchedule(), 2, prediction_type="eps"), "prediction_type: expected one of epsilon"),
        (lambda: TwoClass(SMALL, 2)(torch.zeros(3, 4), 1.0, torch.zeros(3, 2)), "sample: expected states [B, 2]"),
        (lambda: measure(TwoClass(SMALL, 2), SMALL, samples=32), "samples: expected at least 2 in each of 32 groups"),
        (lambda: measure(TwoClass(SMALL, 2), SMALL, groups=1), "groups: expected at least 2, got 1"),
        (lambda: measure(lambda x: x, SMALL), "world: expected a World, got function"),
        (
            lambda: measure(Gaussian(SMALL, 1, 1, 2), SMALL, "2@2,0", limit=True),
            "guidance: expected a constant w, for a closed form, got 2@2,0",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=re.escape(message)):
        make()
