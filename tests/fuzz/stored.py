# SPDX-License-Identifier: Apache-2.0
"""Caches, banks, checkpoints and saved calls from a stranger: they are read correctly or refused. Memory is allocated
only in proportion to the file's size, and no code in them is executed."""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import torch

from fastdistill.data.fingerprint import sha256_of_json
from fastdistill.data.latent_cache import LatentCache, generate_latent_cache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.ops import feature_match, geglu, group_norm_silu, layer_norm_modulate
from fastdistill.train import checkpoint
from fastdistill.train.profiling import profile_steps, replay
from fastdistill.train.writing import write
from tests.fuzz.damage import BYTES, CHANGES, DEEP, changed, damaged, encoded, read, with_header

Check = Callable[[Any, Counter[str]], None]
Parts = tuple[st.SearchStrategy[Any], Check]
ROWS = 5


@functools.cache
def folder() -> Path:
    """A folder of this process, removed at exit."""
    made = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


@functools.cache
def _directories() -> dict[str, dict[str, bytes]]:
    """The files of a cache and of a bank."""
    rows = torch.arange(ROWS * 6, dtype=torch.float32).view(ROWS, 2, 3)
    generate_latent_cache(
        folder() / "cache", lambda at, _: rows[at], torch.arange(ROWS) % 3, (2, 3), torch.float32,
        {"seed": 3, "a": [1]}, rows_per_shard=2,
    )  # fmt: skip
    banks = {"encoder_hidden_states": torch.ones(4, 2, 3), "mask": torch.ones(4, 2, dtype=torch.bool)}
    PromptBank(banks, ["a", "b", "c"], encoder={"e": 1}).save(folder() / "bank", rows_per_shard=3)
    return {
        kind: {file.name: file.read_bytes() for file in (folder() / kind).iterdir() if file.is_file()}
        for kind in ("cache", "bank")
    }


READERS: dict[str, list[Callable[[Path], Any]]] = {
    "cache": [
        LatentCache.load,
        lambda path: LatentCache.load(path, verify=False, dtype=torch.float16),
        lambda path: LatentCache.open(path).latents[:],
        lambda path: LatentCache.open(path, verify=False).latents[-1],
    ],
    "bank": [
        PromptBank.load,
        lambda path: PromptBank.load(path, verify=False, width=3),
        lambda path: PromptBank.open(path).null,
        lambda path: PromptBank.open(path, verify=False).identity,
    ],
}


def _read(name: str, kind: str, reader: int, counts: Counter[str], what: str) -> None:
    found = read(name, lambda: READERS[kind][reader](folder() / kind), counts, what)
    if isinstance(found, LatentCache):
        assert len(found.latents) == len(found.prompt_index)


def manifests() -> Parts:
    """Manifests with changed values and a correct hash of them."""
    kinds = st.sampled_from(("cache", "bank"))
    drawn = st.tuples(kinds, st.integers(0, 3), CHANGES, st.booleans(), st.none() | BYTES, st.integers(0, 99))

    def check(example: Any, counts: Counter[str]) -> None:
        kind, reader, changes, honest, bytes_changed, deep = example
        original = _directories()[kind]["manifest.json"]
        value = changed(json.loads(original), changes)
        if honest and isinstance(value, dict) and isinstance(value.get("fingerprint"), dict):
            with warnings.catch_warnings():
                value["fingerprint_sha256"] = _hash(value["fingerprint"])
        data = encoded(value) if bytes_changed is None else damaged(original, bytes_changed)
        if deep == 99:
            data = data[:-1] + b', "deep": ' + DEEP.encode() + b"}"
        _put(kind, "manifest.json", data)
        try:
            _read("manifest", kind, reader, counts, f"{example}")
        finally:
            _put(kind, "manifest.json", original)

    return drawn, check


def _hash(fingerprint: Any) -> str:
    try:
        return sha256_of_json(fingerprint)
    except Exception:
        return ""


def _put(kind: str, name: str, data: bytes) -> None:
    (folder() / kind / name).write_bytes(data)


def shards() -> Parts:
    """Shards and attachments with changed bytes or a wrong header, also if the manifest has the correct size and
    hash."""
    kinds = st.sampled_from(("cache", "bank"))
    drawn = st.tuples(
        kinds, st.integers(0, 3), st.integers(0, 9), st.one_of(BYTES, CHANGES), st.booleans(), st.integers(0, 99)
    )

    def check(example: Any, counts: Counter[str]) -> None:
        kind, reader, number, change, honest, deep = example
        files = _directories()[kind]
        names = sorted(name for name in files if name.endswith(".safetensors") or name == "texts.json")
        name = names[number % len(names)]
        data = _changed(files[name], name, change)
        if deep == 99:
            data = len(DEEP).to_bytes(8, "little") + DEEP.encode()
        _put(kind, name, data)
        if honest:
            manifest = json.loads(files["manifest.json"])
            for entry in (*manifest["shards"], *manifest["attachments"]):
                if entry["file"] == name:
                    entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            _put(kind, "manifest.json", encoded(manifest))
        try:
            _read("shard", kind, reader, counts, f"{name} {example}")
        finally:
            _put(kind, name, files[name])
            _put(kind, "manifest.json", files["manifest.json"])

    return drawn, check


def _changed(data: bytes, name: str, change: Any) -> bytes:
    if isinstance(change, tuple):
        return damaged(data, change)
    return encoded(changed(json.loads(data), change)) if name.endswith(".json") else with_header(data, change)


@functools.cache
def _checkpoint() -> bytes:
    state = {"student.a": torch.ones(2, 3), "student.b": torch.arange(4), "counter": torch.tensor([1, 2])}
    head = {
        "schema": checkpoint.SCHEMA,
        "step": 7,
        "seconds": 1.5,
        "fingerprint": {"config": {}},
        "trained": ["student.a"],
    }
    path = folder() / "one.safetensors"
    write(path, state, head | {"values": {"student.c": 1}})
    return path.read_bytes()


SINGLE = st.tuples(st.sampled_from(("bytes", "header", "metadata")), BYTES, CHANGES, st.integers(0, 99))


def _file(data: bytes, example: Any) -> bytes:
    kind, bytes_changed, changes, deep = example
    if deep == 99:
        return len(DEEP).to_bytes(8, "little") + DEEP.encode()
    if kind == "bytes":
        return damaged(data, bytes_changed)
    return with_header(data, changes, metadata=kind == "metadata")


def checkpoints() -> Parts:
    """Checkpoints with changed bytes, tensors or metadata."""

    def check(example: Any, counts: Counter[str]) -> None:
        data = _file(_checkpoint(), example)
        directory = folder() / "checkpoints"
        directory.mkdir(exist_ok=True)
        path = directory / "step-00000007.safetensors"
        path.write_bytes(data)
        read("checkpoint", lambda: checkpoint.read(path), counts, f"{example}")
        read("checkpoint", lambda: checkpoint.newest(directory), counts, f"{example}")

    return SINGLE, check


@functools.cache
def _calls() -> list[bytes]:
    """Saved calls of some ops, forward and backward."""

    def step() -> None:
        x = torch.ones(2, 4, 3, requires_grad=True)
        weight = torch.ones(4, requires_grad=True)
        loss = feature_match([x], [torch.zeros(2, 4, 3)]).loss + geglu(x.mT.contiguous()).sum()
        norms = group_norm_silu(x, weight, None, 2).sum() + layer_norm_modulate(x.mT, weight=weight).sum()
        (loss + norms).backward()

    found = profile_steps(step, folder() / "calls", steps=1, warm_up=0)
    return [path.read_bytes() for _, path in sorted(found.calls.items())]


def kept_calls() -> Parts:
    """Saved calls with changed bytes, tensors or arguments."""

    def check(example: Any, counts: Counter[str]) -> None:
        number, change, kernel = example
        data = _file(_calls()[number % len(_calls())], change)
        path = folder() / "call.safetensors"
        path.write_bytes(data)
        read("kept_call", lambda: replay(path, device="cpu", repeats=1, kernel=kernel), counts, f"{example}")

    return st.tuples(st.integers(0, 20), SINGLE, st.sampled_from((None, "cpp", "reference"))), check
