# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from fastdistill.distill import GuidanceDistillation, RandomConditioning, Weights
from fastdistill.distill.objective import Setting
from fastdistill.errors import InputError
from fastdistill.evaluate.held_out import held_out_losses
from fastdistill.models import Student, make_student
from tests import small
from tests.harness import EPS


def setting(kind: str = "bk_base", batch: int = 6) -> tuple[Setting, Student]:
    teacher, cache, bank = small.teacher().eval(), small.cache(6), small.bank()
    made = small.student(kind, teacher)
    models = teacher, made.model.eval()
    return Setting(*models, small.SCHEDULE, cache.latents, cache.prompt_index, bank.rows, batch), made


def pairs(made: Student) -> list[tuple[str, str]]:
    return list(zip(made.teacher_taps, made.student_taps, strict=True))


def test_losses_are_those_of_the_objective() -> None:
    """The losses of a step of plain distillation on all latents, except for the order of sums."""
    given, made = setting()
    found = held_out_losses(given, pairs(made), seed=5, rounds=1)
    plain = {"probability": "const", "parameters": {"value": 0.0}, "null_probability": 0.0}
    bound = RandomConditioning(**plain, taps=tuple(pairs(made)), weights=Weights()).bind(given)  # type: ignore[arg-type]
    bound.prepare(5, 0)
    _, metrics = bound(torch.tensor([5, 0]))
    bound.close()
    assert sorted(found.latent.tolist()) == list(range(6)) and found.features is not None
    expected = dict(zip(bound.metric_names, metrics, strict=True))
    wanted = [expected["output"], *(expected[f"feature/{name}"] for name in made.student_taps)]
    for own, loss in zip([found.output, *found.features.unbind(1)], wanted, strict=True):
        assert abs(float(own.mean()) - float(loss)) <= 64 * EPS * float(loss) and loss > 0
    assert found.feature is not None and torch.equal(found.feature, found.features.sum(1))


def test_of_a_guided_student_against_the_guided_teacher() -> None:
    """At the v that it gets: equal to an objective whose range of v is tiny."""
    given, _ = setting()
    made = make_student(given.teacher, "bk_base", guidance_embedding=True)
    nn.init.normal_(made.model.time_embedding.cond_proj.weight, generator=torch.Generator().manual_seed(1))
    given = dataclasses.replace(given, student=made.model.eval())
    config = GuidanceDistillation(
        "1@2,-1@0.5,0", (3.0, 3.0 + 1e-7), null_probability=0.0, loss_weighting="uniform", taps=tuple(pairs(made))
    )
    here, guiding = config.guiding(given)
    found = held_out_losses(here, pairs(made), seed=5, rounds=1, guided=(guiding, 3.0))
    bound = config.bind(given)
    bound.prepare(5, 0)
    values = dict(zip(bound.metric_names, bound(torch.tensor([5, 0]))[1], strict=True))
    bound.close()
    assert found.feature is not None
    for own, name in ((found.output, "output"), (found.feature, "feature")):
        assert float(own.mean()) == pytest.approx(float(values[name]), rel=1e-4)
    plain = held_out_losses(given, seed=5, rounds=1).output.mean()
    assert abs(float(plain) - float(values["output"])) > 1e-2 * float(plain)


def test_losses_do_not_depend_on_the_batch() -> None:
    given, made = setting()
    whole = held_out_losses(given, pairs(made), seed=7, rounds=2)
    parts = held_out_losses(dataclasses.replace(given, batch=4), pairs(made), seed=7, rounds=2)
    assert torch.equal(whole.timestep, parts.timestep) and torch.equal(whole.latent, parts.latent)
    assert len(set(whole.timestep.tolist())) > 6
    torch.testing.assert_close(whole.output, parts.output, rtol=256 * EPS, atol=0)
    other = held_out_losses(given, seed=8, rounds=2)
    assert other.features is None and not torch.equal(other.timestep, whole.timestep)


def test_a_student_that_is_the_teacher_has_no_loss_and_no_hook_stays() -> None:
    given, made = setting()
    same = dataclasses.replace(given, student=given.teacher)
    names = [(name, name) for name in made.teacher_taps]
    found = held_out_losses(same, names, seed=0, rounds=1)
    assert found.features is not None and not found.output.any() and not found.features.any()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in given.teacher.modules())


def test_features_of_other_channels_need_adapters() -> None:
    given, made = setting("channel_base")
    assert held_out_losses(given, pairs(made), seed=0, rounds=1).features is None

    def first(features: list[Tensor]) -> list[Tensor]:
        return [f.new_zeros(len(f), of, *f.shape[2:]) for f, (_, of) in zip(features, made.channels, strict=True)]

    found = held_out_losses(given, pairs(made), seed=0, rounds=1, adapters=first)  # type: ignore[arg-type]
    assert found.features is not None and tuple(found.features.shape) == (6, len(made.channels))
    with pytest.raises(InputError, match=r"^taps: expected modules of"):
        held_out_losses(given, [("no_block", "no_block")], seed=0)
    with pytest.raises(InputError, match=r"^rounds: expected at least 1"):
        held_out_losses(given, seed=0, rounds=0)
