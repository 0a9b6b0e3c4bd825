# SPDX-License-Identifier: Apache-2.0
"""Banks that are encoded on demand equal stored banks; only the time of encoding differs."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.data.encoded import EncodedRows, rows_of
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.data.stored import StoredRows
from fastdistill.errors import InputError

TEXTS = ["a cat", "dogs", "", "a cat", "trees"]
MADE = {"sha256": "0" * 64}
NOT_FINITE = r"expected finite values within \+-65504, the range of torch.float16, got others for 'b'"


def lengths(texts: list[str]) -> dict[str, Tensor]:
    """The letters of each text and their number, independent of the batch size."""
    letters = [[float(ord(text[i])) if i < len(text) else 0.0 for i in range(6)] for text in texts]
    return {
        "encoder_hidden_states": torch.tensor(letters).reshape(-1, 3, 2) / 7,
        "length": torch.tensor([len(text) for text in texts]),
    }


def null(text: str) -> dict[str, Tensor]:
    return {name: rows - 1 for name, rows in lengths([text]).items()}


class Counted:
    """``lengths``, with a record of its calls."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, texts: list[str]) -> dict[str, Tensor]:
        self.asked.append(texts)
        return lengths(texts)


@pytest.fixture
def both() -> tuple[PromptBank, PromptBank, Counted]:
    encode, options = Counted(), {"encode_null": null, "null_text": "none", "encoder": MADE}
    with pytest.warns(UserWarning, match="1 empty and 1 repeated"):
        built = PromptBank.build(TEXTS, lengths, **options)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="1 empty and 1 repeated"):
        return built, PromptBank.on_demand(TEXTS, encode, batch=2, **options), encode  # type: ignore[arg-type]


def same(one: Any, two: Any) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_it_is_the_bank_that_is_built(both: tuple[PromptBank, PromptBank, Counted], tmp_path: Path) -> None:
    built, bank, encode = both
    assert not encode.asked  # the null prompt has a function of its own
    assert bank.identity == built.identity and len(bank) == 5 and bank.null_index == 5
    assert {n: (b.shape, b.dtype, b.ndim) for n, b in bank.banks.items()} == {
        n: (b.shape, b.dtype, b.ndim) for n, b in built.banks.items()
    }
    assert torch.equal(bank.null, built.null)
    for index in (slice(1, 4), -1, [5, 0, 0], torch.tensor([3, 5]), (slice(None), 1, 0), torch.arange(6) % 2 == 0):
        assert torch.equal(bank.embeddings[index], built.embeddings[index])
    assert same(bank.subset(["trees", "dogs"]).banks, built.subset(["trees", "dogs"]).banks)
    assert same(bank.to().banks, built.banks)
    bank.check_finite()
    bank.save(tmp_path / "bank")
    assert same(PromptBank.load(tmp_path / "bank").banks, built.banks)


def test_a_text_is_encoded_once_for_all_banks(both: tuple[PromptBank, PromptBank, Counted]) -> None:
    built, bank, encode = both
    index = torch.tensor([4, 5, 4, 0, 1, 5])
    assert same(rows_of(bank.banks, index, "cpu"), {name: rows[index] for name, rows in built.banks.items()})
    assert encode.asked == [["a cat", "dogs"], ["trees"]]
    assert same(rows_of(bank.banks, torch.tensor([5])), {name: rows[5:] for name, rows in built.banks.items()})
    assert same(rows_of(bank.banks, index[:0]), {name: rows[:0] for name, rows in built.banks.items()})
    assert len(encode.asked) == 2


def test_rows_of_banks_of_every_kind(both: tuple[PromptBank, PromptBank, Counted], tmp_path: Path) -> None:
    built, bank, _ = both
    built.save(tmp_path / "bank")
    mixed = {"a": bank.embeddings, "b": built.embeddings, "c": PromptBank.open(tmp_path / "bank").embeddings}
    assert isinstance(mixed["a"], EncodedRows) and isinstance(mixed["c"], StoredRows)
    for index in (torch.tensor([3, 1]), slice(-2, None)):
        for rows in rows_of(mixed, index).values():
            assert torch.equal(rows, built.embeddings[index])
    assert torch.equal(rows_of(bank.embeddings, torch.tensor([2])), built.embeddings[2:3])


def test_rows_are_cast_and_never_of_two_threads_at_once() -> None:
    inside, most = threading.Semaphore(0), []

    def encode(texts: list[str]) -> dict[str, Tensor]:
        inside.release()
        most.append(inside._value)
        rows = lengths(texts)
        inside.acquire()
        return rows

    bank = PromptBank.on_demand(["a", "b", "c"], encode, encoder=MADE, dtype=torch.float16)
    threads = [threading.Thread(target=lambda: [bank.embeddings[:] for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) == 201
    assert bank.embeddings.dtype == bank.embeddings[0].dtype == torch.float16
    assert bank.banks["length"].dtype == bank.banks["length"][1].dtype == torch.int64
    assert torch.equal(bank.embeddings[:3], lengths(["a", "b", "c"])["encoder_hidden_states"].half())


def test_what_it_cannot_be_made_of_is_refused() -> None:
    for options, message in (
        ({"encoder": {}}, "encoder: expected what identifies the text encoder, as no values do, got nothing"),
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"dtype": torch.int64}, "dtype: expected a floating-point type"),
        ({"null_text": 3}, "null_text: expected a str"),
        ({"encode_null": lambda text: lengths([text, text])}, r"encode_null\(text\)\['encoder_hidden_states'\]"),
    ):
        with pytest.raises(InputError, match=message):
            PromptBank.on_demand(["a"], lengths, **{"encoder": MADE} | options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: rows / torch.tensor([1.0, 0.0]).reshape(2, 1, 1),
            NOT_FINITE,
        ),
        (
            lambda rows: rows * torch.tensor([1.0, 1e5]).reshape(2, 1, 1),
            NOT_FINITE,
        ),
        (lambda rows: rows[:, :2], r"expected \[2 texts, length, width\], the same for all, got \(2, 2, 2\)"),
        (lambda rows: rows.double(), "expected torch.float32, as before, got torch.float64"),
    ],
)
def test_an_encoding_that_does_not_fit_is_named_when_it_is_read(change: Any, message: str) -> None:
    def encode(texts: list[str]) -> dict[str, Tensor]:
        rows = lengths(texts)
        return rows if texts != ["a", "b"] else rows | {"encoder_hidden_states": change(rows["encoder_hidden_states"])}

    bank = PromptBank.on_demand(["a", "b"], encode, encoder=MADE, dtype=torch.float16)
    with pytest.raises(InputError, match=r"encode\(texts\)\['encoder_hidden_states'\]: " + message):
        bank.banks["length"][:]
