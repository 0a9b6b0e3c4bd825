# SPDX-License-Identifier: Apache-2.0
"""Schedules of guidance: where each weight applies, the cost of a step, and texts that are parsed back."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Guidance
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.errors import InputError

SIGMAS = [math.inf, 20.0, 10.0, 8.0, 2.0, 1.0, 0.0]


def grid_of(sigmas):
    """Levels with these sigmas; infinity means no signal."""
    sigma = torch.tensor(sigmas, dtype=torch.float64)
    count = torch.arange(len(sigmas) - 1, 0, -1, dtype=torch.float64)
    signal = sigma.isfinite().double()
    return Grid(signal, torch.where(signal > 0, sigma, 1.0), 100 * count, count / len(count))


finite = st.floats(-1e9, 1e9)
weights = st.one_of(finite, st.integers(-20, 20), st.sampled_from([0.0, -0.0, 1e-300, 1e22, 0.1 + 0.2]))


@st.composite
def schedules(draw):
    kind = draw(st.sampled_from(["constant", "linear", "interval", "window", "sigma", "t", "step", "power", "cads"]))
    if kind == "constant":
        return Guidance.constant(draw(weights))
    if kind == "linear":
        return Guidance.linear(draw(weights), draw(weights))
    if kind == "power":
        return Guidance.power_law(draw(weights), draw(st.floats(-0.99, 1e3)))
    if kind == "cads":
        ends = sorted(draw(st.lists(st.floats(0, 1), min_size=2, max_size=2, unique=True)))
        base = draw(schedules().filter(lambda base: not str(base).startswith("cads")))
        return Guidance.cads(base, *ends, draw(st.floats(0, 1e9)), draw(st.floats(0, 1)))
    if kind in ("interval", "window"):
        low, high = sorted(draw(st.lists(st.floats(0, 1e4), min_size=2, max_size=2, unique=True)))
        if kind == "interval":
            return Guidance.interval(draw(weights), low, draw(st.sampled_from([high, math.inf])))
        return Guidance.window(draw(weights), draw(weights), high, low, draw(weights))
    bounds = {"sigma": st.floats(0, 1e9), "t": st.floats(0, 1), "step": st.floats(1e-6, 1)}[kind]
    thresholds = sorted(draw(st.lists(bounds, max_size=4, unique=True)), reverse=kind != "step")
    return Guidance.piecewise([(at, draw(weights)) for at in thresholds], draw(weights), by=kind)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(schedules())
def test_a_text_gives_the_schedule_back(schedule):
    assert Guidance.parse(str(schedule)) == schedule
    assert Guidance.parse(str(schedule).replace("@", " @ ").replace(",", " , ")) == schedule


@pytest.mark.parametrize(
    ("schedule", "text", "words"),
    [
        (Guidance.constant(2), "2", "w = 2"),
        (Guidance.window(8, -1, 10, 2), "8@10,-1@2,0", "w = 8 while sigma > 10, -1 while sigma > 2, then 0"),
        (Guidance.window(6.5, -1, 0.5, by="step"), "6.5@50%,-1", "w = 6.5 until 50%, then -1"),
        (
            Guidance.interval(3, 0.25, 0.7, by="t"),
            "0@0.7t,3@0.25t,0",
            "w = 0 while t > 0.7 T, 3 while t > 0.25 T, then 0",
        ),
        (Guidance.linear(-0.5, 0.02), "linear:-0.5+0.02", "w = -0.5 + 0.02 sigma^2"),
        (Guidance.piecewise([(0.07, 1e30)], 0.1, by="step"), "1e+30@7%,0.1", "w = 1e+30 until 7%, then 0.1"),
        (Guidance.power_law(2, 0.9), "power:2^0.9", "w = 2 |Delta_s|^0.9 of each sample"),
        (
            Guidance.cads("2@3,0", 0.6, 0.9, 0.25),
            "cads:0.6..0.9,0.25,1:2@3,0",
            "w = 2 while sigma > 3, then 0, prompts noised from t = 0.6 T to 0.9 T by 0.25",
        ),
    ],
)
def test_texts_and_words(schedule, text, words):
    assert (str(schedule), schedule.describe()) == (text, words)
    assert Guidance.parse(text) == schedule and Guidance.parse(schedule) is schedule
    assert {schedule, Guidance.parse(text)} == {schedule}


def test_a_number_is_a_constant():
    assert Guidance.parse(2) == Guidance.parse(np.float32(2)) == Guidance.parse(np.int64(2)) == Guidance.constant(2)


def test_a_step_takes_the_weight_of_the_level_where_it_starts():
    grid = grid_of(SIGMAS)
    window = Guidance.window(8, -1, 10, 2)
    assert window.weights(grid).tolist() == [8, 8, -1, -1, 0, 0]  # strictly above a threshold
    assert window.scales(grid).tolist() == [9, 9, 0, 0, 1, 1]
    assert window.passes(grid).tolist() == [2, 2, 1, 1, 1, 1]
    assert Guidance.window(8, -1, 10).weights(grid).tolist() == [8, 8, -1, -1, -1, -1]
    assert Guidance.interval(3, 2, 10).weights(grid).tolist() == [0, 0, 3, 3, 0, 0]
    assert Guidance.interval(3, 2).weights(grid).tolist() == [3, 3, 3, 3, 0, 0]
    assert Guidance.window(5, -1, 0.5, by="t").weights(grid).tolist() == [5, 5, 5, -1, -1, -1]
    assert Guidance.window(5, -1, 0.5, by="step").weights(grid).tolist() == [5, 5, 5, -1, -1, -1]
    assert Guidance.interval(5, 0.3, 0.6, by="step").weights(grid).tolist() == [0, 0, 5, 5, 0, 0]
    assert Guidance.interval(5, 0.5, by="step").weights(grid).tolist() == [0, 0, 0, 5, 5, 5]
    inside = grid_of(SIGMAS[1:])
    assert Guidance.linear(-1, 0.5).weights(inside).tolist() == pytest.approx([199, 49, 31, 1, -0.5])
    assert Guidance.function(lambda t: 2 * t, by="t").weights(inside).tolist() == pytest.approx([2, 1.6, 1.2, 0.8, 0.4])
    assert [Guidance.constant(w).weights(grid).dtype for w in (0, 2)] == [torch.float64] * 2


@pytest.mark.parametrize("steps", [3, 7, 10, 30])
def test_a_share_of_the_steps_counts_steps(steps):
    grid = grid_of([*range(steps, 0, -1), 0])
    for done in range(1, steps):
        exact = Guidance.piecewise([(done / steps, 2)], 0, by="step")
        assert int((exact.weights(grid) == 2).sum()) == done


def test_evaluations_of_one_image():
    grid = grid_of(SIGMAS)
    assert Guidance.constant(0).evaluations(grid) == 6 and Guidance.constant(2).evaluations(grid) == 12
    assert Guidance.window(8, -1, 10, 2).evaluations(grid) == 8
    # Heun corrects neither the first step (from infinity) nor the last one (to the data)
    assert Guidance.window(8, -1, 10, 2).evaluations(grid, order=2) == 8 + (2 + 1 + 1 + 1)


def test_the_table_of_a_training_schedule():
    noise = NoiseSchedule.cosine(64)
    sigma = noise.noise / noise.signal
    window = Guidance.window(4, -1, 3, 0.5)
    wanted = torch.where(sigma > 3, 4.0, torch.where(sigma > 0.5, -1.0, 0.0))
    assert window.table(noise).equal(wanted.double())
    assert window.table(noise.coefficients()).equal(wanted.double())
    early = Guidance.window(4, -1, 0.5, by="t")
    assert early.table(noise).equal(early.table(noise.coefficients()))
    assert int((early.table(noise) == 4).sum()) == 31  # t = 33..63


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Guidance.constant(math.nan), "w: expected a finite weight, got nan"),
        (lambda: Guidance.constant("2"), "w: expected a finite weight, got '2'"),
        (lambda: Guidance.constant(True), "w: expected a finite weight, got True"),
        (lambda: Guidance.window(2, math.inf, 3), "w: expected a finite weight, got inf"),
        (
            lambda: Guidance.window(2, -1.5, 3, floor=-1),
            "w_minus: expected a weight of at least the floor, -1, got -1.5",
        ),
        (lambda: Guidance.window(2, -1, 3, 4), "thresholds: expected values of sigma that decrease, got 3, then 4"),
        (lambda: Guidance.window(2, -1, 3, 3), "thresholds: expected values of sigma that decrease, got 3, then 3"),
        (lambda: Guidance.window(2, -1, 0.5, 0.2, by="step"), "thresholds: expected values of step that increase"),
        (lambda: Guidance.window(2, -1, -3), "threshold: expected a finite sigma >= 0, got -3"),
        (lambda: Guidance.window(2, -1, 3, by="t"), "threshold: expected a share t/T in [0, 1], got 3"),
        (lambda: Guidance.window(2, -1, 30, by="step"), "threshold: expected a share of the steps in (0, 1], got 30"),
        (lambda: Guidance.interval(2, 3, 3), "above: expected less than below (3): the interval is empty, got 3"),
        (lambda: Guidance.piecewise([3, 2], 0), "stretches: expected pairs (threshold, weight), got [3, 2]"),
        (lambda: Guidance.piecewise([], 0, by="time"), "by: expected one of sigma, t, step, got 'time'"),
        (lambda: Guidance.linear(0, math.nan), "omega: expected a finite weight, got nan"),
        (lambda: Guidance.function(3), "f: expected a function of one number, got 3"),
        (
            lambda: Guidance.window(2, -1, 30).weights(grid_of(SIGMAS[1:])),
            "from 0 to below 20, the ends of the levels, got 30 in",
        ),
        (
            lambda: Guidance.window(2, -1, 9.5, 9).weights(grid_of(SIGMAS)),
            "a step of the grid starts, got none for w = -1 at 9 in",
        ),
        (
            lambda: Guidance.linear(0, 1).weights(grid_of(SIGMAS)),
            "a finite weight at every level (linear:0+1), got inf at sigma inf",
        ),
        (lambda: Guidance.constant(2).weights([3, 2]), "grid: expected a Grid, got [3, 2]"),
        (lambda: Guidance.constant(2).evaluations(grid_of(SIGMAS), 3), "order: expected 1 or 2, got 3"),
        (
            lambda: Guidance.window(2, -1, 0.5, by="step").table(NoiseSchedule.cosine(8)),
            "expected thresholds as sigma or t",
        ),
        (lambda: Guidance.window(2, -1, 1e9).table(NoiseSchedule.cosine(8)), "the ends of the levels, got 1e+09"),
        (
            lambda: Guidance.constant(2).table(torch.ones(8)),
            "levels: expected a schedule or coefficients [T, 4], got (8,)",
        ),
        (lambda: Guidance.parse("8@10;-1"), "column 5 should be , and the weight after the last threshold"),
        (lambda: Guidance.parse("8@10"), "column 5 should be , and the weight after the last threshold"),
        (lambda: Guidance.parse("8@10,"), "column 6 should be a number"),
        (lambda: Guidance.parse("8,2"), "column 2 should be @ and a threshold"),
        (lambda: Guidance.parse("8@5,2@30%,0"), "column 7 should be thresholds that are all sigma, all t or all %"),
        (lambda: Guidance.parse("2x"), "column 2 should be @ or the end"),
        (lambda: Guidance.parse("1e99999"), "column 7 should be @ or the end"),
        (lambda: Guidance.parse("1e999"), "w: expected a finite weight, got inf"),
        (lambda: Guidance.parse(10**400), "guidance: expected a number within float64, got int"),
        (lambda: Guidance.parse(""), "column 1 should be a number"),
        (lambda: Guidance.parse("linaer:1+2"), "did you mean linear:?"),
        (lambda: Guidance.parse("linear:1"), "column 9 should be + or - and omega"),
        (lambda: Guidance.parse("nan"), "column 1 should be a number, linear:w0+omega, power:"),
        (lambda: Guidance.power_law(2, -1), "alpha: expected a number > -1, so that guidance vanishes"),
        (lambda: Guidance.power_law(2, 1).table(NoiseSchedule.cosine(8)), "'power:2^1', a weight for each sample"),
        (lambda: Guidance.power_law(2, 1).scales(grid_of(SIGMAS)), "expected a schedule of one weight a level, got"),
        (lambda: Guidance.cads(2, 0.9, 0.6, 0.1), "tau1: expected less than tau2 (0.6), got 0.9"),
        (lambda: Guidance.cads(2, 0.6, 0.9, -1), "scale: expected a number >= 0, got -1"),
        (lambda: Guidance.cads(2, 0.6, 0.9, 1, 2), "mix: expected a number in [0, 1], got 2"),
        (lambda: Guidance.cads(Guidance.cads(2, 0, 1, 1), 0, 1, 1), "base: expected a Guidance without cads, got"),
        (lambda: Guidance.cads(2, 0, 1, 1).table(NoiseSchedule.cosine(8)), "change from step to step, for a table"),
        (lambda: Guidance.parse("power:2,3"), "column 8 should be ^ and alpha"),
        (lambda: Guidance.parse("powr:2^3"), "did you mean power:?"),
        (lambda: Guidance.parse("cads:0.6..0.9,1:2"), "column 16 should be , and mix"),
        (lambda: Guidance.parse("cads:0..1,1,1:cads:0..1,1,1:2"), "column 15 should be a schedule without cads"),
        (lambda: Guidance.parse("cads:0..1,1,1:2@3"), "column 18 should be , and the weight after the last threshold"),
        (lambda: Guidance.parse(None), "guidance: expected a schedule such as"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=re.escape(message)):
        make()
