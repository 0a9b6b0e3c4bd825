# SPDX-License-Identifier: Apache-2.0
"""Training on latents of several shapes, each in a cache of its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from fastdistill.data.buckets import turn
from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.diffusion.flow import FlowSchedule
from fastdistill.errors import FastdistillError, InputError, StorageError
from fastdistill.train import graph
from fastdistill.train.state import state_of
from fastdistill.train.step import TrainStep
from tests import tiny
from tests.models import tiny_families

SHAPES, SIZES = [(5, 3), (3, 5), (4, 4)], [6, 4, 2]


class Interrupted(BaseException):  # like a kill: nothing is saved
    pass


def caches() -> list[LatentCache]:
    g = torch.Generator().manual_seed(1)
    pairs = zip(SIZES, SHAPES, strict=True)
    return [LatentCache(torch.randn(size, 4, *shape, generator=g), torch.arange(size) % 2) for size, shape in pairs]


def trainer(**options: Any) -> Any:
    return tiny.trainer(**{"latents": caches(), "steps": 8, "checkpoint_every": 2} | options)


def state(run: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state_of(run.step, run.student).items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def seen_by(run: Any) -> list[tuple[tuple[int, ...], Tensor]]:
    """The size of the latents and the prompts in each call of the teacher."""
    seen: list[tuple[tuple[int, ...], Tensor]] = []
    forward = run.teacher.forward

    def watched(x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        seen.append((tuple(x.shape[2:]), encoder_hidden_states.clone()))
        return forward(x, timestep, encoder_hidden_states)  # type: ignore[no-any-return]

    run.teacher.forward = watched
    return seen


@pytest.mark.parametrize("options", [{}, {"micro_batch": 2}], ids=str)
def test_steps_draw_from_every_cache_and_a_run_goes_on_exactly(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = trainer(**options)
    seen = seen_by(whole)
    whole.fit()
    parts = 4 // options.get("micro_batch", 4)
    assert [size for size, _ in seen[::parts]] == [SHAPES[turn(SIZES, step)[0]] for step in range(8)]

    def stop(done: int, _: object) -> None:
        if done == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        trainer(**options).fit(tmp_path, progress=stop)
    again = trainer(**options)
    again.fit(tmp_path)
    assert same(state(again), state(whole))
    with pytest.raises(StorageError, match="latents"):
        trainer(latents=caches()[::-1], **options).fit(tmp_path)


def test_one_cache_in_a_list_is_that_cache() -> None:
    one, two = tiny.trainer(latents=[tiny.cache()]), tiny.trainer()
    one.fit()
    two.fit()
    assert same(state(one), state(two)) and one._fingerprint == two._fingerprint


def test_each_cache_may_have_a_bank_of_its_own() -> None:
    banks = [PromptBank({"encoder_hidden_states": torch.full((3, 5, 6), float(i))}, ["a", "b"]) for i in range(3)]
    run = trainer(prompts=banks)
    seen = seen_by(run)
    run.fit()
    assert all(bool((prompts == SHAPES.index(size)).all()) for size, prompts in seen)


def test_sizes_that_sdxl_reads() -> None:
    bank, sizes = tiny_families.bank("sdxl"), [(8, 8), (8, 16)]
    ids = bank.banks["time_ids"]
    rows = [torch.full((6,), size[1], dtype=ids.dtype).expand_as(ids) for size in sizes]  # equal for all prompts
    banks = [PromptBank(bank.banks | {"time_ids": own}, bank.texts) for own in rows]
    latents = [LatentCache(torch.randn(2, 4, *size), torch.arange(2)) for size in sizes]
    models = [tiny_families.model("sdxl", seed) for seed in (0, 1)]
    read: list[tuple[int, float]] = []

    def watched(module: Any, args: Any, given: Any) -> None:
        read.append((args[0].shape[-1], float(given["added_cond_kwargs"]["time_ids"].max())))

    with tiny.trainer(*models, tiny.features(("mid_block", "mid_block")), latents=latents, prompts=banks) as run:
        assert all(b.is_contiguous() for bucket in run._setting.buckets for b in bucket.prompts.values())
        handle = models[0].register_forward_pre_hook(watched, with_kwargs=True)
        assert all(torch.tensor(list(metrics.values())).isfinite().all() for metrics in run.fit().history)
        handle.remove()
    assert sorted(read) == [(8, 8.0), (16, 16.0)]


@pytest.mark.slow
def test_compiled_steps_have_the_losses_of_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TrainStep.compile.__kwdefaults__, "backend", "aot_eager")  # type: ignore[attr-defined]
    eager, compiled = (trainer(execution=execution).fit().history for execution in ("eager", "compiled"))
    for one, two in zip(eager, compiled, strict=True):  # rounding only: different draws would differ by more
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_execution_that_has_one_shape_is_refused() -> None:
    step: Any = SimpleNamespace(counter=SimpleNamespace(device=torch.device("cuda")), shapes=3)
    assert graph.refuse_graph(step, tiny.Net()) == "it draws latents of 3 shapes, and a CUDA graph has one"
    rule = "'compiled': it draws latents of 3 shapes, of which torch compiles 2"
    with torch._dynamo.config.patch(recompile_limit=2), pytest.raises(FastdistillError, match=rule):
        trainer(execution="compiled").fit()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents": [1]}, r"latents\[0\]: expected a LatentCache"),
        (
            {"prompts": [tiny.bank()] * 2},
            "latents: expected one cache or several, with one PromptBank or as many, got 3 and 2",
        ),
        ({"latents": tiny.cache(), "prompts": [tiny.bank()]}, "prompts: expected a PromptBank, as there is one cache"),
        (
            {"latents": [tiny.cache(), LatentCache(torch.zeros(1, 3, 5, 5), torch.tensor([0]))]},
            r"latents\[1\]: expected 4 channels and 2 other sizes, as latents\[0\], got \(3, 5, 5\)",
        ),
        (
            {"latents": [tiny.cache(), tiny.cache(1)]},
            r"latents\[1\]: expected 4 channels and 2 other sizes, as latents\[0\], got \(4, 5\)",
        ),
        (
            {"prompts": [tiny.bank(), tiny.bank(), PromptBank(torch.zeros(3, 4, 6), ["a", "b"])]},
            r"prompts\[2\]\['encoder_hidden_states'\]: expected rows \(5, 6\), as those of prompts\[0\], got \(4, 6\)",
        ),
    ],
)
def test_caches_that_do_not_fit_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trainer(**options)


def test_a_shift_that_goes_by_the_size_needs_sizes_of_as_many_tokens() -> None:
    models, bank = [tiny_families.model("flux", seed) for seed in (0, 1)], tiny_families.bank("flux")

    def run(*sizes: tuple[int, int], **options: Any) -> Any:
        latents = [LatentCache(torch.randn(2, 4, *size), torch.arange(2)) for size in sizes]
        features = tiny.features(("transformer_blocks.0", "transformer_blocks.0"))
        return tiny.trainer(*models, features, latents=latents, prompts=bank, **options)

    dynamic = {"schedule": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)}
    with pytest.raises(InputError, match=r"latents: expected shapes of as many tokens.* got \(4, 4, 4\), \(4, 4, 6\)"):
        run((4, 4), (4, 6), **dynamic)
    run((4, 8), (8, 4), **dynamic).close()
    run((4, 4), (4, 6), schedule=FlowSchedule(50, shift=3.0)).close()
