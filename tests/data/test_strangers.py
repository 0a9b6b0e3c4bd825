# SPDX-License-Identifier: Apache-2.0
"""Directories and checkpoints with false statements: they are refused before memory is allocated for the stated sizes,
and the message names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.manifest import read_manifest
from fastdistill.data.texts import read_prompts
from fastdistill.errors import StorageError
from fastdistill.files import json_value
from fastdistill.train import checkpoint
from fastdistill.train.writing import write

DEEP = "[" * 100_000 + "]" * 100_000


def _state(manifest: dict[str, Any], **fields: Any) -> None:
    manifest |= fields


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a million of millions of shards": lambda m: _state(m, rows=10**12, rows_per_shard=1),
    "rows that its files do not hold": lambda m: _state(m, rows=2**40, rows_per_shard=2**40, shards=m["shards"][:1]),
    "rows that nothing holds": lambda m: _state(m, rows=10**30),
    "a row that is too large": lambda m: m["tensors"]["latents"].update(shape=[2**40, 2**40]),
    "a size below 0": lambda m: m["tensors"]["latents"].update(shape=[-1, 3, 5]),
    "a size that is infinite": lambda m: m["tensors"]["latents"].update(shape=[float("inf")]),
    "a dtype that no file holds": lambda m: m["tensors"]["latents"].update(dtype="quint8"),
    "an infinite file": lambda m: m["shards"][0].update(bytes=float("inf")),
    "a file of another place": lambda m: m["shards"][0].update(file="../shard-00000.safetensors"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_manifest_that_lies(cache: Path, change: str) -> None:
    file = cache / "manifest.json"
    manifest = json.loads(file.read_text())
    CHANGES[change](manifest)
    file.write_text(json.dumps(manifest))
    for read in (LatentCache.load, LatentCache.open):
        with pytest.raises(StorageError, match=r"damaged|expected|unfinished"):
            read(cache)


def test_rows_without_bytes_are_read_at_once(tmp_path: Path) -> None:
    """Whatever their number is."""
    from fastdistill.data.values import block_rows

    assert block_rows(0) > 2**60 and block_rows(1) == 64 * 2**20


def test_json_that_nests_deep(cache: Path, tmp_path: Path) -> None:
    (cache / "shard-00000.safetensors").write_bytes(len(DEEP).to_bytes(8, "little") + DEEP.encode())
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["shards"][0]["bytes"] = len(DEEP) + 8
    (cache / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StorageError, match=r"shard-00000\.safetensors: damaged: it nests too deep"):
        LatentCache.load(cache)
    (cache / "manifest.json").write_text(DEEP)
    with pytest.raises(StorageError, match=r"manifest\.json: damaged: it nests too deep"):
        read_manifest(cache)
    with pytest.raises(ValueError, match="nests too deep"):
        json_value(DEEP)


HEAD = {"schema": checkpoint.SCHEMA, "step": 3, "seconds": 1.0, "fingerprint": {}, "trained": [], "values": {}}


@pytest.mark.parametrize("name", sorted(HEAD.keys() - {"schema"}))
def test_a_checkpoint_without_a_part_or_with_another_in_its_place(tmp_path: Path, name: str) -> None:
    path, tensors = tmp_path / "step-00000003.safetensors", {"student.a": torch.ones(2)}
    write(path, tensors, HEAD)
    assert checkpoint.read(path)[0].step == 3
    for other in ({}, {name: None}, {name: True}):
        write(path, tensors, {key: value for key, value in HEAD.items() if key != name} | other)
        with pytest.raises(checkpoint.DamagedError, match=r"step-00000003\.safetensors: damaged, not a checkpoint"):
            checkpoint.read(path)


def test_a_table_of_columns_without_names(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path = tmp_path / "prompts.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["", ""]), path)
    with pytest.raises(StorageError, match=r"prompts\.parquet: expected columns of different names, got '' twice"):
        read_prompts(path, column="")
