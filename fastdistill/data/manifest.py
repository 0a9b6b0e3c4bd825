# SPDX-License-Identifier: Apache-2.0
"""``manifest.json``: the contents of a directory of rows, and their origin."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastdistill import files, schemas
from fastdistill.data.fingerprint import dtype_name, sha256_of_json
from fastdistill.data.values import spelled
from fastdistill.errors import StorageError, described

MANIFEST_NAME = "manifest.json"
_MOST = 2**48  # limit of rows, elements of a row and bytes, so that products do not overflow


@dataclass(frozen=True)
class TensorSpec:
    """Shape (without the row axis) and dtype of one tensor of a row."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes per row."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredFile:
    """Size and SHA-256 of a file when it was written."""

    size: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> StoredFile:
        return cls(len(data), hashlib.sha256(data).hexdigest())


@dataclass(frozen=True)
class Manifest:
    """Each shard has ``rows_per_shard`` rows, the last one the rest; ``shards`` maps an index to what is written."""

    kind: str
    fingerprint: dict[str, Any]
    rows: int
    rows_per_shard: int
    tensors: dict[str, TensorSpec]
    attachments: dict[str, StoredFile] = field(default_factory=dict)
    shards: dict[int, StoredFile] = field(default_factory=dict)

    @property
    def shard_count(self) -> int:
        """Number of shards of the finished directory."""
        return -(-self.rows // self.rows_per_shard)

    @property
    def complete(self) -> bool:
        """Whether every shard is written."""
        return len(self.shards) == self.shard_count

    def shard_rows(self, index: int) -> int:
        """Number of rows in shard ``index``."""
        return min(self.rows_per_shard, self.rows - index * self.rows_per_shard)

    def layout(self) -> dict[str, Any]:
        """The fields that must agree, besides the fingerprint, before a writer may continue a directory."""
        return {
            "kind": self.kind,
            "rows": self.rows,
            "rows_per_shard": self.rows_per_shard,
            "tensors": {name: _spec_to_json(spec) for name, spec in self.tensors.items()},
            "attachments": {name: stored.sha256 for name, stored in self.attachments.items()},
        }

    def to_json(self) -> str:
        """The text of ``manifest.json``."""
        value = {
            "format": "fastdistill rows",
            "schema": schemas.ROWS.version,
            "kind": self.kind,
            "complete": self.complete,
            "rows": self.rows,
            "rows_per_shard": self.rows_per_shard,
            "fingerprint": self.fingerprint,
            "fingerprint_sha256": sha256_of_json(self.fingerprint),
            "tensors": {name: _spec_to_json(spec) for name, spec in self.tensors.items()},
            "attachments": [_stored_to_json(name, stored) for name, stored in self.attachments.items()],
            "shards": [
                {**_stored_to_json(shard_name(index), stored), "rows": self.shard_rows(index)}
                for index, stored in sorted(self.shards.items())
            ],
        }
        return json.dumps(value, indent=1) + "\n"


def shard_name(index: int) -> str:
    """File name of shard ``index``."""
    return f"shard-{index:05d}.safetensors"


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of the directory ``path``; StorageError if there is none, or if this version cannot read it."""
    file = files.located(path) / MANIFEST_NAME
    try:
        value = files.json_value(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise StorageError(f"{path}: expected a directory with {MANIFEST_NAME}, got none") from None
    except OSError as error:
        raise StorageError(f"{file}: could not be read: {files.reason(error)}") from error
    except ValueError as error:
        raise StorageError(f"{file}: damaged: {error}; delete {path} and make it anew") from error
    try:
        schemas.ROWS.check(value["schema"], file)
        return _parse(value)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise StorageError(
            f"{file}: damaged: {type(error).__name__} {error}; delete {path} and make it anew"
        ) from error


def _parse(value: Mapping[str, Any]) -> Manifest:
    manifest = Manifest(
        kind=str(value["kind"]),
        fingerprint=dict(value["fingerprint"]),
        rows=_positive(value["rows"]),
        rows_per_shard=_positive(value["rows_per_shard"]),
        tensors={name: _spec_from_json(spec) for name, spec in value["tensors"].items()},
        attachments={_plain_name(entry["file"]): _stored_from_json(entry) for entry in value["attachments"]},
    )
    if value["fingerprint_sha256"] != sha256_of_json(manifest.fingerprint):
        raise ValueError("fingerprint does not have the hash in fingerprint_sha256")
    for entry in value["shards"]:
        index = _index(entry["file"])
        if index >= manifest.shard_count:
            raise ValueError(f"{entry['file']} is none of {manifest.shard_count} shards")
        if entry["rows"] != manifest.shard_rows(index):
            raise ValueError(f"{entry['file']} has {entry['rows']} rows instead of {manifest.shard_rows(index)}")
        manifest.shards[index] = _stored_from_json(entry)
    return manifest


def _spec_to_json(spec: TensorSpec) -> dict[str, Any]:
    return {"shape": list(spec.shape), "dtype": dtype_name(spec.dtype)}


def _spec_from_json(value: Mapping[str, Any]) -> TensorSpec:
    dtype = getattr(torch, value["dtype"], None)
    if not isinstance(dtype, torch.dtype) or spelled(dtype) is None:
        raise ValueError(f"dtype {value['dtype']!r} is not one that safetensors stores")
    return TensorSpec(tuple(_count(size) for size in value["shape"]), dtype)


def _stored_to_json(name: str, stored: StoredFile) -> dict[str, Any]:
    return {"file": name, "bytes": stored.size, "sha256": stored.sha256}


def _stored_from_json(value: Mapping[str, Any]) -> StoredFile:
    return StoredFile(_count(value["bytes"]), str(value["sha256"]))


def _positive(value: object) -> int:
    return _count(value, 1)


def _count(value: object, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= _MOST:
        raise ValueError(f"{described(value)} is not a whole number from {least} to {_MOST}")
    return value


def _index(name: str) -> int:
    found = re.fullmatch(r"shard-(\d{5,15})\.safetensors", name)
    if found is None or shard_name(int(found[1])) != name:
        raise ValueError(f"{described(name)} is not the name of a shard")
    return int(found[1])


def _plain_name(name: str) -> str:
    if name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(f"{name!r} is not the name of a file of this directory")
    return name
