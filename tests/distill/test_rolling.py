# SPDX-License-Identifier: Apache-2.0
"""Rolling states compared with the sampler itself."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.diffusion.flow import FlowSchedule
from fastdistill.diffusion.sampler import ddim
from fastdistill.distill import GuidanceDistillation, RandomConditioning, Rolling, Weights
from fastdistill.distill.regions import Regions
from fastdistill.distill.rolling import ROLLING
from fastdistill.errors import InputError
from fastdistill.ops import philox
from fastdistill.ops.noise_gather import NULL
from fastdistill.train import DistillTrainer
from fastdistill.train.graph import runner
from fastdistill.train.state import state_of
from tests import tiny
from tests.train.ranks import Interrupted, stop_after

STEPS, GROUPS = 5, 2  # every tenth of the 50 timesteps
ROUNDS = GROUPS * (STEPS + 1)


def made(objective: Any = None, **options: Any) -> Any:
    rolling = Rolling(**{"every": 2, "steps": STEPS, "groups": GROUPS} | options.pop("rolling", {}))
    objective = objective or RandomConditioning(weights=Weights(1.0, 0.0, 0.0), rolling=rolling)
    data = options.pop("schedule", tiny.SCHEDULE), tiny.cache(), tiny.bank()
    kind = {"prediction_type": options.pop("prediction_type", None)}
    config = {"batch": 4, "steps": 100, "lr": 1e-12} | options
    return DistillTrainer(tiny.Net(seed=1), tiny.Net(seed=2), *data, objective, config, **kind)


def drawn(run: Any, steps: int) -> list[Any]:
    """The batches of the first ``steps`` steps, each with the states after it."""
    seen, objective, steps_of = [], run.step.objective, run.step

    def spy(draw: Any, counter: Tensor, loss: Any = objective.loss) -> Any:
        kept = {name: value.clone() for name, value in objective.state.items()}
        seen.append((draw._replace(x_t=draw.x_t.clone(), timestep=draw.timestep.clone(), prompt=draw.prompt.clone(),
            choice=draw.choice.clone()), kept))  # fmt: skip
        return loss(draw, counter)

    objective.loss = spy
    for done in range(steps):
        steps_of.prepare(done)
        steps_of()
    return seen


@pytest.mark.parametrize("by", ["teacher", "student"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_trajectory_is_that_of_the_sampler(by: str, prediction: str) -> None:
    """From noise and a random prompt; at a learning rate of almost 0 the student's weights do not change."""
    run = made(rolling={"by": by, "clip_sample": 2.0}, prediction_type=prediction)
    model = run.teacher if by == "teacher" else run.student
    seen = drawn(run, 4 * ROUNDS)
    states = [draw for draw, _ in seen]
    begun = [step for step in range(GROUPS, 3 * ROUNDS) if int(states[step].timestep[0]) >= 40]
    assert begun
    for step in begun[:3]:
        visits = [states[step + GROUPS * i] for i in range(STEPS)]
        timesteps = [int(draw.timestep[0]) for draw in visits]
        assert timesteps == list(range(timesteps[0], -1, -10))
        path: list[Tensor] = []
        options: dict[str, Any] = {"steps": STEPS, "timesteps": timesteps, "clip_sample": 2.0}
        options |= {"guidance_scale": 1.0, "prediction_type": prediction}
        options["callback"] = lambda i, t, x, path=path: path.append(x.clone())
        ddim(model, visits[0].x_t[:1], visits[0].prompt[:1], None, tiny.SCHEDULE, **options)
        for draw, expected in zip(visits[1:], path, strict=False):
            torch.testing.assert_close(draw.x_t[:1], expected, rtol=1e-4, atol=1e-4)
            assert torch.equal(draw.prompt[0], visits[0].prompt[0]) and int(draw.choice[0]) == ROLLING


def test_states_of_a_flow_move_along_its_velocity() -> None:
    run = made(schedule=FlowSchedule(50, 1.0), prediction_type="flow_prediction")
    states = [draw for draw, _ in drawn(run, 2 * ROUNDS)]
    levels = run._setting.schedule.coefficients("flow_prediction")
    step = next(step for step in range(GROUPS, ROUNDS) if int(states[step].timestep[0]) >= 40)
    now, after = states[step], states[step + GROUPS]
    with torch.no_grad():
        velocity = run._setting.predict(run.teacher, now.x_t, now.timestep, now.prompt)[0]
    sigma, later = (levels[draw.timestep[0], 1] for draw in (now, after))
    torch.testing.assert_close(after.x_t[0], now.x_t[0] + (later - sigma) * velocity, rtol=1e-4, atol=1e-5)


def test_the_other_samples_are_those_of_random_conditioning() -> None:
    plain = made(RandomConditioning(weights=Weights(1.0, 0.0, 0.0)))
    own, counter = made(), torch.tensor([0, 3])
    for run in (plain, own):
        run.step.objective.prepare(0, 3)
    theirs = plain.step.objective.draw(counter)
    draw = own.step.objective.draw(counter)
    for name in ("x_t", "timestep", "prompt", "latent_index", "choice"):
        assert torch.equal(getattr(draw, name)[1::2], getattr(theirs, name)[1::2]), name
    assert not torch.equal(draw.x_t[::2], theirs.x_t[::2])


def test_all_levels_are_under_way_from_the_start() -> None:
    """In the first round the states are the batch's own samples, with all timesteps."""
    run = made(batch=64, rolling={"groups": 4})
    seen = drawn(run, 8)
    later = torch.cat([draw.timestep[::2] for draw, _ in seen[4:]])
    counts = torch.bincount(later // 10, minlength=5)
    assert (counts > 0).all() and len(later) == 4 * 32


def test_trajectories_begin_at_noise_with_random_prompts() -> None:
    run = made(batch=64, rolling={"groups": 1, "steps": 1})
    seen = [draw for draw, _ in drawn(run, 12)][1:]  # a step each
    x = torch.cat([draw.x_t[::2] for draw in seen])
    prompts = torch.cat([draw.prompt[::2] for draw in seen])
    rows = torch.stack([(prompts == row).flatten(1).all(1) for row in tiny.bank().embeddings])
    shares = rows.float().mean(1)
    assert shares[2] == 0 and (shares[:2] - 0.5).abs().max() < 5 * 0.5 / len(prompts) ** 0.5  # never the null prompt
    assert len({tuple(image.flatten().tolist()) for image in x}) == len(x)


def test_some_states_are_shown_with_the_null_prompt_and_rest() -> None:
    run = made(batch=64, rolling={"groups": 1, "null": 0.25})
    null, shares = tiny.bank().embeddings[-1], []
    for (draw, kept), (later, _) in itertools.pairwise(drawn(run, 40)[1:]):
        resting = draw.choice[::2] == NULL
        shown = (draw.prompt[::2] == null).flatten(1).all(1)
        assert bool(shown[resting].all()) and bool((draw.choice[::2][~resting] == ROLLING).all())
        for name in ("x_t", "timestep"):
            assert torch.equal(getattr(draw, name)[::2][resting], getattr(later, name)[::2][resting])
        assert bool((draw.timestep[::2] != later.timestep[::2])[~resting].all())
        goes_on = (later.choice[::2] == ROLLING) & (resting | (kept["timestep"][0] >= 10))
        assert torch.equal(later.prompt[::2][goes_on], kept["prompt.0"][0][goes_on])
        shares.append(resting.float().mean())
    assert abs(float(torch.stack(shares).mean()) - 0.25) < 5 * (0.1875 / (32 * len(shares))) ** 0.5


def test_who_rests_is_drawn_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of the first round with the null prompt are the batch's own, not states that rest: they move."""
    run = made(batch=64, rolling={"groups": 1, "null": 0.25}, execution="eager")
    draws = []
    words = SimpleNamespace(words=lambda *a: draws.append(a) or philox.words(*a), CHOICE=philox.CHOICE)
    monkeypatch.setattr("fastdistill.distill.rolling.philox", words)
    (draw, _), (later, _) = drawn(run, 2)
    assert len(draws) == 2
    null = draw.choice[::2] == NULL
    ended = draw.timestep[::2] < 10
    assert bool(null.any()) and bool((draw.timestep[::2] - 10 == later.timestep[::2])[null & ~ended].all())


@pytest.mark.parametrize("micro_batch", [4, 2])
def test_parts_of_a_batch_move_as_the_whole(micro_batch: int) -> None:
    whole, parts = made(batch=8), made(batch=8, micro_batch=micro_batch)
    for done in range(2 * ROUNDS):
        for run in (whole, parts):
            run.step.prepare(done)
            run.step()
        for name, value in whole.step.objective.state.items():
            torch.testing.assert_close(parts.step.objective.state[name], value, rtol=1e-5, atol=1e-5)


def test_a_run_goes_on_with_its_states(tmp_path: Path) -> None:
    whole = made(lr=1e-3, steps=12)
    whole.fit(tmp_path / "whole")
    with pytest.raises(Interrupted):
        made(lr=1e-3, steps=12, checkpoint_every=5).fit(tmp_path / "run", progress=stop_after(8))
    again = made(lr=1e-3, steps=12, checkpoint_every=5)
    again.fit(tmp_path / "run")
    for name, value in state_of(whole.step, whole.student).items():
        assert torch.equal(state_of(again.step, again.student)[name], value), name


def test_a_compiled_step_moves_the_same_states() -> None:
    eager, compiled = made(), made(execution="compiled")
    advance = runner(compiled.step, compiled.student, "compiled")
    for done in range(4):
        eager.step.prepare(done)
        eager.step()
        compiled.step.prepare(done)
        advance()
        for name, value in eager.step.objective.state.items():
            torch.testing.assert_close(compiled.step.objective.state[name], value, rtol=1e-4, atol=1e-5)


def test_a_state_that_is_not_finite_begins_anew() -> None:
    run = made()
    objective = run.step.objective
    drawn(run, 3)
    rolling = objective._rolling
    rolling.x[1, 0] = torch.nan
    draw = objective._batches(torch.tensor([0, 3]))
    draw.latent_index[::2] = torch.arange(2)
    rolling.move(draw, torch.zeros_like(draw.x_t), torch.tensor([0, 3]))
    assert int(rolling.timestep[1, 0]) == -1 and bool(rolling.x.isfinite().all())


def test_what_does_not_fit_is_refused() -> None:
    for change, message in (
        ({"rolling": {"every": 3}}, "rolling.every: expected a divisor of the batch of a process, 4, got 3"),
        ({"rolling": {"steps": 51}}, "rolling.steps: expected at most the 50 timesteps of the schedule, got 51"),
        ({"rolling": {"every": 4}, "micro_batch": 2}, "a divisor of the config.micro_batch, 2, got 4"),
        ({"rolling": {"every": 1}}, "every"),
        ({"rolling": {"clip_sample": 1e300}}, r"rolling.clip_sample: input should be within float32, got 1e\+300"),
        ({"rolling": {"every": None}}, "rolling.every: expected a number, as other fields of rolling are set.*None"),
    ):
        with pytest.raises(InputError, match=message):
            made(**change)
    rolling = Rolling(every=2)
    with pytest.raises(InputError, match=r"weights.task: expected 0 with rolling states"):
        made(RandomConditioning(weights=Weights(1.0, 0.0, 1.0), rolling=rolling))
    with pytest.raises(InputError, match=r"rolling.every: expected None, as a step has no guided output"):
        made(GuidanceDistillation(schedule="4", weights=Weights(1.0, 0.0, 0.0), rolling=rolling))
    regions = Regions(power=2.0)
    for objective in (RandomConditioning(regions=regions), GuidanceDistillation(schedule="4", regions=regions)):
        with pytest.raises(InputError, match=r"regions.count: expected a number, as other fields of regions are set"):
            objective.describe()


def test_without_rolling_states_a_run_is_described_as_before() -> None:
    plain = RandomConditioning()
    assert "rolling" not in plain.describe()
    assert dataclasses.replace(plain, rolling=Rolling(every=4)).describe()["rolling"]["every"] == 4  # type: ignore[index]
