# SPDX-License-Identifier: Apache-2.0
"""Training from banks in memory or on disk gives the same bits; runs end cleanly."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.data import stored
from fastdistill.data.latent_cache import LatentCache, generate_latent_cache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.distill import Weights
from fastdistill.distill.denoising import Denoising
from fastdistill.errors import InputError, StorageError
from fastdistill.train import DistillTrainer
from fastdistill.train.state import state_of
from tests import small


@pytest.fixture
def directories(tmp_path: Path) -> tuple[Path, Path]:
    cache = small.cache()
    where = tmp_path / "latents", tmp_path / "prompts"
    shape, made = cache.latents.shape[1:], {"made": "by hand"}
    generate_latent_cache(
        where[0], lambda rows, _: cache.latents[rows], cache.prompt_index, shape, torch.float32, made, rows_per_shard=6
    )
    small.bank().save(where[1], rows_per_shard=4)
    return where


def trainer(latents: LatentCache, prompts: PromptBank, objective: Any = None, **options: Any) -> DistillTrainer:
    own = small.teacher()
    made = small.student("bk_base", own)
    objective = objective or small.objective(made, weights=Weights(task=0.5))
    return DistillTrainer(own, made.model, small.SCHEDULE, latents, prompts, objective, small.config(**options))


def state(trainer: DistillTrainer) -> dict[str, Tensor]:
    return state_of(trainer.step, trainer.student)


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("fastdistill-rows")]


class Interrupted(BaseException):  # like a kill: nothing is saved
    pass


@pytest.mark.parametrize("stop_after", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))])
def test_resume_is_exact_and_from_memory_or_the_disk(
    directories: tuple[Path, Path], tmp_path: Path, stop_after: int
) -> None:
    """Start with banks on disk, stop anywhere, continue with one bank in memory: the bits do not change."""
    latents, prompts = directories
    whole = trainer(LatentCache.load(latents), PromptBank.load(prompts))
    whole.fit()

    def stop(done: int, _: object) -> None:
        if done == stop_after:
            raise Interrupted

    opened = LatentCache.open(latents), PromptBank.open(prompts)
    with pytest.raises(Interrupted):
        trainer(*opened).fit(tmp_path / "run", progress=stop)
    assert not readers()
    again = trainer(LatentCache.open(latents, verify=False), PromptBank.load(prompts), ahead=1, banks="pinned")
    again.fit(tmp_path / "run")
    assert same(state(again), state(whole)) and not readers()


def test_every_objective(directories: tuple[Path, Path]) -> None:
    both = [
        trainer(getattr(LatentCache, how)(directories[0]), getattr(PromptBank, how)(directories[1]), Denoising())
        for how in ("load", "open")
    ]
    for one in both:
        one.fit()
    assert same(state(both[0]), state(both[1]))


def test_a_disk_that_fails_ends_the_run_by_name_and_it_can_go_on(
    directories: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents, prompts = LatentCache.open(directories[0]), PromptBank.open(directories[1])
    whole = trainer(latents, prompts)
    whole.fit()
    preadv = stored.os.preadv

    def breaks(done: int, _: object) -> None:
        if done == 3:
            monkeypatch.setattr(stored.os, "preadv", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))

    with pytest.raises(StorageError, match=r"shard-0000\d\.safetensors: could not be read: Input/output error"):
        trainer(latents, prompts, ahead=1).fit(tmp_path / "run", progress=breaks)
    assert not readers()
    monkeypatch.setattr(stored.os, "preadv", preadv)
    again = trainer(latents, prompts)
    again.fit(tmp_path / "run")
    assert same(state(again), state(whole))


def test_an_opened_bank_is_the_loaded_one(directories: tuple[Path, Path]) -> None:
    latents, prompts = LatentCache.open(directories[0]), PromptBank.open(directories[1])
    assert torch.equal(latents.latents[:], small.cache().latents) and latents.latents.device.type == "cpu"
    assert torch.equal(latents.prompt_index, small.cache().prompt_index)
    loaded = PromptBank.load(directories[1])
    assert prompts.identity == loaded.identity and prompts.texts == loaded.texts
    assert torch.equal(prompts.null, loaded.null)
    some = prompts.subset(["prompt 3", "prompt 0"])
    assert torch.equal(some.embeddings, loaded.subset(["prompt 3", "prompt 0"]).embeddings)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("damage", ["flip", "cut", "header", "gone"])
def test_a_damaged_shard_is_named_when_it_is_opened(directories: tuple[Path, Path], damage: str, verify: bool) -> None:
    file = directories[0] / "shard-00001.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        data[{"flip": -1, "header": 3, "cut": -1}[damage]] ^= 0xFF
        file.write_bytes(data[:-1] if damage == "cut" else data)
    if damage == "flip" and not verify:  # only the checksum detects it
        assert len(LatentCache.open(directories[0], verify=False)) == 20
        return
    with pytest.raises(StorageError, match=r"shard-00001\.safetensors: (damaged|missing)"):
        LatentCache.open(directories[0], verify=verify)


def test_what_does_not_fit_is_refused_as_when_loading(directories: tuple[Path, Path]) -> None:
    with pytest.raises(StorageError, match="made differently"):
        LatentCache.open(directories[0], expect={"made": "otherwise"})
    with pytest.raises(InputError, match="prompts: expected rows of width 13"):
        PromptBank.open(directories[1], width=13)
    with pytest.raises(InputError, match="channels"):
        trainer(
            LatentCache(torch.randn(4, 5, 8, 8), torch.zeros(4, dtype=torch.int64)), PromptBank.open(directories[1])
        )
