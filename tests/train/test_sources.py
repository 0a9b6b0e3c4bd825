# SPDX-License-Identifier: Apache-2.0
"""What identifies the data and models of a run on any machine, which do not fit together, and what is not finite."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdistill.data.fingerprint import differences, hashes, plain, up_to_rounding
from fastdistill.data.latent_cache import LatentCache, generate_latent_cache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.distill import RandomConditioning, Weights
from fastdistill.errors import FastdistillError, InputError, StorageError
from fastdistill.models.weights import weights_hash
from fastdistill.train import DistillTrainer
from fastdistill.train.checkpoint import steps
from fastdistill.train.sources import explain
from tests import small
from tests.train.ranks import Tiny


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded(PromptBank):
    """A bank that knows its inputs: texts and encoder."""

    @property
    def identity(self) -> str:
        return f"{hash((*self.texts, self.null_text)) % 2**64:064x}"


def rounded(values: Tensor) -> Tensor:
    """As another processor would have computed them."""
    return values * (1 + 1e-7 * torch.linspace(-1, 1, values.numel(), dtype=values.dtype).reshape(values.shape))


def make(**changes: Any) -> DistillTrainer:
    weights = Weights(1, 0, 0)
    given = {
        "teacher": Tiny(12),
        "student": Tiny(6),
        "schedule": small.SCHEDULE,
        "latents": small.cache(),
        "prompts": Encoded(**vars(small.bank())),
        "objective": RandomConditioning(weights=weights),
        "config": small.config(steps=2),
    }
    return DistillTrainer(**(given | changes))  # type: ignore[arg-type]


def other_machine(**changes: Any) -> dict[str, Any]:
    """The same inputs, computed again on another machine."""
    bank = small.bank()
    abar = small.SCHEDULE.alphas_cumprod
    return {
        "prompts": Encoded(rounded(bank.embeddings), bank.texts),
        "schedule": NoiseSchedule(torch.cat([abar[:1], rounded(abar[1:])])),
        "objective": RandomConditioning(lambda u: u * (1 + 1e-9), weights=Weights(1, 0, 0)),
    } | changes


def test_a_run_goes_on_where_everything_computed_is_rounded_in_another_way(tmp_path: Path) -> None:
    """Also encoded prompts, the tables of schedule and probability, and the student's initial weights."""
    schedule = NoiseSchedule(small.SCHEDULE.alphas_cumprod)
    objective = RandomConditioning(lambda u: u, weights=Weights(1, 0, 0))
    make(schedule=schedule, objective=objective).fit(tmp_path)
    student = Tiny(6)
    with torch.no_grad():
        for p in student.parameters():
            p.copy_(rounded(p))
    again = make(**other_machine(student=student, config=small.config(steps=3)))
    assert again.fit(tmp_path).steps == 3
    linear = NoiseSchedule(NoiseSchedule.linear().alphas_cumprod)
    with pytest.raises(StorageError, match=r"schedule.alphas_cumprod.up_to_rounding: expected"):
        make(**other_machine(schedule=linear)).fit(tmp_path)
    squared = RandomConditioning(lambda u: u * u, weights=Weights(1, 0, 0))
    with pytest.raises(StorageError, match=r"objective.probability.up_to_rounding: expected"):
        make(**other_machine(objective=squared)).fit(tmp_path)


def test_the_sources_that_differ_are_named(tmp_path: Path) -> None:
    make().fit(tmp_path)
    teacher = Tiny(12)
    with torch.no_grad():
        teacher.inner.weight[0, 0, 0, 0] += 1
    with pytest.raises(StorageError, match=r"\(teacher.weights: expected '\w{64}', got '\w{64}'\)"):
        make(teacher=teacher).fit(tmp_path)
    with pytest.raises(StorageError, match=r"teacher.dtype: expected 'bfloat16', got 'float32'"):
        make(teacher=Tiny(12).bfloat16()).fit(tmp_path)
    other = LatentCache(small.cache().latents + 1, small.cache().prompt_index)
    with pytest.raises(StorageError, match=r"\(latents.sha256: expected '\w{64}', got '\w{64}'\)"):
        make(latents=other).fit(tmp_path)
    with pytest.raises(StorageError, match=r"latents.made: expected 7, got nothing; latents.sha256: expected nothing"):
        make(latents=dataclasses.replace(other, fingerprint={"made": 7})).fit(tmp_path)


def test_computed_values_are_compared_with_a_tolerance_and_settings_are_not() -> None:
    table = torch.tensor([1.0, 0.5, 1e-9])
    wanted = plain({"table": up_to_rounding(table), "lr": 1e-3})
    assert not differences(wanted, plain({"table": up_to_rounding(table * (1 + 1e-5)), "lr": 1e-3}))
    for other in (table * 1.01, table[:2], table + 1e-5):
        (line,) = differences(wanted, plain({"table": up_to_rounding(other), "lr": 1e-3}))
        assert line.startswith("table.up_to_rounding: expected [")
    assert differences(wanted, plain({"table": up_to_rounding(table), "lr": 1.0000001e-3}))
    assert differences({"up_to_rounding": ["a"]}, {"up_to_rounding": ["b"]})
    assert plain({"clip": float("inf"), "low": -float("inf")}) == {"clip": "inf", "low": "-inf"}
    assert hashes("ab" * 32, "cd" * 32) and not hashes("ab" * 32, "cd" * 16) and not hashes("SD-1.4", "cd" * 32)


def cached(path: Path, teacher: nn.Module, bank: PromptBank, **more: Any) -> LatentCache:
    source, fingerprint = small.cache(), {"teacher": weights_hash(teacher), "prompts": bank.identity} | more
    index = source.prompt_index
    generate_latent_cache(path, lambda rows, _: source.latents[rows], index, (3, 8, 8), torch.float32, fingerprint)
    return LatentCache.load(path)


def test_a_cache_of_another_teacher_or_bank_is_refused(tmp_path: Path) -> None:
    bank, teacher = small.bank(), Tiny(12)
    cache = cached(tmp_path / "cache", teacher, bank)
    make(latents=cache, prompts=bank).fit(tmp_path / "run")
    half = cached(tmp_path / "half", Tiny(12).half(), bank)
    make(latents=half, prompts=bank)  # made in half precision
    own, given, pool = weights_hash(teacher), weights_hash(Tiny(13)), bank.identity
    with pytest.raises(InputError, match=f"teacher: expected the model {own} that made the latents.*, got {given} "):
        make(latents=cache, prompts=bank, teacher=Tiny(13))
    reordered = bank.subset(bank.texts[::-1])
    with pytest.raises(InputError, match=f"prompts: expected the bank {pool} that .*, got {reordered.identity}"):
        make(latents=cache, prompts=reordered)
    unnamed = dataclasses.replace(cache, fingerprint={})
    make(latents=unnamed, prompts=reordered, teacher=Tiny(13))  # without hashes
    named = dataclasses.replace(cache, fingerprint={"teacher": "SD-1.4", "prompts": "captions 3"})
    make(latents=named, prompts=bank, teacher=Tiny(13))  # with hashes of the user's own


def test_a_cache_moves_to_another_bank_by_its_texts(tmp_path: Path) -> None:
    bank = small.bank()
    cache = cached(tmp_path / "cache", Tiny(12), bank)
    pool = PromptBank(torch.randn(13, 4, 12), ["new", *bank.texts[::-1], "more", "and", "other"])
    moved = cache.remapped(bank, pool)
    assert [pool.texts[row] for row in moved.prompt_index] == [bank.texts[row] for row in cache.prompt_index]
    assert moved.latents is cache.latents and moved.fingerprint["teacher"] == cache.fingerprint["teacher"]
    make(latents=moved, prompts=pool)
    with pytest.raises(InputError, match="prompts: expected the bank"):
        make(latents=moved, prompts=pool.subset(pool.texts[::-1]))
    with pytest.raises(InputError, match=f"made_with: expected the bank {bank.identity}"):
        cache.remapped(pool, bank)
    with pytest.raises(InputError, match="texts: expected prompts of the bank, got 'prompt 0'"):
        cache.remapped(bank, PromptBank(torch.zeros(2, 4, 12), ["new"]))
    clip = PromptBank(bank.embeddings, bank.texts, encoder={"name": "clip"})
    plain_cache = dataclasses.replace(cache, fingerprint={})
    with pytest.raises(InputError, match="prompts: expected the text encoder of made_with, got name: expected 'clip'"):
        plain_cache.remapped(clip, dataclasses.replace(clip, encoder={"name": "t5"}))
    assert not plain_cache.remapped(bank, pool).fingerprint


def test_a_loss_that_is_not_finite_names_its_cause() -> None:
    broken = small.cache()
    broken.latents[17, 1] = torch.nan
    message = r"got loss nan, output nan by step 2; the last checkpoint is intact \(row 17 of latents is not finite\)$"
    with pytest.raises(FastdistillError, match=message):
        make(latents=broken, config=small.config(steps=2, batch=20)).fit()


def test_a_teacher_that_is_not_finite_is_named_by_its_weight(tmp_path: Path) -> None:
    broken = Tiny(12)
    with torch.no_grad():
        broken.outer.bias[1] = torch.nan
    message = r"got loss nan, .* by step 2; the last checkpoint is intact \(the teacher's outer.bias is not finite\)$"
    with pytest.raises(FastdistillError, match=message):
        make(teacher=broken).fit(tmp_path)
    assert not steps(tmp_path)


def test_the_causes_of_a_loss_that_is_not_finite() -> None:
    models = Tiny(12), Tiny(6).half()
    latents, prompts = torch.zeros(5, 2, 3), torch.ones(4, 2, 3)
    assert explain({"latents": latents, "prompts": prompts}, *models).startswith("latents, prompts and the teacher's")
    latents[3] = 1e5
    assert explain({"latents": latents}, *models) == "row 3 of latents is not finite as float16"
    prompts[2, 1, 0] = torch.inf
    assert explain({"prompts": prompts}, *models) == "row 2 of prompts is not finite"
    with torch.no_grad():
        models[0].outer.bias[1] = torch.nan
    assert explain({}, *models) == "the teacher's outer.bias is not finite"
