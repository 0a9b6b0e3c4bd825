# SPDX-License-Identifier: Apache-2.0
"""Batches in parts: the draws and the gradient equal those of the whole batch; and students that are trained in
part."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdistill.data.latent_cache import LatentCache, generate_latent_cache
from fastdistill.distill import GuidanceDistillation, RandomConditioning, Weights
from fastdistill.distill.denoising import Denoising
from fastdistill.errors import InputError
from tests import tiny
from tests.harness import EPS
from tests.models import tiny_families

OBJECTIVES: dict[str, Callable[[], Any]] = {
    "every loss": lambda: RandomConditioning(
        "const", {"value": 0.3}, weights=Weights(1.0, 0.5, 0.25), taps=(("mid", "mid"),)
    ),
    "cosine": lambda: tiny.features(feature_distance="cosine"),
    "denoising": lambda: Denoising(5.0),
    "guidance": lambda: GuidanceDistillation("4@0.5,-1@0.2,0", weights=Weights(1.0, 0.5, 0.25), taps=(("mid", "mid"),)),
}


def _add(size: Tensor, gradient: Tensor) -> None:
    size.add_(gradient.abs())


def gradients(run: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of the first step, and the sum of their magnitudes over the parts."""
    sizes = {name: torch.zeros_like(p, requires_grad=False) for name, p in run.step.parameters_by_name.items()}
    for name, p in run.step.parameters_by_name.items():
        p.register_hook(functools.partial(_add, sizes[name]))
    run.step.prepare(0)
    run.metrics = run.step.gradients()
    return {name: p.grad for name, p in run.step.parameters_by_name.items() if p.grad is not None}, sizes


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_is_that_of_the_whole_batch(name: str) -> None:
    """The same terms are summed in another order: at most 4 samples with 15 pixels. Each addition has an error of at
    most eps / 2 of a partial sum, and a partial sum is at most the sum of the magnitudes (of the parts: within a few
    times)."""

    def make(micro_batch: int | None) -> Any:
        return tiny.trainer(tiny.Net(8), tiny.Net(6, seed=1), OBJECTIVES[name](), batch=4, micro_batch=micro_batch)

    whole = make(None)
    wanted, _ = gradients(whole)
    single = make(1)
    singles, sizes = gradients(single)
    double = make(2)
    for parts, found in ((single, singles), (double, gradients(double)[0])):
        assert wanted.keys() == found.keys() and len(wanted) >= 10
        for key, value in wanted.items():
            assert (found[key] - value).abs().max() <= 60 * EPS * sizes[key].max(), key
        for name, a, b in zip(whole.step.metric_names[:-1], whole.metrics, parts.metrics, strict=True):
            if not name.startswith("spread/"):  # the spread uses two samples of each part
                assert (a - b).abs() <= 60 * EPS * a.abs()


@pytest.mark.parametrize("stored", [False, True])
def test_the_draws_are_those_of_the_whole_batch(stored: bool, tmp_path: Any) -> None:
    """Also with the target of the task loss of each sample, for latents in memory and on disk."""
    seen: dict[str, list[Tensor]] = {"whole": [], "parts": []}
    cache = tiny.cache()
    if stored:
        rows, dtype = cache.latents, torch.float32
        generate_latent_cache(tmp_path, lambda span, _: rows[span], cache.prompt_index, (4, 5, 3), dtype, {"made": 1})
        cache = LatentCache.open(tmp_path)
    losses = []
    for name, micro in (("whole", None), ("parts", 2)):

        def call(model: nn.Module, x_t: Tensor, t: Tensor, rows: Any, name: str = name) -> Tensor:
            if len(x_t) > 1:
                seen[name].append(torch.cat([x_t.flatten(1), t[:, None], rows["encoder_hidden_states"].flatten(1)], 1))
            return model(x_t, t, **rows)  # type: ignore[no-any-return]

        objective = RandomConditioning("const", {"value": 0.0}, weights=Weights(0, 0, 1))
        run = tiny.trainer(objective=objective, call=call, latents=cache, micro_batch=micro, steps=2)
        losses.append([entry["task"] for entry in run.fit().history])
    assert torch.equal(torch.cat(seen["whole"]), torch.cat(seen["parts"]))
    assert losses[0] == pytest.approx(losses[1], rel=60 * EPS)


def test_parts_that_do_not_fit_are_refused() -> None:
    class Own:
        metric_names, trained = ("loss",), ()

        def bind(self, setting: Any) -> Any:
            return self

        def describe(self) -> dict[str, object]:
            return {}

        def close(self) -> None: ...

    for options, message in (
        ({"micro_batch": 3}, "config: 1 problem\n  micro_batch: expected a divisor of batch, 4, got 3"),
        ({"micro_batch": 2, "objective": Own()}, "objective: expected an objective with draw and loss"),
        (
            {"micro_batch": 2, "objective": tiny.features(feature_distance="normalized_mse")},
            "config.micro_batch: expected none, as the loss of a batch is not the mean of its parts' (the normalized",
        ),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            tiny.trainer(**options)


def test_gradient_checkpointing_is_a_switch() -> None:
    losses = []
    for switch in (False, True):
        teacher, student = (tiny_families.model("pixart_sigma", seed) for seed in (0, 1))
        data = {"latents": tiny_families.cache("pixart_sigma"), "prompts": tiny_families.bank("pixart_sigma")}
        tap = ("transformer_blocks.1", "transformer_blocks.1")
        run = tiny.trainer(teacher, student, tiny.features(tap), gradient_checkpointing=switch, **data)
        assert student.is_gradient_checkpointing is switch
        losses.append([entry["loss"] for entry in run.fit().history])
        run.close()
        assert not student.is_gradient_checkpointing
    assert losses[0] == losses[1]
    with pytest.raises(InputError, match="student: expected a diffusers model that can be checkpointed"):
        tiny.trainer(gradient_checkpointing=True)


class Adapted(tiny.Net):
    """Frozen weights and a low-rank update of the middle layer."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.down, self.up = nn.Conv2d(6, 1, 1, bias=False), nn.Conv2d(1, 6, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def features(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        features = super().features(x, timestep, prompt)
        return features + self.up(self.down(features))


def test_a_low_rank_student_beside_its_teacher(tmp_path: Any) -> None:
    """It has more parameters than the teacher, but trains few; frozen weights do not change and may be the
    teacher's."""
    teacher, student = tiny.Net(seed=3), Adapted()
    for name in ("first", "mid", "last", "time", "prompt"):
        setattr(student, name, getattr(teacher, name).requires_grad_(False))
    frozen = {name: p.clone() for name, p in teacher.named_parameters()}
    run = tiny.trainer(teacher, student, Denoising(), steps=3, weight_decay=0.1)
    assert sorted(run.step.parameters_by_name) == ["student.down.weight", "student.up.weight"]
    before = student.up.weight.clone()
    run.fit(tmp_path)
    assert not torch.equal(student.up.weight, before)
    assert all(torch.equal(p, frozen[name]) for name, p in teacher.named_parameters())
    average: Any = run.ema_student()
    assert torch.equal(average.mid.weight, teacher.mid.weight) and average.mid.weight is not teacher.mid.weight


def test_a_compiled_step_in_parts(counter: Any) -> None:
    """The loss function of a part is compiled once; without code generation the arithmetic is the same."""
    runs = [tiny.trainer(micro_batch=1) for _ in range(2)]
    runs[1].step.compile(backend=counter)
    for run in runs:
        run.step.prepare(0)
        run.step()
    for a, b in zip(*(run.student.parameters() for run in runs), strict=True):
        assert torch.equal(a, b)
    assert counter.frame_count == 1


def test_batches_are_told_that_they_come_in_parts() -> None:
    """Otherwise their noise would be computed again from the first sample on."""
    batches: Any = tiny.trainer().step.objective._batches  # type: ignore[attr-defined]
    counter = torch.tensor([0, 0])
    with pytest.raises(InputError, match="draw: expected the 4 samples of a batch, or in_parts, got 2 of them"):
        batches.task(batches(counter).part(2, 4), counter)
