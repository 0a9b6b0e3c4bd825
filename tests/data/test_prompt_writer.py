# SPDX-License-Identifier: Apache-2.0
"""Banks written during their encoding equal those of ``PromptBank.build``, also if interrupted or shared."""

from __future__ import annotations

import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import build_prompt_bank
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.errors import InputError, StorageError
from tests import processes
from tests.data.caches import content

TEXTS = [f"{'a' * (n % 5)}{n}" for n in range(23)]
ENCODER = {"weights": "e" * 64}


def encode(texts: list[str]) -> dict[str, Tensor]:
    numbers = torch.tensor([float(len(text)) for text in texts])
    rows = numbers[:, None, None].expand(-1, 2, 3) / 7
    return {"encoder_hidden_states": rows, "mask": rows[..., 0] > 0.2, "time_ids": numbers.long()[:, None]}


def encode_null(text: str) -> dict[str, Tensor]:
    return {name: torch.zeros_like(bank) for name, bank in encode([text]).items()}


def build(path: Path, encode: Any = encode, **changes: Any) -> None:
    given = {"encoder": ENCODER, "encode_null": encode_null, "batch": 4, "rows_per_shard": 6}
    build_prompt_bank(path, TEXTS, encode, **(given | changes))


@pytest.mark.parametrize("rows_per_shard", [6, 23, 24, None])  # the null prompt in a shard with others, or alone
def test_the_bank_of_build(tmp_path: Path, rows_per_shard: int | None) -> None:
    build(tmp_path, rows_per_shard=rows_per_shard, dtype=torch.float16)
    known = PromptBank.build(TEXTS, encode, encode_null=encode_null, encoder=ENCODER).to(dtype=torch.float16)
    for bank in (PromptBank.open(tmp_path), PromptBank.load(tmp_path)):
        assert (bank.texts, bank.null_text, bank.encoder) == (known.texts, known.null_text, known.encoder)
        assert bank.identity == known.identity == PromptBank(bank.banks, TEXTS, "", ENCODER).identity
        assert set(bank.banks) == set(known.banks)
        for name, rows in known.banks.items():
            assert bank.banks[name].dtype == rows.dtype and torch.equal(bank.banks[name][:], rows)


def test_a_single_tensor_and_a_null_prompt_that_is_encoded_like_any_other(tmp_path: Path) -> None:
    def single(texts: list[str]) -> Tensor:
        return encode(texts)["encoder_hidden_states"]

    build(tmp_path, single, encode_null=None, null_text="no")
    known = PromptBank.build(TEXTS, single, null_text="no", encoder=ENCODER)
    found = PromptBank.load(tmp_path)
    assert torch.equal(found.embeddings, known.embeddings) and found.identity == known.identity


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_an_interrupted_bank_goes_on_with_what_is_there(tmp_path: Path, stop: int) -> None:
    build(tmp_path / "whole")
    calls: list[list[str]] = []

    def interrupted(texts: list[str]) -> dict[str, Tensor]:
        calls.append(texts)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return encode(texts)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "bank", interrupted)
    with pytest.raises(StorageError, match="unfinished"):
        PromptBank.open(tmp_path / "bank")
    progress: list[tuple[int, int]] = []
    build(tmp_path / "bank", progress=lambda *done: progress.append(done))
    assert content(tmp_path / "bank") == content(tmp_path / "whole")
    assert progress[0] == (6 * ((stop - 1) // 2), 24) and progress[-1] == (24, 24) and progress == sorted(set(progress))

    def never(texts: list[str]) -> Any:
        raise AssertionError("encoded again")

    build(tmp_path / "bank", never)


def test_two_processes_make_the_bank_of_one(tmp_path: Path) -> None:
    both = [processes.begin(build, tmp_path / "shared") for _ in range(2)]
    build(tmp_path / "alone")
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    assert content(tmp_path / "shared") == content(tmp_path / "alone")


def wide(texts: list[str]) -> Tensor:
    return torch.ones(len(texts), 2, 1024)


def grown(path: Path) -> int:
    """The growth of a process's memory while it creates a bank of 20,000 prompts."""
    texts = [str(n) for n in range(20_000)]
    build_prompt_bank(path / "small", texts[:2000], wide, encoder=ENCODER, dtype=torch.float16, rows_per_shard=1000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    build_prompt_bank(path / "large", texts, wide, encoder=ENCODER, dtype=torch.float16, rows_per_shard=1000)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def test_memory_holds_a_shard_at_a_time(tmp_path: Path) -> None:
    size = 20_000 * 2 * 1024 * 2
    growth = processes.call(grown, tmp_path)
    assert sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors")) > size
    assert growth < size / 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": {}}, "encoder: expected what identifies the text encoder, as no values do, got nothing"),
        ({"encoder": "clip"}, "encoder: expected a mapping of JSON values, got str"),
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"dtype": torch.int64}, "dtype: expected a floating-point type, got torch.int64"),
        ({"rows_per_shard": 0}, "rows_per_shard: expected at least 1, got 0"),
        ({"null_text": None}, "null_text: expected a str, got None"),
    ],
    ids=str,
)
def test_arguments_are_checked_before_anything_is_written(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        build(tmp_path / "bank", **changes)
    assert not (tmp_path / "bank").exists()


def test_encodings_that_do_not_fit_are_named(tmp_path: Path) -> None:
    def large(texts: list[str]) -> dict[str, Tensor]:
        banks = encode(texts)
        big = torch.tensor([1e5 if text == TEXTS[9] else 1.0 for text in texts])
        return banks | {"encoder_hidden_states": banks["encoder_hidden_states"] * big[:, None, None]}

    message = (
        "encode(texts)['encoder_hidden_states']: expected finite values within +-65504, the range of torch.float16"
    )
    with pytest.raises(InputError, match=re.escape(f"{message}, got others for {TEXTS[9]!r}")):
        build(tmp_path / "half", large, dtype=torch.float16)
    build(tmp_path / "bfloat16", large, dtype=torch.bfloat16)
    with pytest.raises(InputError, match=r"encode\(texts\): expected banks encoder_hidden_states, mask, time_ids"):
        build(tmp_path / "other", lambda texts: {"mask": encode(texts)["mask"]})


def test_a_bank_of_another_encoder_or_order_is_refused(tmp_path: Path) -> None:
    build(tmp_path)
    before = content(tmp_path)
    for changes, named in (
        ({"encoder": {"weights": "f" * 64}}, "encoder.weights"),
        ({"dtype": torch.float16}, "dtype"),
    ):
        different: dict[str, Any] = changes
        with pytest.raises(StorageError, match=f"holds a prompt_bank made differently .*{named}"):
            build(tmp_path, **different)
    with pytest.raises(StorageError, match=r"made differently .*texts\.json"):
        build_prompt_bank(tmp_path, TEXTS[::-1], encode, encoder=ENCODER, encode_null=encode_null, rows_per_shard=6)
    assert content(tmp_path) == before
