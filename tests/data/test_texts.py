# SPDX-License-Identifier: Apache-2.0
"""Texts of prompts in several usual forms, and files of them."""

from __future__ import annotations

import csv
import json
import re
import tracemalloc
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
    """Behaves like a pandas.Series (values in order, no truth value), or with two axes like a DataFrame."""

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
        (None, ": could not be read: No such file"),
        (b"", ": expected at least one prompt, got 0 lines without any"),
        (b"\n \n", ": expected at least one prompt, got 2 lines without any"),
        (b"a\nb\n\xff\n", ", line 3: expected UTF-8, got other bytes"),
        ("a\nb".encode("utf-16"), ", line 1: expected UTF-8, got other bytes"),
    ],
)
def test_a_file_without_prompts(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(StorageError, match=rf"prompts\.txt{message}"):
        read_prompts(file)


ROWS = [{"id": "1", "prompt": 'a "cat",\nb'}, {"id": "2", "prompt": "cafe\u0301 \U0001f469\u200d\U0001f680"}]
ROWS += [{"id": "3", "prompt": "\u05d7\u05ea\u05d5\u05dc\u202e"}, {"id": "4", "prompt": "caf\u00e9"}]


def table(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Write these rows to a file, in the format of its ending."""
    match file.suffix:
        case ".parquet":
            parquet = pytest.importorskip("pyarrow.parquet")
            parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), file)
        case ".jsonl":
            file.write_text("\n".join(json.dumps(row, ensure_ascii=place % 2 == 0) for place, row in enumerate(rows)))
        case suffix:
            with file.open("w", newline="", encoding="utf-8-sig") as stream:
                dialect = "excel-tab" if suffix == ".tsv" else "excel"
                writer = csv.DictWriter(stream, list(rows[0]), dialect=dialect)
                writer.writeheader()
                writer.writerows(rows)
    return file


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet", ".CSV"])
def test_tables_of_prompts(tmp_path: Path, suffix: str) -> None:
    file = table(tmp_path / f"prompts{suffix.lower()}", ROWS).rename(tmp_path / f"p{suffix}")
    wanted = [row["prompt"] for row in ROWS]
    assert read_prompts(file).texts == wanted == read_prompts(file, column="prompt").texts
    assert read_prompts(file, column="id").texts == ["1", "2", "3", "4"]
    with pytest.raises(
        InputError, match=r"column: expected one of 'id', 'prompt' in .* \(near: 'prompt'\), got 'promt'"
    ):
        read_prompts(file, column="promt")


def test_long_names_of_columns_are_cut_in_messages(tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text(f"{'x' * 9000},b\n1,2\n")
    for column in (None, "y", "x" * 8000):
        with pytest.raises(InputError, match=r"column: expected .*'x{60}\.\.\.', 'b'") as refused:
            read_prompts(file, column=column)
        assert len(str(refused.value)) < 500 + len(str(file))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_the_column_of_prompts_is_found_or_asked_for(tmp_path: Path, suffix: str) -> None:
    for names, found in ((["words"], "words"), (["id", "Caption"], "Caption"), (["text", "url"], "text")):
        row = {name: f"a {name}" for name in names}
        file = table(tmp_path / f"p{suffix}", [{"id": "1"} | row if "id" in names else row])
        assert read_prompts(file).texts == [f"a {found}"]
    for names in (["id", "words"], ["text", "prompt"], ["a cat on a mat"]):
        file = table(tmp_path / f"p{suffix}", [dict.fromkeys(names, "x")])
        with pytest.raises(InputError, match=r"column: expected the name of the column of prompts in .*, got None"):
            read_prompts(file)


def test_json_lines_of_strings(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('"a"\r\n\r\n"\\ud83d\\ude80 b"\r\n')
    assert read_prompts(tmp_path / "p.jsonl").texts == ["a", "\U0001f680 b"]
    with pytest.raises(InputError, match=r"column: expected none, as .*p\.jsonl is no table, got 'prompt'"):
        read_prompts(tmp_path / "p.jsonl", column="prompt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", 'id,prompt\n1,a\n2,"b\nc"\n3\n', "line 5: expected 2 cells as in its first line, got 1"),
        (
            "p.csv",
            'id,prompt\n1,a\n2,"b\nc\n',
            "line 3: expected cells separated and quoted as in CSV, got unexpected end",
        ),
        ("p.csv", "prompt,prompt\na,b\n", ": expected columns of different names, got 'prompt' twice"),
        ("p.csv", "", ": expected at least one prompt, got 0 lines"),
        ("p.tsv", "id\tprompt\n1\ta\tb\n", "line 2: expected 2 cells as in its first line, got 3"),
        ("p.jsonl", '"a"\n{"prompt": "b"}\n', "line 2: expected a string, got {'prompt': 'b'}"),
        ("p.jsonl", '{"prompt": "b"}\n\n"a"\n', "line 3: expected an object, got 'a'"),
        ("p.jsonl", '{"prompt": "b"}\n{"text": "b"}\n', "line 2: expected a value for 'prompt', got only 'text'"),
        ("p.jsonl", '{"prompt": "b"}\n{"prompt": 3}\n', "line 2, 'prompt': expected a text, got 3"),
        ("p.jsonl", '{"prompt": null}\n', "line 1, 'prompt': expected a text, got None"),
        ("p.jsonl", '"a"\n"\\ud83d"\n', "line 2: expected text that UTF-8 can write, got a lone surrogate at 0"),
        ("p.jsonl", '"a"\na cat\n', "line 2: expected a JSON value, got Expecting value"),
        ("p.json", '["a", "b"]\n', r"line 1: expected a JSON object or string, got ['a', 'b']"),
        ("p.parquet", "no", ": could not be read: "),
        ("p.txt.gz", "no", ": expected a file that is not compressed, got .gz"),
    ],
    ids=str,
)
def test_rows_that_are_no_prompts_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(StorageError, match=re.escape(name) + "(, )?" + re.escape(message)):
        read_prompts(tmp_path / name)


def test_cells_of_parquet_that_are_no_texts(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "p.parquet"
    parquet.write_table(arrow.table({"prompt": ["a", None], "id": [1, 2]}), file)
    with pytest.raises(StorageError, match=r"p\.parquet, row 2, 'prompt': expected a text, got None"):
        read_prompts(file)
    with pytest.raises(StorageError, match=r"p\.parquet, column 'id': expected strings, got int64"):
        read_prompts(file, column="id")
    broken = arrow.Array.from_buffers(
        arrow.string(), 1, [None, arrow.py_buffer(b"\0\0\0\0\1\0\0\0"), arrow.py_buffer(b"\xff")]
    )
    parquet.write_table(arrow.table({"prompt": broken}), file)
    with pytest.raises(StorageError, match=r"p\.parquet, row 1: expected UTF-8 in 'prompt', got other bytes"):
        read_prompts(file)


def test_a_file_is_read_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text("prompt\n" + f"{'a' * 500}\n" * 20_000)
    tracemalloc.start()
    assert read_prompts(file).duplicates == 19_999
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000 < file.stat().st_size
