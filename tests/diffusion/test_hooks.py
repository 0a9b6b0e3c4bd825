# SPDX-License-Identifier: Apache-2.0
"""Guidance with one weight per sample, and with annealed prompts: compared with their equations, for any split."""

import re

import pytest
import torch

from fastdistill.diffusion.flow import FlowSchedule
from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Guidance
from fastdistill.diffusion.guided import sample
from fastdistill.diffusion.hooks import score_scale
from fastdistill.diffusion.sampler import initial_noise
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.errors import InputError
from fastdistill.ops.philox import CONDITION, normal
from tests.harness import EPS64, assert_alike

SCHEDULE = NoiseSchedule.cosine(100)
GRID = Grid.karras(SCHEDULE, 8, 20.0, 0.1)
KINDS = ("epsilon", "sample", "v_prediction")


def linear_model(kind, grid=GRID):
    """x_0 = prompt x / (1 + sigma^2), as a prediction of this type; prompts [B, 1]."""
    level = {int(t): (float(a), float(b)) for t, a, b in zip(grid.times, grid.signal, grid.noise, strict=False)}

    def model(x, t, encoder_hidden_states):
        a, b = level[int(t[0])]
        x0 = encoder_hidden_states * a * x
        eps = (x - a * x0) / b
        return {"epsilon": eps, "sample": x0, "v_prediction": a * eps - b * x0}[kind]

    return model


@pytest.mark.parametrize("kind", [*KINDS, "flow_prediction"])
def test_the_scale_makes_a_difference_of_predictions_one_of_scores(kind):
    schedule = FlowSchedule(100) if kind == "flow_prediction" else SCHEDULE
    a, b, p, q = schedule.coefficients(kind).double().unbind(1)
    of_x0 = (p - q * a / b).abs()  # at one x a difference of x_0 is -b / a times that of eps
    wanted = (a / b) ** 2  # the score of x / a is (x_0 - x / a) / sigma^2
    assert bool(((score_scale(a, b, p, q) * of_x0 - wanted).abs() <= 16 * EPS64 * wanted).all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_power_law_weighs_each_sample_by_its_score_difference(kind):
    law, model, null = Guidance.power_law(1.5, 0.7), linear_model(kind), torch.full((1, 1), 0.3)
    noise, rows = initial_noise(0, torch.arange(3), (2, 2)), torch.tensor([0.9, 0.5, 0.1])[:, None, None]

    def literal(x, prompts):
        for a, b, after, less, t in zip(
            GRID.signal, GRID.noise, GRID.signal[1:], GRID.noise[1:], GRID.times, strict=False
        ):
            a, b, after, less = float(a), float(b), float(after), float(less)
            conditional, unconditional = (model(x, t.expand(3), y.to(x.dtype)) for y in (prompts, null))
            p, q = {"epsilon": (0, 1), "sample": (1, 0), "v_prediction": (-b, a)}[kind]
            noises = [(a * out - p * x) / (a * q - b * p) for out in (conditional, unconditional)]
            w = 1.5 * (-(noises[0] - noises[1]) / (b / a)).flatten(1).norm(dim=1) ** 0.7
            eps = noises[0] + w[:, None, None] * (noises[0] - noises[1])
            x = after * (x - b * eps) / a + less * eps
        return x

    found = sample(model, noise, rows, null, GRID, guidance=law, prediction_type=kind)
    assert_alike(found, literal(noise, rows), literal(noise.double(), rows.double()))
    assert law.evaluations(GRID) == 16 and Guidance.power_law(0, 1).evaluations(GRID) == 8


def test_a_power_of_0_is_a_constant():
    x, prompts = initial_noise(0, torch.arange(3), (2, 2)), torch.rand(3, 1, 1)
    given = linear_model("v_prediction"), x, prompts, torch.zeros(1, 1), GRID
    law, constant = (sample(*given, guidance=g, prediction_type="v_prediction") for g in ("power:2.5^0", 2.5))
    assert law.equal(constant)


def test_prompts_are_annealed_as_the_paper_has_it():
    cads = Guidance.cads(2, 0.4, 0.8, 0.3, 0.75)
    prompts, rows = torch.randn(2, 5, 3, dtype=torch.float64).float(), torch.tensor([4, 9])
    seed, step = torch.tensor(7), torch.tensor(3)
    assert cads.annealed(prompts, 0.4, seed, step, rows) is prompts
    for clock, gamma in ((0.5, 0.75), (0.8, 0.0), (1.0, 0.0)):
        n = normal(seed, step, rows, (15,), stream=CONDITION).view(2, 5, 3)

        def literal(y, gamma=gamma, n=n):
            found = gamma**0.5 * y + 0.3 * (1 - gamma) ** 0.5 * n.to(y.dtype)
            for row, source in zip(found, y, strict=True):
                moved = (row - row.mean()) / row.std() * source.std() + source.mean()
                row.copy_(0.75 * moved + 0.25 * row)
            return found

        assert_alike(cads.annealed(prompts, clock, seed, step, rows), literal(prompts), literal(prompts.double()))


def test_banks_of_embeddings_are_noised_and_others_stay():
    cads = Guidance.cads(0, 0.0, 1.0, 1.0)
    banks = {
        "time_ids": torch.rand(2, 6),
        "text_embeds": torch.rand(2, 4),
        "encoder_hidden_states": torch.rand(2, 3, 4),
    }
    key, rows = torch.tensor(0), torch.arange(2)
    found = cads.annealed(banks, 0.5, key, key, rows)
    assert list(found) == list(banks) and found["time_ids"] is banks["time_ids"]
    noise = normal(key, key, rows, (16,), stream=CONDITION)
    assert not found["text_embeds"].equal(banks["text_embeds"])
    alone = cads.annealed(banks["encoder_hidden_states"], 0.5, key, key, rows)
    assert found["encoder_hidden_states"].equal(alone) and not noise[:, 12:].equal(noise[:, :4])
    constant = cads.annealed(torch.ones(2, 1), 1.0, key, key, rows)
    assert constant.equal(torch.ones(2, 1))  # one element has its own mean and no deviation
    with pytest.raises(InputError, match=re.escape("prompts: expected embeddings (encoder_hidden_states")):
        cads.annealed({"class_labels": torch.zeros(2, dtype=torch.int64)}, 0.5, key, key, rows)


@pytest.mark.parametrize(
    "guidance", ["power:0.5^0.9", "cads:0.2..0.9,0.5,0.5:2@1,0", "cads:0.2..0.9,0.5,1:power:1^0.5"]
)
@pytest.mark.parametrize("method", ["ddim", "heun"])
def test_a_row_is_the_same_in_any_batch(guidance, method):
    x = initial_noise(0, torch.arange(5), (2, 3))
    calls = []

    def model(x, t, encoder_hidden_states):
        calls.append(len(x))
        return torch.tanh(x + encoder_hidden_states[:, :1])

    def of(rows):
        prompts = torch.linspace(-1, 1, 15).view(5, 3)[rows][:, None]
        return sample(model, x[rows], prompts, torch.zeros(1, 3), GRID, method=method, guidance=guidance, rows=rows)

    together, parts = of(torch.arange(5)), [of(torch.tensor(rows)) for rows in ([3], [0, 1], [4, 2])]
    assert torch.cat(parts).equal(together[[3, 0, 1, 4, 2]])
    assert sum(calls) == 10 * Guidance.parse(guidance).evaluations(GRID, 2 if method == "heun" else 1)
