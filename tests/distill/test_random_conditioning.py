# SPDX-License-Identifier: Apache-2.0
"""The objective compared with a simple version in plain torch, and details of the equations."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdistill.distill import RandomConditioning, Setting, Weights
from fastdistill.errors import InputError
from fastdistill.ops import noise_gather
from fastdistill.ops.feature_match import Distance
from fastdistill.ops.noise_gather import RANDOM, Draw
from tests import small
from tests.harness import assert_alike, assert_close, nudged


def setting(kind: str = "bk_base") -> tuple[Setting, Any]:
    own = small.teacher().eval().requires_grad_(False)
    made = small.student(kind, own)
    cache = small.cache()
    models = own, made.model.train()
    return Setting(*models, small.SCHEDULE, cache.latents, cache.prompt_index, small.bank().embeddings, 6), made


def drawn(where: Setting, config: RandomConditioning, counter: Tensor) -> Draw:
    from fastdistill.diffusion.conditioning import thresholds

    coefficients = where.schedule.coefficients("epsilon")
    tables = where.latents, where.latent_prompts, where.prompts, coefficients, thresholds(config.p(1000)), counter
    return noise_gather(*tables, batch=where.batch, null_index=8, null_probability=config.null_probability, target=True)


def outputs_of(model: nn.Module, names: list[str], draw: Draw) -> tuple[Tensor, list[Tensor]]:
    """Output and features, from hooks of this test."""
    kept: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    hooks = [
        modules[n].register_forward_hook(
            lambda _m, _a, out, n=n: kept.update({n: out[0] if isinstance(out, tuple) else out})
        )
        for n in names
    ]
    output = model(draw.x_t, draw.timestep, encoder_hidden_states=draw.prompt, return_dict=False)[0]
    for hook in hooks:
        hook.remove()
    return output, [kept[n] for n in names]


@pytest.mark.parametrize("kind", ["bk_base", "channel_base"])
@pytest.mark.parametrize("weights", [Weights(), Weights(output=0.5, feature=2.0, task=0.3)], ids=str)
def test_loss_and_gradients_are_the_literal_recipe(kind: str, weights: Weights) -> None:
    where, made = setting(kind)
    config = small.objective(made, weights=weights)
    bound = config.bind(where)
    counter = torch.tensor([5, 3])
    loss, metrics = bound(counter)
    loss.backward()
    ours = [p.grad.clone() for p in where.student.parameters()]

    def literal(
        dtype: torch.dtype, near: Callable[[Tensor], Tensor] = lambda x: x
    ) -> tuple[list[Tensor], list[Tensor]]:
        teacher, twin = (small.copied(model, dtype, near) for model in (where.teacher, where.student))
        draw = Draw(
            *(t.to(dtype) if t is not None and t.is_floating_point() else t for t in drawn(where, config, counter))
        )
        with torch.no_grad():
            target, theirs = outputs_of(teacher, list(made.teacher_taps), draw)
        output, own = outputs_of(twin, list(made.student_taps), draw)
        apart = [[(f[0] - f[1]).square().mean() for f in features] for features in (own, theirs)]
        if bound.trained:
            own = copy.deepcopy(bound.trained[0]).to(dtype)(own)
        mse = nn.functional.mse_loss
        paired = (draw.choice != RANDOM).to(dtype)
        taps = [mse(s, t) for s, t in zip(own, theirs, strict=True)]
        parts = [
            mse(output, target),
            sum(taps),
            ((output - draw.target).square().mean((1, 2, 3)) * paired).mean() if weights.task else output.new_zeros(()),
            *taps,
            *(s / t for s, t in zip(*apart, strict=True)),
        ]
        expected = weights.output * parts[0] + weights.feature * parts[1] + weights.task * parts[2]
        expected.backward()
        return [expected.detach(), *(part.detach() for part in parts)], [p.grad for p in twin.parameters()]

    (eager, gradients), (exact, exact_gradients) = literal(torch.float32), literal(torch.float64)
    # Each is a mean of thousands of squares, so the order of the sum changes it by eps sqrt(n).
    count = where.batch * 3 * 8 * 8
    for one, truth, other in zip([loss, *metrics], [exact[0], *exact], [eager[0], *eager], strict=True):
        assert_close("metric", one.detach(), truth, other, 2.0, terms=(count, float(truth)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        moved = literal(torch.float64, nudged)[1]
    assert_alike(ours, gradients, exact_gradients, factor=3.0, moved=moved)


def test_paired_prompts_only_and_random_prompts_only() -> None:
    where, made = setting()
    for value, expected in ((0.0, 0), (1.0, RANDOM)):
        config = small.objective(made, probability="const", parameters={"value": value}, null_probability=0.0)
        bound = config.bind(where)
        bound(torch.tensor([1, 1]))
        assert (bound._batches.out.choice == expected).all()


def test_each_loss_can_be_left_out() -> None:
    where, made = setting()
    for name in ("output", "feature", "task"):
        only = Weights(**{n: float(n == name) for n in ("output", "feature", "task")})
        bound = small.objective(made, weights=only).bind(where)
        loss, metrics = bound(torch.tensor([1, 1]))
        values = dict(zip(bound.metric_names, metrics, strict=True))
        assert loss > 0 and values[name] == values["loss"]
        taps = [f"{kind}/{tap}" for kind in ("feature", "spread") for tap in made.student_taps]
        assert [n for n in values if "/" in n] == (taps if name == "feature" else [])
        assert all(values[n] == 0 for n in ("output", "feature", "task") if n != name)


def test_normalized_features_do_not_depend_on_the_scale_of_a_tap() -> None:
    where, made = setting()
    plain = small.objective(made, weights=Weights(output=0.0), feature_distance="normalized_mse")
    first = plain.bind(where)(torch.tensor([1, 1]))[0]
    assert 0 < first < len(made.student_taps) * 3  # each tap contributes at most about 1


@pytest.mark.parametrize("distance", ["huber", "cosine"])
def test_other_distances_of_features(distance: Distance) -> None:
    """Each distance is below the mean square: at most half of it, or 2 per tap."""
    where, made = setting()
    losses = {}
    for name in ("mse", distance):
        config = small.objective(made, weights=Weights(output=0.0), feature_distance=name)
        losses[name] = config.bind(where)(torch.tensor([1, 1]))[0]
        losses[name].backward()
    most = losses["mse"] / 2 if distance == "huber" else 2.0 * len(made.student_taps)
    assert 0 < losses[distance] <= most


def test_a_user_function_of_time() -> None:
    config = RandomConditioning(probability=lambda u: u * u)
    assert torch.allclose(config.p(10), (torch.arange(10, dtype=torch.float64) / 10) ** 2)
    described = config.describe()["probability"]
    assert described != RandomConditioning(probability=lambda u: u).describe()["probability"]


def test_bad_input() -> None:
    where, made = setting()
    with pytest.raises(InputError, match="weights: expected at least one loss with a weight above 0"):
        small.objective(made, weights=Weights(0.0, 0.0, 0.0)).bind(where)
    with pytest.raises(InputError, match="taps: expected pairs"):
        RandomConditioning().bind(where)
    with pytest.raises(InputError, match=r"down_blocks\.7.*near matches.*down_blocks"):
        small.objective(made, taps=(("down_blocks.7", "down_blocks.0"),)).bind(where)
    with pytest.raises(
        InputError, match=r"student tap down_blocks\.0: expected the size of the teacher's up_blocks\.1"
    ):
        small.objective(made, taps=(("up_blocks.1", "down_blocks.0"),)).bind(where)


def test_refused_weightings_are_named_as_the_arguments_of_the_objective() -> None:
    where, made = setting()
    for arguments, message in (
        (
            {"min_snr_gamma": 3.0},
            "min_snr_gamma: expected its default 5.0 where the weighting is not min_snr but uniform",
        ),
        ({"loss_weighting": "cosmap"}, "loss_weighting: expected flow_prediction of a FlowSchedule for cosmap"),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            small.objective(made, **arguments).bind(where)


def test_frozen_features_are_refused_on_the_first_step() -> None:
    where, made = setting()
    for module in (where.student.conv_in, where.student.time_embedding, where.student.down_blocks[0]):
        module.requires_grad_(False)
    with pytest.raises(InputError, match=r"carry gradient, got none in down_blocks\.0"):
        small.objective(made).bind(where)(torch.tensor([1, 1]))


def test_the_teacher_may_have_another_dtype() -> None:
    where, made = setting()
    where = dataclasses.replace(where, teacher=where.teacher.to(torch.bfloat16))
    loss, _ = small.objective(made).bind(where)(torch.tensor([5, 3]))
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in where.student.parameters())
    assert all(p.dtype == torch.float32 for p in where.student.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_parameters_that_are_no_numbers_of_a_model_are_refused_by_name(value: float) -> None:
    with pytest.raises(InputError, match=r"objective: 1 problem\n  parameters.value: input should be "):
        RandomConditioning("const", {"value": value}).describe()
