# SPDX-License-Identifier: Apache-2.0
"""States of a guided sampler, stored and trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import DistillTrainer, Grid, LatentCache
from fastdistill.diffusion.guided import sample
from fastdistill.diffusion.sampler import initial_noise
from fastdistill.distill import GuidanceDistillation, TrajectoryCache, Weights, generate_trajectory_cache
from fastdistill.errors import InputError, StorageError
from tests import tiny

GRID, WINDOW = Grid.trailing(tiny.SCHEDULE, 5), "4@0.5,-1@0.2,0"
PLAIN: dict[str, Any] = {"grid": GRID, "states": "trajectory", "weights": Weights(1, 0, 0)}
INDEX = torch.tensor([0, 1, 1, 0, 1])


def make(path: Path, schedule: str = WINDOW, batch: int = 2, **options: Any) -> None:
    given = tiny.Net(), tiny.bank(), INDEX, (4, 5, 3), GRID, schedule
    generate_trajectory_cache(path, *given, images_per_shard=2, batch=batch, **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "whole"
    make(path)
    return path


def trainer(latents: Any, objective: Any = None, **options: Any) -> DistillTrainer:
    return tiny.trainer(
        tiny.Net(), tiny.Net(seed=1), objective or GuidanceDistillation(WINDOW, **PLAIN), latents=latents, **options
    )


@torch.no_grad()
def test_rows_are_what_the_sampler_asks_its_model(place: Path) -> None:
    asked: list[Tensor] = []
    model, bank = tiny.Net(), tiny.bank()
    model.register_forward_pre_hook(lambda _m, args: asked.append(args[0][-5:]))
    noise = initial_noise(0, torch.arange(5), (4, 5, 3))
    sample(model, noise, bank.embeddings[INDEX], bank.null, GRID, guidance=WINDOW)
    cache = TrajectoryCache.load(place)
    # batches of other sizes: a matrix product may be summed in another order, once per step
    torch.testing.assert_close(cache.latents, torch.stack(asked, 1).flatten(0, 1), rtol=1e-5, atol=1e-5)
    assert torch.equal(cache.latents[::5], noise) and cache.step is not None
    assert cache.step.tolist() == [0, 1, 2, 3, 4] * 5 and torch.equal(cache.prompt_index, INDEX.repeat_interleave(5))
    assert cache.fingerprint["guidance"] == WINDOW and cache.fingerprint["grid"] == "trailing:5"


def test_an_interrupted_cache_is_gone_on_with(place: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        make(tmp_path / "again", progress=stop)
    make(tmp_path / "again")
    files = sorted(path.name for path in place.glob("*.safetensors"))
    assert len(files) == 3
    assert all((place / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)
    with pytest.raises(StorageError, match="guidance"):
        make(tmp_path / "again", schedule="2")


@pytest.mark.parametrize("stored", [False, True])
def test_a_step_sees_states_with_their_times_and_weights(place: Path, stored: bool) -> None:
    cache = TrajectoryCache.open(place) if stored else TrajectoryCache.load(place)
    run = trainer(cache, batch=8)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, model in {"teacher": run.teacher, "student": run.student}.items():
        model.register_forward_pre_hook(
            lambda _m, args, kwargs, name=name: seen.update({name: (args[0].clone(), kwargs["timestep"].clone())}),
            with_kwargs=True,
        )
    bound: Any = run.step.objective
    bound.prepare(0, 0)
    draw, _ = bound.draw(run.step.counter)
    bound.prepare(0, 0)
    bound(run.step.counter)
    rows, step = cache.latents[draw.latent_index], cache.step[draw.latent_index]
    assert torch.equal(seen["student"][0], rows) and torch.equal(seen["teacher"][0], torch.cat([rows, rows]))
    assert torch.equal(seen["student"][1].double(), GRID.times[step]) and len(set(step.tolist())) > 2
    assert draw.timestep.tolist() == step.tolist()
    assert torch.equal(draw.prompt_index[draw.choice == 0], cache.prompt_index[draw.latent_index][draw.choice == 0])
    run.close()


def test_bad_input(place: Path, tmp_path: Path) -> None:
    cache = TrajectoryCache.load(place)
    for latents, schedule, changes, message in (
        (tiny.cache(), WINDOW, {}, r"latents: expected a TrajectoryCache \(states='trajectory'\), got samples"),
        (
            cache,
            "2",
            {},
            r"latents: expected states of 2 on trailing:5, got guidance: expected '2', got '4@0",
        ),
        (cache, WINDOW, {"grid": "trailing:10"}, "latents: expected states of .* got grid: expected 'trailing:10'"),
        (cache, WINDOW, {"grid": None}, "grid: expected that of the trajectories"),
        (cache, WINDOW, {"weights": Weights(1, 0, 1)}, r"weights\.task: expected 0 for the states"),
        (cache, WINDOW, {"probability": "exp"}, "probability: expected the same at every timestep"),
        (cache, WINDOW, {"states": "noised"}, "latents: expected samples to be noised"),
        (cache, WINDOW, {"states": "other"}, "states"),
    ):
        with pytest.raises(InputError, match=message):
            trainer(latents, GuidanceDistillation(schedule, **PLAIN | changes))
    with pytest.raises(InputError, match="latents: expected samples to be noised"):
        trainer(cache, tiny.features())
    with pytest.raises(StorageError, match="latent_cache"):
        LatentCache.load(place)
    with pytest.raises(InputError, match=r"step: expected torch\.int64 \(25,\)"):
        TrajectoryCache(cache.latents, cache.prompt_index, cache.fingerprint)
    with pytest.raises(InputError, match="fingerprint: expected guidance and grid of the sampler"):
        TrajectoryCache(cache.latents, cache.prompt_index, {}, cache.step)
    with pytest.raises(InputError, match="guidance: expected thresholds of sigma"):
        make(tmp_path / "nothing", schedule="2@1e6,0")
    assert not (tmp_path / "nothing").exists()
