# SPDX-License-Identifier: Apache-2.0
"""Sampling with a schedule of guidance: compared with the exact recursion, ddim and diffusers; passes are counted."""

import math
import re

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from fastdistill.diffusion.distortion import recursion
from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Guidance
from fastdistill.diffusion.guided import sample
from fastdistill.diffusion.sampler import ddim, initial_noise
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.errors import InputError
from tests.harness import EPS64, assert_alike

MU, C, U = 1.3, 0.4, 2.0
SCHEDULE = NoiseSchedule.cosine(100)
GRIDS = {
    "trailing": Grid.trailing(SCHEDULE, 12),
    "karras": Grid.karras(SCHEDULE, 12, 30.0, 0.05),
    "flow": Grid.flow(12, 3.0),
}
WINDOW = Guidance.window(3, -1, 2.0, 0.5)


def exact_model(grid, kind, calls=None):
    """The exact prediction for a Gaussian on a grid; prompts are 1, the null prompt is 0; times identify the level."""
    level = {
        float(t): (float(a), float(b)) for t, a, b in zip(grid.times.float(), grid.signal, grid.noise, strict=False)
    }

    def model(x, t, encoder_hidden_states):
        if calls is not None:
            calls.append(len(x))
        a, b = level[float(t[0])]
        c, mu = U + (C - U) * encoder_hidden_states, MU * encoder_hidden_states
        x0 = (a * c * x + b**2 * mu) / (a**2 * c + b**2)
        eps = b * (x - a * mu) / (a**2 * c + b**2)
        return {"epsilon": eps, "sample": x0, "v_prediction": a * eps - b * x0, "flow_prediction": eps - x0}[kind]

    return model


def run(grid, x, kind="v_prediction", calls=None, **arguments):
    ones, null = torch.ones(len(x), 1, dtype=x.dtype), torch.zeros(1, dtype=x.dtype)
    return sample(exact_model(grid, kind, calls), x, ones, null, grid, prediction_type=kind, **arguments)


@pytest.mark.parametrize("method", ["ddim", "euler", "heun"])
@pytest.mark.parametrize("grid", GRIDS)
def test_two_samples_give_the_recursion(grid, method):
    at = GRIDS[grid]
    start = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    kinds = ["v_prediction", "sample", "flow_prediction", *(["epsilon"] if at.signal[0] > 0 else [])]
    for kind in kinds:
        end = run(at, start, kind, method=method, guidance=WINDOW)
        found = recursion(at, WINDOW, MU, C, U, "noise", method)
        scale = float((at.signal[0] ** 2 + at.noise[0] ** 2).sqrt())
        rounding = 64 * EPS64 * float(at.sigma[at.sigma.isfinite()].max())  # x_0 = (x - b eps) / a loses sigma's digits
        assert float(end[0]) == pytest.approx(float(found.mean), rel=rounding)
        assert float((end[1] - end[0]) * scale) ** 2 == pytest.approx(float(found.variance), rel=rounding)


@pytest.mark.parametrize(("method", "eta"), [("ddim", 1.0), ("heun", 1.0), ("ancestral", 1.0), ("ancestral", 0.5)])
@pytest.mark.parametrize("grid", GRIDS)
def test_samples_have_the_moments_of_the_recursion(grid, method, eta):
    at, n = GRIDS[grid], 20_000
    x = initial_noise(3, torch.arange(n), (1,)).double()
    end = run(at, x, method=method, guidance=1.0, eta=eta, seed=5)
    found = recursion(at, 1.0, MU, C, U, "noise", method, eta)
    variance = float(found.variance)
    assert abs(float(end.mean() - found.mean)) < 4 * math.sqrt(variance / n)
    assert abs(float(end.var()) / variance - 1) < 4 * math.sqrt(2 / n)


@pytest.mark.parametrize("method", ["ddim", "heun", "ancestral"])
@pytest.mark.parametrize("guidance", ["0", "-1", "2", "3@2,-1@0.5,0", "0@2,3@0.5,0"])
def test_as_many_passes_as_the_schedule_says(method, guidance):
    grid, calls = GRIDS["karras"], []
    run(grid, torch.zeros(2, 1), calls=calls, method=method, guidance=guidance)
    assert sum(calls) == 2 * Guidance.parse(guidance).evaluations(grid, 2 if method == "heun" else 1)


def test_weights_of_one_pass_are_the_prompts_or_the_null_prompt_to_the_bit():
    grid, x = GRIDS["flow"], initial_noise(0, torch.arange(3), (1,))
    model = exact_model(grid, "flow_prediction")
    for w, row in ((0.0, 1.0), (-1.0, 0.0)):
        alone = sample(model, x, torch.full((3, 1), row), None, grid, prediction_type="flow_prediction")
        assert run(grid, x, "flow_prediction", guidance=w).equal(alone)


@pytest.mark.parametrize("method", ["ddim", "heun", "ancestral"])
def test_a_row_does_not_depend_on_its_batch(method):
    grid, x = GRIDS["karras"], initial_noise(0, torch.arange(5), (2, 3))
    seen = []

    def model(x, t, encoder_hidden_states):
        return torch.tanh(x + encoder_hidden_states[:, :, None])

    def of(rows):
        prompts = torch.linspace(-1, 1, 5)[rows][:, None]
        return sample(
            model, x[rows], prompts, torch.zeros(1), grid, method=method, guidance=WINDOW, rows=rows, seed=7,
            callback=lambda index, t, state: seen.append((index, t)),
        )  # fmt: skip

    together, parts = of(torch.arange(5)), [of(torch.tensor(rows)) for rows in ([3], [0, 1], [4, 2])]
    assert torch.cat(parts).equal(together[[3, 0, 1, 4, 2]])
    assert seen[: len(grid)] == list(enumerate(grid.times.tolist()))


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_constant_is_ddim(clip):
    x = initial_noise(0, torch.arange(4), (6,))
    prompts = torch.linspace(-1, 1, 4)[:, None]

    def model(x, t, encoder_hidden_states):
        assert t.dtype == torch.int64
        return torch.tanh(0.7 * x + encoder_hidden_states + t[:, None] / 100)

    def both(dtype):
        arguments = {"prediction_type": "v_prediction", "clip_sample": clip}
        given = model, x.to(dtype), prompts.to(dtype), torch.zeros(1, dtype=dtype)
        theirs = ddim(*given, SCHEDULE, steps=12, guidance_scale=3.5, **arguments)
        return sample(*given, GRIDS["trailing"], guidance=2.5, **arguments), theirs

    ours, eager = both(torch.float32)
    assert_alike(ours, eager, both(torch.float64)[1])


def test_flow_is_diffusers_euler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    grid = Grid.of(scheduler, 8)

    def model(x, t, encoder_hidden_states):
        assert t.dtype == torch.float32
        return torch.tanh(0.7 * x + encoder_hidden_states + t[:, None] / 1000)

    prompts = torch.linspace(-1, 1, 4)[:, None]

    def theirs(x):
        scheduler.set_timesteps(8)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t.expand(4), prompts.to(x.dtype)), t, x, return_dict=False)[0].to(x.dtype)
        return x

    x = initial_noise(0, torch.arange(4), (6,))
    ours = sample(model, x, prompts, None, grid, prediction_type="flow_prediction")
    truth = sample(model, x.double(), prompts.double(), None, grid, prediction_type="flow_prediction")
    assert_alike(ours, theirs(x), truth)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"null_prompt": None}, "null_prompt: expected a row, for a guidance_scale of 4.0, got None"),
        ({"x": torch.zeros(2)}, "x: expected floating point [B, ...], got torch.float32 (2,)"),
        ({"method": "dpm"}, "method: expected one of ddim, euler, heun, ancestral, got 'dpm'"),
        ({"grid": [3, 2]}, "grid: expected a Grid, got [3, 2]"),
        ({"guidance": "8@99,0"}, "the ends of the levels, got 99 in"),
        ({"eta": -1}, "eta: expected a number in [0, 1], got -1"),
        ({"clip_sample": 0}, "clip_sample: expected a limit above 0, or None, got 0"),
        ({"prediction_type": "eps"}, "prediction_type: expected one of epsilon, sample"),
        (
            {"grid": GRIDS["flow"], "prediction_type": "epsilon"},
            "prediction_type: expected one that determines x_0 at (signal, noise) = (0.0, 1.0), got epsilon",
        ),
        ({"grid": Grid(*torch.tensor([[1, 1.0], [2, 1]]), *torch.ones(2, 1)), "guidance": 1, "method": "heun"},
         "grid: expected one that ends at sigma = 0, for heun"),
        ({"rows": torch.arange(3)}, "rows: expected int64 row numbers [2]"),
        ({"prompts": torch.zeros(3, 1)}, "prompts: expected rows [2 (batch of x_T), ...], got (3, 1)"),
    ],
)  # fmt: skip
def test_bad_input(changes, message):
    given = {
        "x": torch.zeros(2, 1),
        "prompts": torch.zeros(2, 1),
        "null_prompt": torch.zeros(1),
        "grid": GRIDS["karras"],
    }
    given |= {"guidance": WINDOW} | changes
    with pytest.raises(InputError, match=re.escape(message)):
        sample(lambda *_, **__: pytest.fail("evaluated"), **given)
