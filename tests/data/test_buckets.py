# SPDX-License-Identifier: Apache-2.0
"""Latents of several shapes: which step draws from which cache, and which rows."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from fastdistill.data.buckets import Buckets, turn
from fastdistill.data.staged import Batches
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.errors import InputError

SIZES, SHAPES = [6, 4, 2], [(4, 2), (2, 4), (3, 3)]
SCHEDULE = NoiseSchedule.cosine(20)
PROMPTS = torch.arange(15.0).reshape(5, 3)


def batches(bucket: int, **options: int) -> Batches:
    values = torch.arange(SIZES[bucket], dtype=torch.float32) + 100 * bucket
    latents = values.reshape(-1, 1, 1, 1).expand(-1, 1, *SHAPES[bucket]).contiguous()
    never, index = torch.zeros(len(SCHEDULE), dtype=torch.int64), torch.arange(SIZES[bucket]) % 4
    settings = {"batch": 2, "null_index": 4, "null_probability": 0.0, "target": True, "task": True} | options
    return Batches(latents, index, PROMPTS, SCHEDULE.coefficients("sample"), never, **settings)  # type: ignore[arg-type]


def buckets(**options: int) -> Buckets:
    return Buckets([batches(i, **options) for i in range(3)], SIZES, torch.device("cpu"))


@pytest.mark.parametrize("sizes", [[5], [6, 4, 2], [1, 1], [1, 1000], [1000, 1], [7, 7, 3, 11], [10**9, 10**9 + 1]])
def test_every_cache_has_its_share_of_the_steps(sizes: list[int]) -> None:
    """Exact over as many steps as there are latents, nearly exact at any time; each cache counts its own steps from
    0."""
    total, seen = sum(sizes), Counter[int]()
    for step in range(min(total, 2000)):
        bucket, own = turn(sizes, step)
        assert own == seen[bucket]
        seen[bucket] += 1
        assert all(abs(seen[i] - (step + 1) * size / total) < len(sizes) for i, size in enumerate(sizes))
    if total <= 2000:
        assert [seen[i] for i in range(len(sizes))] == sizes
    assert turn(sizes, 3 * total) == (turn(sizes, 0)[0], 3 * sizes[turn(sizes, 0)[0]])


def test_every_latent_comes_once_an_epoch() -> None:
    drawn, made = buckets(), Counter[float]()
    counter = torch.tensor([3, 0])
    for step in range(sum(SIZES)):  # 2 samples per step: two epochs of every cache
        drawn.prepare(3, step)
        draw = drawn(counter)
        bucket, _ = turn(SIZES, step)
        assert draw.x_t.shape == (2, 1, *SHAPES[bucket])
        made.update(draw.target[:, 0, 0, 0].tolist())
    assert made == Counter({100.0 * i + n: 2 for i, size in enumerate(SIZES) for n in range(size)})


def test_no_two_caches_have_the_same_draws() -> None:
    """Other caches have other draws; a single cache has the draws of a run without buckets."""
    drawn, times = buckets(), []
    for step in range(24):
        drawn.prepare(3, step)
        times.append((turn(SIZES, step), drawn(torch.zeros(2, dtype=torch.int64)).timestep.tolist()))
    by_turn = dict(times)
    assert all(by_turn[(0, own)] != by_turn[(1, own)] for own in range(8))
    alone = batches(0)
    assert all(by_turn[(0, own)] == alone(torch.tensor([3, own])).timestep.tolist() for own in range(12))


def test_ranks_share_a_step() -> None:
    whole, halves = buckets(batch=4), [buckets(first_sample=first, global_batch=4) for first in (0, 2)]
    last = next(step for step in range(30, 60) if turn(SIZES, step)[0] == 1)
    for step in (0, 1, 2, 3, last):
        for each in (whole, *halves):
            each.prepare(5, step)
        wanted, *parts = (each(torch.tensor([5, step])) for each in (whole, *halves))
        assert torch.equal(wanted.x_t, torch.cat([part.x_t for part in parts]))
    task = whole.task(wanted, torch.tensor([5, last]))
    assert task.counter[1] == turn(SIZES, last)[1] and task.counter[0] != 5  # as the draw's noise


def test_a_step_that_was_not_prepared_is_refused() -> None:
    with pytest.raises(InputError, match="counter: expected a step that was prepared, got none yet"):
        buckets()(torch.tensor([0, 0]))
