# SPDX-License-Identifier: Apache-2.0
"""Arguments of adapters and banks with a wrong type: each is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from fastdistill import Adapters, LatentCache, PromptBank
from fastdistill.diffusion.scheduled import sample_with
from fastdistill.errors import InputError
from tests import tiny


@pytest.mark.parametrize("seed", ["x", None, 1.5, 2**64, True])
def test_a_seed_is_an_int64(seed: Any) -> None:
    with pytest.raises(InputError, match=r"^seed: expected an int64, got "):
        Adapters([(2, 3)], seed=seed)


def test_a_seed_of_numpy() -> None:
    assert torch.equal(Adapters([(2, 3)], seed=np.int64(3))[0].weight, Adapters([(2, 3)], seed=3)[0].weight)


@pytest.mark.parametrize("features", [None, 3, "x", ["x"], [None], [torch.ones(())], [torch.ones(2, 2).to_sparse()]])
def test_features_of_adapters(features: Any) -> None:
    with pytest.raises(InputError, match=r"^features(\[0\])?: expected "):
        Adapters([(2, 3)])(features)


def test_sparse_banks_are_refused() -> None:
    latents, index, rows = torch.ones(2, 4, 3), torch.zeros(2, dtype=torch.int64), torch.ones(3, 5, 6)
    for argument, make in {
        "latents": lambda: LatentCache(latents.to_sparse(), index),
        "prompt_index": lambda: LatentCache(latents, index.to_sparse()),
        "embeddings": lambda: PromptBank(rows.to_sparse(), ["a", "b"]),
        "banks\\[.pooled.\\]": lambda: PromptBank({"pooled": rows.to_sparse()}, ["a", "b"]),
    }.items():
        with pytest.raises(InputError, match=rf"^{argument}: expected a dense tensor"):
            make()


DRAWS: list[tuple[str, Any]] = [
    ("seed", "x"),
    ("seed", 2**63),
    ("rows", [0, 1]),
    ("rows", torch.ones(2)),
    ("rows", torch.arange(3)),
]


@pytest.mark.parametrize(("argument", "wrong"), DRAWS)
def test_what_a_sampler_draws_by(argument: str, wrong: Any) -> None:
    model, banks = tiny.Net(), tiny.bank().embeddings[:2]
    with pytest.raises(InputError, match=rf"^{argument}: expected "):
        sample_with(DDIMScheduler(), model, torch.ones(2, 4, 5, 3), banks, steps=1, **{argument: wrong})
