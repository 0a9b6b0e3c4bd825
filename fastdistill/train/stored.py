# SPDX-License-Identifier: Apache-2.0
"""The state in a checkpoint on disk: a tensor is read on access, and only the required part of it.

A checkpoint is ``step-N.safetensors``. For a student sharded over n ranks this is rank 0's file; it contains the hashes
of the other ranks' files ``step-N.rank-i-of-n.safetensors``. For each shard a file states the ``shape`` of the whole
tensor and the ``offset`` of the shard, an index in each dimension; other tensors are in one file only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from fastdistill.data.fingerprint import sha256_of_tensors
from fastdistill.errors import StorageError, described
from fastdistill.files import json_value, reason
from fastdistill.schemas import CHECKPOINT
from fastdistill.train import distributed

SCHEMA = CHECKPOINT.version
_NO_CHECKPOINT = (
    safetensors.SafetensorError, AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError
)  # fmt: skip
Region = tuple[tuple[int, ...], tuple[int, ...]]  # offset and size


class DamagedError(StorageError):
    """A checkpoint that is incomplete or was changed after it was written."""


@dataclass(frozen=True)
class _Piece:
    offset: tuple[int, ...]
    tensor: Tensor  # on the disk, mapped into memory


def rank_file(path: Path, rank: int, ranks: int) -> Path:
    """The file of a rank of the checkpoint ``path``, which is rank 0's."""
    return path.with_name(f"{path.stem}.rank-{rank}-of-{ranks}.safetensors") if rank else path


def rank_files(directory: Path) -> Iterator[tuple[Path, Path]]:
    """The files of ranks but 0 in a directory, each with that of rank 0, which need not be there."""
    for file in directory.glob("step-*.rank-*-of-*.safetensors"):
        yield file, file.with_name(f"{file.name.split('.')[0]}.safetensors")


class Stored(Mapping[str, Any]):
    """The tensors and JSON values of a checkpoint by name. ``head``: its metadata, of rank 0's file.

    Nothing is allocated except for a cut tensor that is asked for, which is at most as large as the files.

    Raises:
        StorageError: a file cannot be read or is of another schema; DamagedError where one is not there or is no
            checkpoint, or where the parts of a tensor do not make up the whole. Hashes are not looked at.
    """

    def __init__(self, path: Path) -> None:
        file, self.head = _opened(path)
        if not isinstance(self.head.get("values"), dict):
            raise DamagedError(f"{path}: damaged, not a checkpoint (values is {described(self.head.get('values'))})")
        hashes = self.head.get("files", [])
        self._files = {path: (file, self.head["sha256"])}
        self._pieces: dict[str, list[_Piece]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._add(path, file, self.head)
        for number, sha256 in enumerate(hashes, 1):
            place = rank_file(path, number, 1 + len(hashes))
            file, head = _opened(place)
            if head.get("step") != self.head["step"]:
                raise DamagedError(f"{place}: damaged, of another step than {path.name}")
            self._files[place] = file, sha256
            self._add(place, file, head)
        for name, pieces in self._pieces.items():
            if not _tiled(self._shapes[name], [(piece.offset, tuple(piece.tensor.shape)) for piece in pieces]):
                raise DamagedError(f"{path}: damaged, the parts of {name} do not make up {list(self._shapes[name])}")

    def verify(self, number: int = 0, count: int = 1) -> None:
        """Read every ``count``-th file from ``number`` on, block by block; DamagedError if a hash does not match."""
        first = next(iter(self._files))
        for place, (file, sha256) in list(self._files.items())[number::count]:
            if sha256_of_tensors({name: file.get_tensor(name) for name in file.keys()}) != sha256:  # noqa: SIM118
                who = "it" if place == first else first.name
                raise DamagedError(f"{place}: damaged, its tensors do not have the hash {who} states")

    def outline(self) -> dict[str, Any]:
        """Tensors on the meta device and JSON values by name; nothing is read."""
        tensors = {
            name: torch.empty(self._shapes[name], dtype=pieces[0].tensor.dtype, device="meta")
            for name, pieces in self._pieces.items()
        }
        return {**tensors, **self.head["values"]}

    def part(self, name: str, like: Tensor) -> Tensor:
        """The part of a tensor that this rank has of ``like`` (of the same shape); all of it without shards."""
        here = distributed.part_of(like)
        return self._read(name, (here.offset, tuple(here.local.shape)))

    def __getitem__(self, name: str) -> Any:
        if name in self.head["values"]:
            return self.head["values"][name]
        shape = self._shapes[name]
        return self._read(name, ((0,) * len(shape), shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes | self.head["values"])

    def __len__(self) -> int:
        return len(self._shapes | self.head["values"])

    def _add(self, place: Path, file: Any, head: Mapping[str, Any]) -> None:
        try:
            parts = head.get("parts", {})
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                stated = parts.get(name, {"shape": tensor.shape, "offset": (0,) * tensor.ndim})
                shape, offset = (tuple(map(int, stated[key])) for key in ("shape", "offset"))
                pieces = self._pieces.setdefault(name, [])
                same = not pieces or (self._shapes[name], pieces[0].tensor.dtype) == (shape, tensor.dtype)
                if not same or not len(shape) == len(offset) == tensor.ndim:
                    raise ValueError(f"{name} is of another kind than in other files")
                self._shapes[name] = shape
                pieces.append(_Piece(offset, tensor))
        except _NO_CHECKPOINT as error:
            raise DamagedError(f"{place}: damaged, not a checkpoint ({error})") from error

    def _read(self, name: str, region: Region) -> Tensor:
        """A region of a tensor: memory-mapped if one file has exactly this region, else copied."""
        pieces = self._pieces[name]
        for piece in pieces:
            if (piece.offset, tuple(piece.tensor.shape)) == region:
                return piece.tensor
        out = torch.empty(region[1], dtype=pieces[0].tensor.dtype, device="cpu")
        for piece in pieces:
            common = [
                (max(start, first), min(start + size, first + length))
                for start, size, first, length in zip(*region, piece.offset, piece.tensor.shape, strict=True)
            ]
            if all(start < end for start, end in common):
                into, of = (
                    tuple(slice(start - first, end - first) for (start, end), first in zip(common, origin, strict=True))
                    for origin in (region[0], piece.offset)
                )
                out[into] = piece.tensor[of]
        return out


def _opened(path: Path) -> tuple[Any, dict[str, Any]]:
    """A file and its metadata; the values of its tensors are not read."""
    try:
        file = safetensors.safe_open(path, framework="pt")
        head = json_value((file.metadata() or {})["fastdistill"])
        schema, stated = head["schema"], (head["sha256"], *head.get("files", []))
        if not all(isinstance(each, str) for each in stated):
            raise ValueError("other metadata")
        CHECKPOINT.check(schema, path)
    except StorageError:
        raise
    except FileNotFoundError as error:
        raise DamagedError(f"{path}: damaged, not there") from error
    except OSError as error:
        raise StorageError(f"{path}: could not be read: {reason(error)}") from error
    except _NO_CHECKPOINT as error:
        raise DamagedError(f"{path}: damaged, not a checkpoint ({error})") from error
    return file, head


def _tiled(shape: tuple[int, ...], regions: Sequence[Region]) -> bool:
    """Whether regions along one dimension cover the whole tensor without overlap."""
    cut = {d for _, size in regions for d, length in enumerate(size) if length != shape[d]}
    if len(cut) > 1 or any(start for offset, _ in regions for d, start in enumerate(offset) if d not in cut):
        return False
    if not cut:
        return len(regions) == 1
    dimension, end = cut.pop(), 0
    for offset, size in sorted(regions):
        if offset[dimension] != end or size[dimension] == 0:
            return False
        end += size[dimension]
    return end == shape[dimension]
