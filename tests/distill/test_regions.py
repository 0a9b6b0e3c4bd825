# SPDX-License-Identifier: Apache-2.0
"""Random prompts drawn by region, according to the distance between student and teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.data.prompt_bank import PromptBank
from fastdistill.distill import GuidanceDistillation, RandomConditioning, Regions, Rolling, Weights
from fastdistill.distill.regions import RegionSampler, alias_table
from fastdistill.distill.rolling import ROLLING
from fastdistill.errors import InputError
from fastdistill.ops.noise_gather import RANDOM
from fastdistill.train import DistillTrainer
from fastdistill.train.graph import runner
from fastdistill.train.state import state_of
from tests import tiny
from tests.train.ranks import Interrupted, stop_after

OUTPUT = Weights(1.0, 0.0, 0.0)
POOL = 7


def bank(pool: int = POOL) -> PromptBank:
    rows = torch.randn(pool + 1, 5, 6, generator=torch.Generator().manual_seed(2))
    return PromptBank(rows, [f"prompt {i}" for i in range(pool)])


def made(objective: Any = None, **options: Any) -> Any:
    regions = Regions(**{"count": 3, "every": 4} | options.pop("regions", {}))
    given = {"probability": "const", "parameters": {"value": 0.8}, "weights": OUTPUT, "regions": regions}
    objective = objective or RandomConditioning(**given | options.pop("conditioning", {}))
    data = tiny.SCHEDULE, tiny.cache(), options.pop("prompts", None) or bank()
    config = {"batch": 4, "steps": 12, "lr": 1e-3, "checkpoint_every": 5} | options
    return DistillTrainer(tiny.Net(seed=1), tiny.Net(seed=2), *data, objective, config)


def sampler(pool: int, count: int, **regions: Any) -> RegionSampler:
    return made(prompts=bank(pool), regions={"count": count, **regions}).step.objective._regions


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0], [0.0, 3.0, 1.0], [5.0, 1e-3, 2.0, 2.0, 0.7], [1e-30, 1.0]])
def test_the_alias_table_has_the_probabilities(weights: list[float]) -> None:
    kept, alias = alias_table(weights)
    share = kept.double() / 2**32
    found = share + torch.zeros_like(share).index_add_(0, alias, 1 - share)
    expected = torch.tensor(weights, dtype=torch.float64) / sum(weights) * len(weights)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * len(weights))


def test_a_region_is_drawn_as_often_as_it_is_said() -> None:
    own = sampler(POOL, 3)  # regions of 2, 2 and 3 prompts
    distance = [1.0, 4.0, 2.0]
    own._write(distance)
    weights = torch.tensor([2 * 1.0, 2 * 4.0, 3 * 2.0], dtype=torch.float64)
    q = 0.2 * torch.tensor([2, 2, 3]) / 7 + 0.8 * weights / weights.sum()
    torch.testing.assert_close(torch.tensor(own.probabilities(distance), dtype=torch.float64), q)
    n = 100_000
    rows = own.rows(torch.tensor([3, 5]), torch.arange(n))
    each = torch.bincount(rows, minlength=POOL).double() / n
    expected = torch.cat([q[:1].expand(2) / 2, q[1:2].expand(2) / 2, q[2:].expand(3) / 3])
    assert (each - expected).abs().max() < 5 * (expected.max() / n) ** 0.5
    assert torch.equal(rows, own.rows(torch.tensor([3, 5]), torch.arange(n)))
    assert not torch.equal(rows, own.rows(torch.tensor([3, 6]), torch.arange(n)))


@pytest.mark.parametrize(("pool", "count"), [(7, 3), (7, 7), (5, 2), (64, 9)])
def test_every_prompt_is_in_one_region(pool: int, count: int) -> None:
    own = sampler(pool, count)
    region = (torch.arange(1, pool + 1) * count - 1) // pool
    assert torch.bincount(region, minlength=count).tolist() == own._size.tolist()
    assert [int((region < r).sum()) for r in range(count)] == own._first.tolist()


def test_random_prompts_alone_are_replaced() -> None:
    plain = made(conditioning={"regions": Regions()}, batch=64)
    own, counter = made(batch=64), torch.tensor([0, 3])
    for run in (plain, own):
        run.step.objective.prepare(0, 3)
    theirs = plain.step.objective.draw(counter)
    draw = own.step.objective.draw(counter)
    random = draw.choice == RANDOM
    assert 30 < int(random.sum()) < 64
    for name in ("x_t", "timestep", "latent_index", "choice"):
        assert torch.equal(getattr(draw, name), getattr(theirs, name)), name
    for name in ("prompt", "prompt_index"):
        assert torch.equal(getattr(draw, name)[~random], getattr(theirs, name)[~random]), name
    assert torch.equal(draw.prompt, bank().embeddings[draw.prompt_index])
    assert not torch.equal(draw.prompt_index[random], theirs.prompt_index[random])
    assert int(draw.prompt_index[random].max()) < POOL


def watched(run: Any, steps: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Choice, prompt and distance of the samples in the first ``steps`` steps."""
    seen, objective = [], run.step.objective

    def spy(draw: Any, distances: Tensor, choices: Any, add: Any = objective._regions.add) -> None:
        seen.append((draw.choice.clone(), draw.prompt_index.clone(), distances.detach().clone()))
        add(draw, distances, choices)

    objective._regions.add = spy
    for done in range(steps):
        run.step.prepare(done)
        run.step()
    return seen


@pytest.mark.parametrize("rolling", [None, 2])
def test_the_table_follows_the_mean_distances(rolling: int | None) -> None:
    run = made(batch=16, conditioning={"rolling": Rolling(every=rolling, steps=5, groups=1) if rolling else Rolling()})
    regions = run.step.objective._regions
    seen = watched(run, 8)
    run.step.prepare(8)
    region = (torch.arange(1, POOL + 1) * 3 - 1) // POOL
    average = torch.full((3,), -1.0, dtype=torch.float64)
    for first in (0, 4):
        choice, prompt, distance = (torch.cat(parts) for parts in zip(*seen[first : first + 4], strict=True))
        counted = ((choice == RANDOM) | (choice == ROLLING)) & (prompt >= 0) & (prompt < POOL)
        assert rolling is None or bool((choice[counted] == ROLLING).any())
        for r in range(3):
            mean = float(distance[counted][region[prompt[counted]] == r].double().mean())
            average[r] = mean if average[r] < 0 else 0.5 * average[r] + 0.5 * mean
    torch.testing.assert_close(regions.distance, average, rtol=1e-4, atol=1e-5)
    kept, alias = alias_table(regions.probabilities(regions.distance.tolist()))
    assert torch.equal(regions.threshold, kept) and torch.equal(regions.alias, alias)
    assert not regions.total.any() and not regions.seen.any()


def test_what_is_not_known_is_the_mean_of_the_others() -> None:
    own = sampler(6, 3)
    assert own.probabilities([-1.0, -1.0, -1.0]) == [1 / 3] * 3
    assert own.probabilities([0.0, 0.0, -1.0]) == [1 / 3] * 3
    found = own.probabilities([1.0, 3.0, -1.0])
    assert found == pytest.approx([0.2 / 3 + 0.8 / 6, 0.2 / 3 + 0.8 / 2, 0.2 / 3 + 0.8 / 3])


@pytest.mark.parametrize("power", [400.0, 1e3, 1e30])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_powers_beyond_floats_keep_their_shares(power: float, scale: float) -> None:
    own = sampler(6, 3, power=power)
    found = own.probabilities([scale, 0.5 * scale, -1.0])
    assert found == pytest.approx([0.2 / 3 + 0.8, 0.2 / 3, 0.2 / 3])
    assert own.probabilities([scale] * 3) == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("rolling", [None, 2])
def test_a_run_goes_on_with_its_regions(tmp_path: Path, rolling: int | None) -> None:
    options = {"conditioning": {"rolling": Rolling(every=rolling, steps=5, groups=2) if rolling else Rolling()}}
    whole = made(**options)
    whole.fit(tmp_path / "whole")
    with pytest.raises(Interrupted):
        made(**options).fit(tmp_path / "run", progress=stop_after(8))
    again = made(**options)
    again.fit(tmp_path / "run")
    for name, value in state_of(whole.step, whole.student).items():
        assert torch.equal(state_of(again.step, again.student)[name], value), name


def test_parts_of_a_batch_count_as_the_whole() -> None:
    whole, parts = made(batch=8), made(batch=8, micro_batch=2)
    for done in range(6):
        for run in (whole, parts):
            run.step.prepare(done)
            run.step()
    ours, theirs = (run.step.objective._regions for run in (whole, parts))
    assert torch.equal(ours.seen, theirs.seen) and ours.seen.any()
    torch.testing.assert_close(ours.distance, theirs.distance, rtol=1e-4, atol=1e-5)


def test_a_compiled_step_counts_the_same() -> None:
    eager, compiled = made(lr=1e-12), made(lr=1e-12, execution="compiled")
    advance = runner(compiled.step, compiled.student, "compiled")
    for done in range(6):
        eager.step.prepare(done)
        eager.step()
        compiled.step.prepare(done)
        advance()
    ours, theirs = (run.step.objective._regions for run in (eager, compiled))
    assert torch.equal(ours.seen, theirs.seen) and ours.seen.any()
    torch.testing.assert_close(ours.distance, theirs.distance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.total / 2**20, theirs.total / 2**20, rtol=1e-4, atol=1e-4)


def test_guided_teachers_have_regions_too() -> None:
    guided = GuidanceDistillation(
        schedule="4", weights=OUTPUT, regions=Regions(count=3), probability="const", parameters={"value": 0.9}
    )
    run = made(guided)
    watched(run, 3)
    assert run.step.objective._regions.seen.any()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"regions.count: expected at most the 7 prompts of the pool, got 8"):
        made(regions={"count": 8})
    with pytest.raises(InputError, match=r"weights.output: expected above 0, as regions go by"):
        made(conditioning={"weights": Weights(0.0, 1.0, 0.0), "taps": (("mid", "mid"),)})
    bank().save(tmp_path / "prompts")
    with pytest.raises(InputError, match="prompts: expected prompts in the memory of the cpu for regions"):
        made(prompts=PromptBank.open(tmp_path / "prompts"))
    assert "regions" not in RandomConditioning().describe()
