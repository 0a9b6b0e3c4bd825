# SPDX-License-Identifier: Apache-2.0
"""p(t) measured by how much the teacher's output depends on the prompt."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.data.latent_cache import LatentCache, generate_latent_cache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.diffusion.flow import FlowSchedule
from fastdistill.distill import RandomConditioning, Weights
from fastdistill.distill.measured import Measurement, prompt_dependence
from fastdistill.errors import InputError
from fastdistill.train import DistillTrainer
from fastdistill.train.state import state_of
from tests import tiny
from tests.train.ranks import Interrupted, stop_after

MEASURED = RandomConditioning("measured", {"samples": 8, "points": 5}, weights=Weights(1.0, 0.0, 0.0))


def made(objective: Any = MEASURED, **options: Any) -> Any:
    data = options.pop("schedule", tiny.SCHEDULE), tiny.cache(), options.pop("bank", tiny.bank())
    kind = {"prediction_type": options.pop("prediction_type", None)}
    config = {"batch": 4, "steps": 12, "lr": 1e-3, "checkpoint_every": 5} | options
    return DistillTrainer(tiny.Net(seed=1), tiny.Net(seed=2), *data, objective, config, **kind)


def test_the_table_is_the_relative_distance_between_the_points() -> None:
    found = Measurement(points=2, samples=1, power=2.0).probability(torch.tensor([1.0, 2.0]), 8)
    assert Measurement(points=2).timesteps(8) == [2, 6]
    expected = torch.tensor([0.25, 0.25, 0.25, 0.390625, 0.5625, 0.765625, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not Measurement().probability(torch.zeros(20), 100).any()
    assert Measurement(points=20).timesteps(1) == [0]
    assert Measurement().probability(torch.tensor([3.0]), 1).tolist() == [1.0]
    with pytest.raises(InputError, match="teacher: expected finite outputs"):
        Measurement().probability(torch.tensor([math.nan]), 4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_the_distance_is_that_of_clean_samples(prediction: str) -> None:
    """Compared with the clean samples, for the latents, prompts and noise that were drawn."""
    flow = prediction == "flow_prediction"
    run = made(schedule=FlowSchedule(50, 1.0) if flow else tiny.SCHEDULE, prediction_type=prediction)
    setting, seen = run._setting, []
    predict = setting.predictors[0]

    def spy(x_t: Tensor, timestep: Tensor, prompt: Any, condition: Any = None) -> Tensor:
        seen.append((x_t.clone(), timestep.clone(), prompt.clone()))
        return predict(x_t, timestep, prompt, condition)

    spy.model = predict.model  # type: ignore[attr-defined]
    spy.dtype = predict.dtype  # type: ignore[attr-defined]
    setting.__dict__["predictors"] = (spy, setting.predictors[1])
    measurement = Measurement(points=5, samples=8)
    found = prompt_dependence(setting, measurement, 3)
    levels = setting.schedule.coefficients(prediction).double()
    for i, t in enumerate(measurement.timesteps(50)):
        s, n, a, b = levels[t]
        total = 0.0
        for (x, at, one), (same, _, other) in zip(
            seen[4 * i : 4 * i + 4 : 2], seen[4 * i + 1 : 4 * i + 4 : 2], strict=True
        ):
            assert torch.equal(x, same) and at.unique().tolist() == [t]
            clean = []
            for prompt in (one, other):
                y = predict(x, at, prompt).double()
                clean.append((b * x.double() - n * y) / (s * b - n * a))
            total += float((clean[0] - clean[1]).square().flatten(1).mean(1).sum().detach())
        assert math.isclose(float(found[i]), math.sqrt(total / 8), rel_tol=1e-6)
    own = torch.cat([each[2] for each in seen[0:4:2]])
    assert not torch.equal(own, torch.cat([each[2] for each in seen[1:4:2]]))


def test_the_measurement_follows_from_the_seed_alone() -> None:
    def of(seed: int, **options: Any) -> Tensor:
        return prompt_dependence(made(**options)._setting, Measurement(points=5, samples=8), seed)

    assert torch.equal(of(1), of(1)) and not torch.equal(of(1), of(2))
    for options in ({"batch": 8}, {"micro_batch": 2}):
        torch.testing.assert_close(of(1), of(1, **options), rtol=1e-5, atol=0)


def test_a_run_measures_once_and_draws_by_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made()
    whole.fit(tmp_path / "whole")
    objective = whole.step.objective
    table = objective.common["replace"]
    distance = prompt_dependence(whole._setting, Measurement(5, 8), 0)
    assert torch.equal(objective.common["prompt_dependence"], distance)
    expected = (Measurement(5, 8).probability(distance, 50) * 2.0**32).floor().to(torch.int64)
    assert torch.equal(table, expected) and int(table.max()) == 2**32

    with pytest.raises(Interrupted):
        made().fit(tmp_path / "run", progress=stop_after(8))
    again = made()
    calls = []
    monkeypatch.setattr("fastdistill.distill.measured.prompt_dependence", lambda *given: calls.append(given))
    again.fit(tmp_path / "run")
    assert not calls
    for name, value in state_of(whole.step, whole.student).items():
        assert torch.equal(state_of(again.step, again.student)[name], value), name


def test_stored_banks_are_read_by_the_measured_table(tmp_path: Path) -> None:
    """Rows that a thread has read ahead with the previous table are read again."""
    cache, bank = tiny.cache(), tiny.bank()
    generate_latent_cache(
        tmp_path / "latents",
        lambda rows, _: cache.latents[rows],
        cache.prompt_index,
        cache.latents.shape[1:],
        torch.float32,
        {"made": "by hand"},
    )
    bank.save(tmp_path / "prompts")
    stored = LatentCache.open(tmp_path / "latents"), PromptBank.open(tmp_path / "prompts")
    states = []
    for data in ((cache, bank), stored):
        models = tiny.Net(seed=1), tiny.Net(seed=2)
        run = DistillTrainer(*models, tiny.SCHEDULE, *data, MEASURED, {"batch": 4, "steps": 6, "lr": 1e-3})
        run.fit()
        states.append(state_of(run.step, run.student))
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name


def test_what_cannot_be_measured_is_refused() -> None:
    for parameters, message in (
        ({"rate": 5.0}, "p\\(t\\) measured: expected parameters among points, samples, power, got rate"),
        ({"points": 1.0}, "points: expected a whole number, 2 to 65536, got 1.0"),
        ({"points": math.nan}, "parameters.points: input should be a finite number, got nan"),
        ({"samples": math.inf}, "parameters.samples: input should be a finite number, got inf"),
        ({"samples": 65537.0}, "samples: expected a whole number, 1 to 65536, got 65537.0"),
        ({"samples": 0.5}, "samples: expected a whole number, 1 to 65536, got 0.5"),
        ({"power": 0.0}, "power: expected a finite number > 0, got 0.0"),
    ):
        with pytest.raises(InputError, match=message):
            made(RandomConditioning("measured", parameters, weights=Weights(1.0, 0.0, 0.0)))
    with pytest.raises(
        InputError, match=r"probability: expected one of exp, .*, const, measured, or.*; did you mean meas"
    ):
        made(RandomConditioning("mesured", weights=Weights(1.0, 0.0, 0.0)))
    with pytest.raises(InputError, match="probability: expected a p\\(t\\) that is known before"):
        MEASURED.p(10)
