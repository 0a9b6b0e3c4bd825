# SPDX-License-Identifier: Apache-2.0
"""A prompt bank with several named banks: created, stored, moved and used for training like a single one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.data.prompt_bank import PromptBank
from fastdistill.errors import InputError
from tests import tiny
from tests.models import tiny_families as small

TEXTS = ["a", "bc", "def"]


def encode(texts: list[str]) -> dict[str, Tensor]:
    lengths = torch.tensor([float(len(text)) for text in texts])
    mask = torch.tensor([[1, len(text) > 1] for text in texts])
    return {"encoder_hidden_states": lengths[:, None, None].expand(-1, 2, 3), "mask": mask, "label": lengths.long()}


def test_every_bank_has_a_row_a_text(tmp_path: Path) -> None:
    bank = PromptBank.build(TEXTS, encode, batch=2)
    assert bank.rows is bank.banks and bank.banks["label"].tolist() == [1, 2, 3, 0]
    assert torch.equal(bank.embeddings, encode([*TEXTS, ""])["encoder_hidden_states"])
    part = bank.subset(["def"]).banks
    assert part["label"].tolist() == [3, 0] and part["mask"].tolist() == [[1, 1], [1, 0]]
    half = bank.to(dtype=torch.float16)
    assert [b.dtype for b in half.banks.values()] == [torch.float16, torch.int64, torch.int64]
    bank.save(tmp_path)
    for found in (PromptBank.load(tmp_path), PromptBank.open(tmp_path), half):
        assert found.identity == bank.identity and found.banks.keys() == bank.banks.keys()
        for name, rows in bank.banks.items():
            assert torch.equal(found.banks[name][:].to(rows.dtype), rows)
    assert PromptBank.load(tmp_path, dtype=torch.bfloat16).banks["label"].dtype == torch.int64
    labels = PromptBank({"label": torch.arange(4)}, TEXTS)
    assert labels.identity != bank.identity and list(labels.rows) == ["label"]
    with pytest.raises(InputError, match=r"prompts: expected a bank encoder_hidden_states, got only label"):
        _ = labels.embeddings


@pytest.mark.parametrize(("banks", "message"), [
    ({}, "banks: expected a tensor, or tensors by name, got []"),
    ({"a": torch.zeros(3, 2)}, "banks['a']: expected [3 texts + 1, ...], at least one text, got torch.float32 (3, 2)"),
    ({"a": torch.zeros(())}, "banks['a']: expected [3 texts + 1, ...]"),
    ({"a": [1, 2]}, "banks['a']: expected a tensor or StoredRows, got list"),
    ({"a": torch.tensor([0.0, 1.0, float("nan"), 0.0])}, "banks['a']: expected finite values, got others in row 2"),
    ({"encoder_hidden_states": torch.zeros(4, 2)}, "embeddings: expected floating point [3 texts + 1, length, width]"),
])  # fmt: skip
def test_banks_that_do_not_fit(banks: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        PromptBank(banks, TEXTS)


def test_encodings_that_change_are_refused() -> None:
    def changing(texts: list[str]) -> dict[str, Tensor]:
        return encode(texts) if "a" in texts else {"label": torch.zeros(len(texts))}

    with pytest.raises(InputError, match=r"encode\(texts\): expected banks encoder_hidden_states, mask, label, as bef"):
        PromptBank.build(TEXTS, changing, batch=2)
    with pytest.raises(InputError, match=r"encode\(texts\)\['label'\]: expected \[2 texts, \.\.\.\]"):
        PromptBank.build(TEXTS, lambda texts: {"label": torch.zeros(1)}, batch=2)


def test_a_run_is_the_same_from_memory_and_from_the_disk(tmp_path: Path) -> None:
    bank = small.bank("flux")
    bank.save(tmp_path)
    losses = []
    for prompts in (bank, PromptBank.load(tmp_path), PromptBank.open(tmp_path)):
        tap = (small.tap("flux"),) * 2
        data = {"latents": small.cache("flux"), "prompts": prompts}
        with tiny.trainer(small.model("flux"), small.model("flux", 1), tiny.features(tap), **data) as run:
            losses.append([entry["loss"] for entry in run.fit().history])
    assert losses[0] == losses[1] == losses[2]
