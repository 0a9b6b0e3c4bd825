# SPDX-License-Identifier: Apache-2.0
"""The documentation's example of an objective: compared with diffusers' sampler, and used in the trainer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from fastdistill.train import DistillTrainer
from tests import tiny
from tests.harness import EPS

PATH = Path(__file__).parents[2] / "docs" / "progressive_distillation.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("progressive_distillation", PATH)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trainer(example: ModuleType, steps: int = 5, **options: Any) -> DistillTrainer:
    return tiny.trainer(
        objective=example.ProgressiveDistillation(steps), **({"steps": 4, "checkpoint_every": 2} | options)
    )


def scheduler(steps: int, prediction_type: str) -> DDIMScheduler:
    made = DDIMScheduler(
        50, 1e-4, 0.02, timestep_spacing="trailing", clip_sample=False, prediction_type=prediction_type,
        set_alpha_to_one=True,
    )  # fmt: skip
    made.set_timesteps(steps)
    return made


def test_one_step_arrives_where_two_of_diffusers_do(example: ModuleType) -> None:
    bound: Any = trainer(example).step.objective
    draw, teacher = bound.draw(torch.tensor([3, 0])), bound.settings[0].teacher
    target = bound.target(draw).double()
    two, one = scheduler(10, "epsilon"), scheduler(5, "sample")
    at = {int(t): number for number, t in enumerate(two.timesteps)}
    for sample in range(len(draw.timestep)):
        x = draw.x_t[sample : sample + 1].double()
        t = one.timesteps.flip(0)[draw.timestep[sample]]
        arrived = one.step(target[sample : sample + 1], t, x).prev_sample
        for step in two.timesteps[at[int(t)] : at[int(t)] + 2]:
            noise = teacher(x.float(), step[None], draw.prompt[sample : sample + 1])
            x = two.step(noise.double(), step, x).prev_sample
        # Each step divides noise by the signal, at least 0.7 in this schedule; the error of a step is some EPS of x.
        torch.testing.assert_close(arrived, x, rtol=0, atol=32 * EPS * float(draw.x_t.abs().max()))


def test_it_trains_and_goes_on(example: ModuleType, tmp_path: Path) -> None:
    class Interrupted(BaseException):  # like a kill: nothing is saved
        pass

    def stop(done: int, metrics: object) -> None:
        if done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        trainer(example).fit(tmp_path, progress=stop)
    resumed, straight = trainer(example), trainer(example)
    history = [metrics["loss"] for metrics in resumed.fit(tmp_path).history]
    assert history == [metrics["loss"] for metrics in straight.fit().history]
    assert all(map(torch.equal, resumed.student.parameters(), straight.student.parameters()))
    exported = resumed.ema_student()
    assert not torch.equal(next(exported.parameters()), next(tiny.Net(seed=1).parameters()))


class Point(nn.Module):
    """A teacher whose data are a single point, so that it knows the noise exactly."""

    def __init__(self, point: Tensor, schedule: Any) -> None:
        super().__init__()
        self.point, self.table = nn.Parameter(point), schedule.coefficients()
        self.rest = nn.Parameter(torch.zeros(1000))  # at least as many parameters as the student

    def forward(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        a, b = self.table[timestep.long()][:, :2, None, None, None].unbind(1)
        return (x - a * self.point) / b


def test_the_target_of_a_teacher_that_knows_the_data_is_the_data(example: ModuleType) -> None:
    point = torch.randn(1, 4, 5, 3, generator=torch.Generator().manual_seed(0))
    made = tiny.trainer(Point(point, tiny.SCHEDULE), objective=example.ProgressiveDistillation(5))
    bound: Any = made.step.objective
    draw = bound.draw(torch.tensor([3, 0]))
    # x - a x_0 is divided by b >= 0.1 and multiplied again: an error of EPS / 0.1 of the largest x in each step.
    bound_of = 40 * EPS * float(draw.x_t.abs().max() + point.abs().max())
    assert (bound.target(draw) - point).abs().max() <= bound_of


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches(example: ModuleType, micro_batch: int) -> None:
    losses = [trainer(example, micro_batch=n).fit().history[0]["loss"] for n in (None, micro_batch)]
    assert losses[0] == pytest.approx(losses[1], rel=16 * EPS)


def test_steps_that_do_not_fit(example: ModuleType) -> None:
    with pytest.raises(ValueError, match="steps: expected a divisor of 25, got 4"):
        trainer(example, 4)
