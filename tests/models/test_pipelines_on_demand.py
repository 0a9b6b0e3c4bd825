# SPDX-License-Identifier: Apache-2.0
"""Every pipeline encodes prompts during training: the rows of a stored bank except for rounding."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistill.data.encoded import rows_of
from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.distill import RandomConditioning, Weights
from fastdistill.models.families.pipeline import _Truncated
from fastdistill.models.pipelines import PipelineFolder, open_pipeline
from fastdistill.train import DistillTrainer
from tests.harness import EPS
from tests.models import tiny_pipelines as tiny
from tests.models.tiny_pipelines import SIZE

Folders = Callable[[str], Path]
QUICK = ("dit", "sdxl", "sana")
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in tiny.PIPELINES]
TEXTS = ["a cat", "dogs", "a house by the sea", "trees"]


def bound(rows: torch.Tensor) -> float:
    """A batch of another size sums in another order: some roundings in each of the few operations of two layers, none
    of which enlarges its input much (as in the tests of the pipelines' encoding)."""
    return 64 * EPS * float(rows.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_of_a_stored_bank(pipelines: Folders, name: str) -> None:
    folder = open_pipeline(pipelines(name))
    texts = ["tom", "12", "7", "dog"] if name == "dit" else TEXTS
    pipeline = folder.encoders()
    options: dict[str, Any] = {"size": SIZE, "batch": 3}
    stored = folder.encode(texts, pipeline, **options)
    bank = folder.encode(texts, pipeline, on_demand=True, **options)
    assert bank.identity == stored.identity and list(bank.banks) == list(stored.banks)
    index = torch.tensor([3, 4, 1, 3, 0])  # 4 is the null prompt
    found, wanted = rows_of(bank.banks, index), rows_of(stored.banks, index)
    for key, rows in wanted.items():
        assert found[key].dtype == rows.dtype and found[key].shape == rows.shape
        if rows.dtype.is_floating_point:
            assert (found[key] - rows).abs().max() <= bound(rows), key
            assert torch.equal(found[key][1], rows[1])
        else:
            assert torch.equal(found[key], rows)


def test_truncated_prompts_are_told_of_once(pipelines: Folders) -> None:
    """Not at every step."""
    folder = open_pipeline(pipelines("sdxl"))
    bank = folder.encode(["a cat", "a very long prompt"], size=SIZE, on_demand=True)
    name, said = "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl", []
    _Truncated.told.discard(name)

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage()[:40])

    logger, handler = logging.getLogger(name), Heard()
    logger.addHandler(handler)
    try:
        for _ in range(3):
            assert bank.embeddings[1].isfinite().all()
        logger.warning("something else")
    finally:
        logger.removeHandler(handler)
    assert said == ["The following part of your input was tru", "something else"]
    assert not any(isinstance(own, _Truncated) for own in logger.filters)


def losses(folder: PipelineFolder, prompts: PromptBank) -> torch.Tensor:
    """The losses of two steps with an update after each."""
    teacher, student = folder.model(), tiny.noisy(folder.model(), 1)
    shape = folder.latent_shape(SIZE)
    latents = torch.randn(6, *shape, generator=torch.Generator().manual_seed(5))
    config = {"steps": 2, "batch": 2, "log_every": 1, "lr": 1e-4, "eps": 1e-2}
    objective = RandomConditioning(weights=Weights(1.0, 0.0))
    cache = LatentCache(latents, torch.arange(6) % 3)
    with DistillTrainer(teacher, student, folder.scheduler(), cache, prompts, objective, config) as trainer:
        return torch.tensor([metrics["loss"] for metrics in trainer.fit().history], dtype=torch.float64)


def test_losses_are_those_of_a_stored_bank(pipelines: Folders) -> None:
    """Within the change of the losses if every value of the bank is moved by its rounding bound."""
    folder = open_pipeline(pipelines("sdxl"))
    stored = folder.encode(TEXTS, size=SIZE)
    signs = torch.Generator().manual_seed(6)
    moved = {
        key: rows + bound(rows) * (2.0 * torch.randint(2, rows.shape, generator=signs) - 1)
        for key, rows in stored.banks.items()
    }
    moved["time_ids"] = stored.banks["time_ids"]  # sizes, which are exact
    wanted = losses(folder, stored)
    found = losses(folder, folder.encode(TEXTS, size=SIZE, on_demand=True))
    change = (losses(folder, PromptBank(moved, TEXTS)) - wanted).abs().max() + 4 * EPS * wanted.max()
    assert (found - wanted).abs().max() <= change
    other = losses(folder, folder.encode([text + "s" for text in TEXTS], size=SIZE, on_demand=True))
    assert (other - wanted).abs().max() > 10 * change
