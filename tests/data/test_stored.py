# SPDX-License-Identifier: Apache-2.0
"""Rows on disk: they are indexed like arrays of NumPy and torch, wherever they are in a file."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdistill.data import values
from fastdistill.data.fingerprint import sha256_of_tensors
from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.data.stored import Part, StoredRows
from fastdistill.errors import InputError, StorageError
from tests.data.caches import make

SHAPE = (7, 3, 4)
VALUES = np.arange(84, dtype=np.float32).reshape(SHAPE)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> StoredRows:
    """VALUES in three files."""
    path, parts = tmp_path_factory.mktemp("rows"), []
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        file = path / f"{start}.bin"
        file.write_bytes(b"before" + VALUES[start:stop].tobytes())
        parts.append(Part(file, 6, stop - start))
    return StoredRows(parts, SHAPE[1:], torch.float32)


def numbers(shape: Any, low: int, high: int) -> Any:
    return hnp.arrays(np.int64, shape, elements=st.integers(low, high))


row_numbers = hnp.arrays(
    st.sampled_from([np.int8, np.int16, np.int32, np.int64]),
    hnp.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=4),
    elements=st.integers(-7, 6),
)
masks = st.integers(1, 3).flatmap(lambda ndim: hnp.arrays(np.bool_, SHAPE[:ndim]))
arrays = st.one_of(
    row_numbers,
    masks,
    hnp.arrays(np.uint8, (3,), elements=st.integers(0, 6)),
    st.tuples(st.just(...), numbers(2, -4, 3)),
    st.tuples(row_numbers, st.integers(-3, 2)),
    st.tuples(st.none(), row_numbers),
    st.tuples(numbers((2, 1), -7, 6), numbers(3, -3, 2)),
)


@settings(max_examples=150, deadline=None)
@given(index=st.one_of(hnp.basic_indices(SHAPE, allow_newaxis=True), arrays))
def test_an_index_reads_what_numpy_reads(rows: StoredRows, index: Any) -> None:
    items = index if isinstance(index, tuple) else (index,)
    expected = VALUES[index]
    backwards = [item for item in items if isinstance(item, slice) and (item.step or 1) < 0]
    if backwards and not (isinstance(items[0], slice) and len(backwards) == 1 and items[0] is backwards[0]):
        return  # torch has no such slices for other dimensions: refused, see below
    read = rows[index]
    assert read.dtype == torch.float32 and np.array_equal(read.numpy(), expected)


@settings(max_examples=100, deadline=None)
@given(index=st.one_of(row_numbers.map(np.int64), masks), kind=st.sampled_from(["tensor", "list", "tuple"]))
def test_tensors_and_lists_read_what_torch_reads(rows: StoredRows, index: np.ndarray, kind: str) -> None:
    tensor = torch.from_numpy(index)
    expected = torch.from_numpy(VALUES)[tensor]
    forms = {"tensor": tensor, "list": index.tolist() if index.size else tensor, "tuple": (tensor, ...)}
    assert torch.equal(rows[forms[kind]], expected)


def test_single_rows_and_loops(rows: StoredRows) -> None:
    for number in (0, 6, -1, -7, np.int16(5), np.uint8(2), torch.tensor(4), torch.tensor(-2), np.array(3)):
        assert np.array_equal(rows[number], VALUES[int(number)])
    assert np.array_equal(torch.stack(list(rows)), VALUES) and len(rows) == 7
    assert np.array_equal(torch.stack(list(reversed(rows))), VALUES[::-1])
    assert np.array_equal(rows[range(1, 4)], VALUES[1:4]) and np.array_equal(rows[(1, 2),], VALUES[[1, 2]])
    assert rows[[]].shape == (0, 3, 4) and rows[5:2].shape == (0, 3, 4)
    loader = torch.utils.data.DataLoader(rows, batch_size=3)  # type: ignore[arg-type]
    assert np.array_equal(torch.cat(list(loader)), VALUES)


@pytest.mark.parametrize(
    "index",
    [
        True, 1.0, "a", np.float32(1), [1.5], ["a"], [None], {0}, [[1], [1, 2]], np.array([1], object),
        torch.tensor([1.0]), torch.tensor([1.0]).bfloat16(), torch.tensor(True), np.zeros(6, bool),
        torch.tensor([1], dtype=torch.uint8), torch.zeros(7, 2, dtype=torch.bool),
        (0, 0, 0, 0), (..., ...), (0, 0, 9), (0, slice(None, None, -1)),
    ],
    ids=repr,
)  # fmt: skip
def test_other_indices_are_refused(rows: StoredRows, index: Any) -> None:
    with pytest.raises(InputError, match=r"^index: expected "):
        rows[index]


@pytest.mark.parametrize("index", [7, -8, [0, 7], torch.tensor([-8, 1]), np.uint64([2**63])], ids=repr)
def test_rows_that_are_not_there(rows: StoredRows, index: Any) -> None:
    with pytest.raises(IndexError, match=r"^row: expected (0|-7) to 6, got "):
        rows[index]


def test_what_would_read_everything_or_write_is_refused(rows: StoredRows) -> None:
    with pytest.raises(TypeError):
        _ = torch.zeros(3, 4) in rows  # type: ignore[operator]
    with pytest.raises(TypeError):
        rows[0] = 1  # type: ignore[index]


@pytest.mark.parametrize(
    "out",
    [torch.empty(2, 3, 4).double(), torch.empty(1, 3, 4), torch.empty(2, 4, 3).mT, torch.empty(2, 3, 4, device="meta")],
)
def test_what_is_read_into_must_fit(rows: StoredRows, out: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"out: expected contiguous torch.float32 \(2, 3, 4\) on cpu, got"):
        rows.read(torch.tensor([0, 1]), out)
    with pytest.raises(InputError, match="row: expected 0 to 6, got -1"):
        rows.read(torch.tensor([0, -1]), torch.empty(2, 3, 4))


@pytest.fixture
def mapped(tmp_path: Path) -> np.memmap:
    """9000 rows with 3 numbers after a header, so that parts of it begin in other pages."""
    np.save(tmp_path / "bank.npy", np.arange(27_000, dtype=np.float32).reshape(9000, 3))
    return np.load(tmp_path / "bank.npy", mmap_mode="r")


@pytest.mark.parametrize(
    "part",
    [
        lambda a: a[6000:], lambda a: a[:6000], lambda a: a[100:][5000:][:7], lambda a: a[8999], lambda a: a[5:6, 1:],
        lambda a: a[::-1][8998:8999], lambda a: a[7:9].reshape(3, 2), lambda a: a[50:60].view(np.int16),
        lambda a: a[17:20].view()[1:],
    ],
)  # fmt: skip
def test_parts_of_a_memmap_are_its_rows(mapped: np.memmap, part: Any) -> None:
    wanted = part(mapped)
    read = StoredRows.of_memmap(wanted)[:]
    assert np.array_equal(read.numpy(), np.array(wanted)) and read.numpy().dtype == wanted.dtype


def test_a_memmap_that_begins_in_another_page(tmp_path: Path) -> None:
    numbers = np.arange(3000, dtype=np.int64)
    (tmp_path / "file").write_bytes(b"x" * 9001 + numbers.tobytes())
    array = np.memmap(tmp_path / "file", np.int64, "r", offset=9001, shape=(1500, 2))
    assert np.array_equal(StoredRows.of_memmap(array[701:])[:].numpy(), numbers.reshape(1500, 2)[701:])


def test_writes_through_a_shared_memmap_are_read(tmp_path: Path) -> None:
    array = np.memmap(tmp_path / "file", np.float16, "w+", shape=(4, 2))
    rows = StoredRows.of_memmap(array)
    array[2] = 5  # not flushed
    assert rows[2].tolist() == [5, 5]


@pytest.mark.parametrize(
    "other",
    [
        lambda a, p: a[::2], lambda a, p: a[::-1], lambda a, p: a[:, 1:], lambda a, p: a.T, lambda a, p: a[[1, 2]],
        lambda a, p: a + 1, lambda a, p: np.asarray(a), lambda a, p: a[3, 1], lambda a, p: a[4:4],
        lambda a, p: np.broadcast_to(a[:1], (3, 3)), lambda a, p: np.memmap(p, "M8[s]", "r"),
        lambda a, p: np.memmap(p, ">f4", "r", shape=(4, 2)), lambda a, p: np.memmap(p, "f4", "c", shape=(4, 2)),
        lambda a, p: np.memmap(p, [("x", "f4")], "r", shape=4), lambda a, p: np.memmap(p, "U1", "r", shape=4),
        lambda a, p: np.memmap(p, "f4", "r", shape=(4, 2), order="F"),
    ],
)  # fmt: skip
def test_other_arrays_are_refused(mapped: np.memmap, tmp_path: Path, other: Any) -> None:
    (tmp_path / "raw").write_bytes(bytes(64))
    with pytest.raises(InputError, match=r"^array: expected "):
        StoredRows.of_memmap(other(mapped, tmp_path / "raw"))


def test_a_file_that_was_replaced(mapped: np.memmap, tmp_path: Path) -> None:
    file = tmp_path / "bank.npy"
    rows = StoredRows.of_memmap(mapped)
    np.save(tmp_path / "other.npy", np.zeros((9000, 3), np.float32))
    os.replace(tmp_path / "other.npy", file)
    with pytest.raises(StorageError, match=r"bank\.npy: replaced since it was opened"):
        rows[3]
    with pytest.raises(StorageError, match=r"bank\.npy: expected the values of the array, got others"):
        StoredRows.of_memmap(mapped)
    file.write_bytes(b"short")
    with pytest.raises(StorageError, match=r"bank\.npy: expected at least \d+ bytes, got 5"):
        StoredRows.of_memmap(mapped)
    file.unlink()
    with pytest.raises(StorageError, match=r"bank\.npy: could not be read: No such file"):
        StoredRows.of_memmap(mapped)


def test_a_shard_that_was_replaced(cache: Path, tmp_path: Path) -> None:
    opened = LatentCache.open(cache)
    make(tmp_path / "other", generate=lambda rows, prompts: torch.zeros(len(rows), 2, 3, 5))
    os.replace(tmp_path / "other" / "shard-00001.safetensors", cache / "shard-00001.safetensors")
    assert opened.latents[5].any()
    with pytest.raises(StorageError, match=r"shard-00001\.safetensors: replaced since it was opened"):
        opened.latents[6]


class Large(TorchDispatchMode):
    """Records the sizes of tensors that ops create and that are larger than two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() > 2 * values.BLOCK:
                self.found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return out


def test_no_bank_on_the_disk_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing, checking and opening work block by block, saving shard by shard; loading needs the result and a
    block."""
    monkeypatch.setattr(values, "BLOCK", 2**14)
    embeddings = torch.randn(257, 8, 512, generator=torch.Generator().manual_seed(0))
    bank = PromptBank(embeddings, [f"prompt {i}" for i in range(256)])
    bank.save(tmp_path / "saved")
    np.save(tmp_path / "bank.npy", embeddings.numpy())
    stored = StoredRows.of_memmap(np.load(tmp_path / "bank.npy", mmap_mode="r"))
    with Large():
        LatentCache(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))  # for imports at first use
    tracemalloc.start()
    try:
        with Large() as large:
            opened = PromptBank.open(tmp_path / "saved")
            memmapped = PromptBank(stored, bank.texts)
            assert sha256_of_tensors({"embeddings": stored}) == sha256_of_tensors({"embeddings": opened.embeddings})
            opened.check_finite()
            assert memmapped.identity == opened.identity
            assert LatentCache(stored, torch.zeros(257, dtype=torch.int64)).identity
            opened.subset(["prompt 3"])
        assert not large.found
        with Large() as large:
            memmapped.save(tmp_path / "again", rows_per_shard=32)
        assert max(large.found.values()) == embeddings[:32].nbytes
        with Large() as large:
            memmapped.save(tmp_path / "again", rows_per_shard=32)  # only checks the existing files
        assert not large.found
        assert tracemalloc.get_traced_memory()[1] < embeddings.nbytes / 2
    finally:
        tracemalloc.stop()
    for make_bank, dtype in (
        (lambda: PromptBank.load(tmp_path / "again"), torch.float32),
        (lambda: PromptBank.load(tmp_path / "again", dtype=torch.float64), torch.float64),
        (lambda: opened.to(dtype=torch.float16), torch.float16),
    ):
        with Large() as large:
            result = make_bank().embeddings
        assert torch.equal(result, embeddings.to(dtype))
        assert list(large.found.values()) == [result.nbytes]
