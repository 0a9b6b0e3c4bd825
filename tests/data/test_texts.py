# SPDX-License-Identifier: Apache-2.0
"""Texts of prompts in the forms that people have them, and files of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdistill import read_prompts
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.errors import InputError, StorageError


class Column:
    """What matters of a pandas.Series: values in order, no truth value; of a DataFrame with two axes."""

    def __init__(self, values: list[Any], ndim: int = 1) -> None:
        self.values, self.ndim = values, ndim

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)

    def __bool__(self) -> bool:
        raise ValueError("The truth value of a Series is ambiguous")


def encode(texts: list[str]) -> torch.Tensor:
    assert type(texts) is list and all(type(text) is str for text in texts)
    return torch.tensor([[[len(text), 1.0]] for text in texts])


@pytest.mark.parametrize(
    "texts",
    [
        ["a", "bc"], ("a", "bc"), (t for t in ("a", "bc")), np.array(["a", "bc"]), np.array(["a", "bc"], object),
        Column(["a", "bc"]), {"a": 1, "bc": 2}.keys(),
    ],
    ids=lambda texts: type(texts).__name__,
)  # fmt: skip
def test_every_column_of_texts_is_taken(texts: Any, tmp_path: Path) -> None:
    bank = PromptBank.build(texts, encode)
    assert bank.texts == ["a", "bc"] and bank.embeddings[:, 0, 0].tolist() == [1, 2, 0]
    bank.save(tmp_path)
    assert PromptBank.load(tmp_path).texts == ["a", "bc"]
    assert PromptBank(bank.embeddings, np.array(["a", "bc"])).texts == ["a", "bc"]  # type: ignore[arg-type]
    assert bank.subset(t for t in ["bc"]).texts == ["bc"] and bank.indices_of(np.array(["bc"])).tolist() == [1]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("abc", "texts: expected a list of at least one text, got 'abc'"),
        (b"abc", "texts: expected a list of at least one text, got a bytes"),
        ({"a"}, "texts: expected a list of at least one text, got a set"),
        ({"a": 1}, "texts: expected a list of at least one text, got a dict"),
        (None, "texts: expected a list of at least one text, got NoneType"),
        (Column(["name"], ndim=2), "texts: expected a list of at least one text, got 2 axes"),
        (np.array([["a"]]), "texts: expected a list of at least one text, got 2 axes"),
        (iter(()), "texts: expected a list of at least one text, got []"),
        (["a", None], "texts[1]: expected a str, got None (NoneType)"),
        (["a", b"b"], "texts[1]: expected a str, got b'b' (bytes)"),
        (np.array([b"a"]), "texts[0]: expected a str, got np.bytes_(b'a') (bytes_)"),
        (["a", float("nan")], "texts[1]: expected a str, got nan (float)"),
        (
            ["cut emoji \ud83d"],
            "texts[0]: expected text that UTF-8 can write, got 'cut emoji \\ud83d' (a lone surrogate",
        ),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_other_texts_are_refused_before_anything_is_encoded(texts: Any, message: str) -> None:
    def never(_: list[str]) -> torch.Tensor:
        raise AssertionError("encoded")

    with pytest.raises(InputError) as caught:
        PromptBank.build(texts, never)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"null_text": None}, "null_text: expected a str, got None"),
        ({"null_text": "\udc00"}, "null_text: expected text that UTF-8 can write"),
        ({"encoder": "clip"}, "encoder: expected a mapping of JSON values, got str"),
        ({"encoder": {"weights": torch.ones(1)}}, "encoder: expected values that JSON holds"),
        ({"encode": None}, "encode: expected a function of texts, got NoneType"),
    ],
    ids=str,
)
def test_what_saving_would_need_is_checked_before_anything_is_encoded(changes: dict[str, Any], message: str) -> None:
    def never(_: list[str]) -> torch.Tensor:
        raise AssertionError("encoded")

    with pytest.raises(InputError, match=message):
        PromptBank.build(**({"texts": ["a"], "encode": never} | changes))


def test_empty_and_repeated_texts_are_told_of() -> None:
    with pytest.warns(UserWarning, match=r"texts: 2 empty and 1 repeated texts get rows of their own"):
        bank = PromptBank.build(["a", " ", "a", ""], encode)
    assert bank.texts == ["a", " ", "a", ""]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_file_of_prompts(tmp_path: Path, ending: str, mark: bytes) -> None:
    lines = ["a cat", "", " a cat ", "a\u2028dog", "ein K\u00e4fer", " \t", "a cat"]
    file = tmp_path / "prompts.txt"
    for last in ("", ending):
        file.write_bytes(mark + (ending.join(lines) + last).encode())
        read = read_prompts(file)
        assert read.texts == ["a cat", "a\u2028dog", "ein K\u00e4fer"]
        assert (read.lines, read.empty, read.duplicates) == (7, 2, 2)
        assert read_prompts(file, strip=False, unique=False, skip_empty=False).texts == lines
        assert read_prompts(file, strip=False).texts == ["a cat", " a cat ", "a\u2028dog", "ein K\u00e4fer"]
        assert read_prompts(file, skip_empty=False).texts == ["a cat", "", "a\u2028dog", "ein K\u00e4fer"]
        assert read_prompts(file, unique=False).texts == ["a cat", "a cat", "a\u2028dog", "ein K\u00e4fer", "a cat"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "could not be read: No such file"),
        (b"", "expected at least one prompt, got 0 lines without any"),
        (b"\n \n", "expected at least one prompt, got 2 lines without any"),
        (b"a\nb\n\xff\n", "expected UTF-8, got other bytes in line 3"),
        ("a\nb".encode("utf-16"), "expected UTF-8, got other bytes in line 1"),
    ],
)
def test_a_file_without_prompts(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(StorageError, match=rf"prompts\.txt: {message}"):
        read_prompts(file)
