# SPDX-License-Identifier: Apache-2.0
"""The on-disk format and the latent cache: interruptions, damage and misuse lose no data."""

import json
import os
import re
import time
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdistill.data.fingerprint import sha256_of_tensors
from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.manifest import TensorSpec, read_manifest
from fastdistill.data.shards import RowWriter, load_rows
from fastdistill.errors import InputError, StorageError
from tests import processes
from tests.data.caches import FINGERPRINT, PROMPT_INDEX, content, make, teacher


def test_round_trip(cache):
    loaded = LatentCache.load(cache, expect={"teacher": "a" * 8, "sampler": {"steps": 25, "guidance": 7.5}})
    assert torch.equal(loaded.latents, teacher(torch.arange(23), PROMPT_INDEX).half())
    assert torch.equal(loaded.prompt_index, PROMPT_INDEX)
    assert len(loaded) == 23 and loaded.fingerprint["seed"] == 3
    wide = LatentCache.load(cache, dtype=torch.float32)
    assert wide.latents.dtype == torch.float32 and wide.prompt_index.dtype == torch.int64
    loaded.check_prompts(4)
    loaded.prompt_index[3] = -1
    with pytest.raises(InputError, match="prompt_index: expected rows of a bank of 4 prompts, got row -1"):
        loaded.check_prompts(4)
    loaded.prompt_index[3] = 0
    with pytest.raises(InputError, match="prompt_index: expected rows of a bank of 3 prompts, got row 3"):
        loaded.check_prompts(3)


def test_manifest_says_what_is_there(cache):
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["schema"] == 1 and manifest["kind"] == "latent_cache" and manifest["complete"] is True
    assert manifest["rows"] == 23 and [shard["rows"] for shard in manifest["shards"]] == [6, 6, 6, 5]
    assert manifest["tensors"]["latents"] == {"shape": [2, 3, 5], "dtype": "float16"}
    for shard in manifest["shards"]:
        assert (cache / shard["file"]).stat().st_size == shard["bytes"]


def test_progress_counts_each_batch_once(tmp_path):
    seen = []
    make(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 23) for done in (0, 4, 6, 10, 12, 16, 18, 22, 23)]
    seen.clear()
    make(tmp_path, generate=None, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(23, 23)]


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 20),
    rows_per_shard=st.integers(1, 25),
    batch=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    stop=st.integers(0, 12),
)
def test_any_interruption_ends_with_the_same_bytes(tmp_path_factory, rows, rows_per_shard, batch, dtype, stop):
    base = tmp_path_factory.mktemp("p")
    changes = {
        "prompt_index": torch.arange(rows),
        "rows_per_shard": rows_per_shard,
        "batch": batch,
        "dtype": dtype,
    }
    make(base / "a", **changes)
    calls = 0

    def interrupted(numbers, prompt_index):
        nonlocal calls
        calls += 1
        if calls == stop + 1:
            raise KeyboardInterrupt
        return teacher(numbers, prompt_index)

    try:
        make(base / "b", interrupted, **changes)
    except KeyboardInterrupt:
        with pytest.raises(StorageError, match=rf"unfinished: it has \d+ of {rows} rows"):
            LatentCache.load(base / "b")
        make(base / "b", **changes)
    assert content(base / "a") == content(base / "b")
    assert torch.equal(LatentCache.load(base / "b").latents, teacher(torch.arange(rows), torch.arange(rows)).to(dtype))


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("call", range(1, 9))
def test_interrupted_in_the_middle_of_writing(tmp_path, monkeypatch, whole, error, function, call):
    """At each system call that makes a shard or a manifest durable."""
    real, calls = getattr(os, function), 0

    def fail(*arguments):
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(type(error)):
            make(tmp_path)
    assert not list(tmp_path.glob(".*.tmp"))
    before = read_manifest(tmp_path).shards if (tmp_path / "manifest.json").exists() else {}
    made = []

    def counted(rows, prompt_index):
        made.extend(rows.tolist())
        return teacher(rows, prompt_index)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an interruption damages nothing
        make(tmp_path, counted)
    assert content(tmp_path) == whole
    assert made == [row for row in range(23) if row // 6 not in before]  # finished rows are not made again


def slow(rows, prompt_index):
    time.sleep(0.02)
    return teacher(rows, prompt_index)


def test_killed_at_once_and_resumed(tmp_path, whole):
    """SIGKILL: no handler runs, a temporary file may stay."""
    process = processes.begin(make, tmp_path, slow)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "shard-00001.safetensors").exists() and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.kill()
        process.join()
    (tmp_path / ".shard-00002.safetensors.1-abcd.tmp").write_bytes(b"half")
    assert not read_manifest(tmp_path).complete
    make(tmp_path)
    assert content(tmp_path) == whole
    assert not list(tmp_path.glob(".*.tmp"))


def flip(file):
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "flipped": (flip, "damaged: expected SHA-256"),
    "truncated": (lambda file: os.truncate(file, file.stat().st_size - 1), r"damaged: expected \d+ bytes, got \d+"),
    "empty": (lambda file: os.truncate(file, 0), r"damaged: expected \d+ bytes, got 0"),
    "missing": (lambda file: file.unlink(), "missing: the manifest lists it"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_named_never_loaded_and_made_anew(cache, whole, damage):
    spoil, message = DAMAGE[damage]
    spoil(cache / "shard-00002.safetensors")
    with pytest.raises(StorageError, match=f"shard-00002.safetensors: {message}"):
        LatentCache.load(cache)
    made = []

    def counted(rows, prompt_index):
        made.extend(rows.tolist())
        return teacher(rows, prompt_index)

    with pytest.warns(UserWarning, match=f"shard-00002.safetensors: {message}.*being made anew"):
        make(cache, counted)
    assert made == list(range(12, 18))
    assert content(cache) == whole


def test_without_verification_sizes_and_shapes_are_still_checked(cache):
    flip(cache / "shard-00002.safetensors")
    assert len(LatentCache.load(cache, verify=False)) == 23
    os.truncate(cache / "shard-00002.safetensors", 50)
    with pytest.raises(StorageError, match=r"shard-00002"):
        LatentCache.load(cache, verify=False)


def test_shards_swapped_with_those_of_another_layout_are_refused(cache, tmp_path):
    """The checksums of manifest and shards agree, but not the shapes."""
    make(tmp_path / "other", prompt_index=PROMPT_INDEX, row_shape=(2, 5, 3), generate=lambda r, p: teacher(r, p).mT)
    other = json.loads((tmp_path / "other" / "manifest.json").read_text())
    mine = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps(mine | {"shards": other["shards"]}))
    for shard in other["shards"]:
        (cache / shard["file"]).write_bytes((tmp_path / "other" / shard["file"]).read_bytes())
    with pytest.raises(StorageError, match=r"tensor 'latents': expected torch.float16 \(6, 2, 3, 5\), got"):
        LatentCache.load(cache)


def test_a_cache_of_another_teacher_is_refused_with_both_values(cache):
    with pytest.raises(StorageError, match="made differently \\(teacher: expected 'b', got 'aaaaaaaa'\\)"):
        LatentCache.load(cache, expect={"teacher": "b"})
    with pytest.raises(StorageError, match="prompts: expected 'x', got nothing"):
        LatentCache.load(cache, expect={"teacher": "a" * 8, "prompts": "x"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": FINGERPRINT | {"teacher": "b"}}, "teacher: expected 'b', got 'aaaaaaaa'"),
        ({"fingerprint": FINGERPRINT | {"sampler": {"steps": 9}}}, "sampler.steps: expected 9, got 25"),
        ({"prompt_index": PROMPT_INDEX.flip(0)}, "prompt_index: expected '"),
        ({"prompt_index": PROMPT_INDEX[:20]}, "rows: expected 20, got 23"),
        ({"rows_per_shard": 7}, "rows_per_shard: expected 7, got 6"),
        ({"dtype": torch.float32}, "tensors.latents.dtype: expected 'float32', got 'float16'"),
    ],
)
def test_continuing_something_else_is_refused_and_changes_nothing(cache, whole, changes, message):
    with pytest.raises(StorageError, match=re.escape(message)) as caught:
        make(cache, **changes)
    assert "choose another directory" in str(caught.value)
    assert content(cache) == whole and os.listdir(cache).count(".lock") == 0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m | {"schema": 2}, "expected schema version 1 or older, got 2; a newer fastdistill wrote it"),
        (lambda m: m | {"fingerprint": {"teacher": "forged"}}, "does not have the hash"),
        (lambda m: m | {"rows": -4}, "-4 is not a whole number from 1"),
        (lambda m: m | {"rows": 24}, "has 5 rows instead of 6"),
        (lambda m: {key: value for key, value in m.items() if key != "shards"}, "damaged: KeyError 'shards'"),
        (lambda m: m | {"shards": [m["shards"][0] | {"file": "../../etc/passwd"}]}, "is not the name of a shard"),
        (lambda m: m | {"attachments": [{"file": "../x", "bytes": 1, "sha256": ""}]}, "not the name of a file"),
        (
            lambda m: m | {"tensors": {"latents": {"shape": [1], "dtype": "nn"}}},
            "dtype 'nn' is not one that safetensors stores",
        ),
        (lambda m: [], "damaged"),
        (lambda m: m | {"kind": "prompt_bank"}, "expected a latent_cache, got a prompt_bank"),
    ],
)
def test_a_manifest_that_makes_no_sense(cache, edit, message):
    manifest = cache / "manifest.json"
    manifest.write_text(json.dumps(edit(json.loads(manifest.read_text()))))
    with pytest.raises(StorageError, match=re.escape(message)):
        LatentCache.load(cache)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_damage_to_the_manifest_goes_unnoticed_or_crashes(tmp_path_factory, whole, data):
    """For any changed byte or lost tail: one StorageError, or a cache equal to the original."""
    path = tmp_path_factory.mktemp("m")
    for name, content_ in whole.items():
        (path / name).write_bytes(content_)
    text = bytearray(whole["manifest.json"])
    at = data.draw(st.integers(0, len(text) - 1))
    if data.draw(st.booleans()):
        text[at] = data.draw(st.integers(0, 255))
    else:
        del text[at:]
    (path / "manifest.json").write_bytes(text)
    try:
        loaded = LatentCache.load(path)
    except StorageError:
        return
    assert torch.equal(loaded.latents, teacher(torch.arange(23), PROMPT_INDEX).half())
    assert loaded.fingerprint["seed"] == 3


def test_what_the_generator_returns_is_checked(tmp_path):
    with pytest.raises(InputError, match=r"expected latents of shape \(4, 2, 3, 5\), got \(4, 2, 3, 4\)"):
        make(tmp_path, lambda rows, prompts: teacher(rows, prompts)[..., :4])

    with pytest.raises(InputError, match=r"expected latents \(4, 2, 3, 5\), got tuple"):
        make(tmp_path, lambda rows, prompts: (teacher(rows, prompts),))

    def overflowing(rows, prompts):
        latents = teacher(rows, prompts)
        latents[rows == 9] = 1e5  # finite in float32, not in float16
        return latents

    with pytest.raises(InputError, match=r"expected latents that are finite as torch.float16, got row 9"):
        make(tmp_path, overflowing)
    assert sorted(read_manifest(tmp_path).shards) == [0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_index": PROMPT_INDEX.int()}, "prompt_index: expected torch.int64"),
        ({"prompt_index": PROMPT_INDEX[:0]}, "at least one row"),
        ({"prompt_index": torch.tensor(3)}, "prompt_index: expected torch.int64"),
        ({"prompt_index": PROMPT_INDEX - 1}, "prompt_index: expected rows of the prompt bank, from 0, got -1"),
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"rows_per_shard": 0}, "rows_per_shard: expected at least 1, got 0"),
        ({"dtype": torch.int32}, "dtype: expected a floating-point type, got torch.int32"),
        ({"dtype": "float16"}, "dtype: expected a dtype of torch, got 'float16'"),
        ({"fingerprint": None}, "fingerprint: expected a mapping of JSON values, got NoneType"),
        ({"prompt_index": [0, 1]}, "prompt_index: expected a tensor with values, got list"),
        ({"fingerprint": {"teacher": torch.ones(1)}}, "fingerprint: expected values that JSON holds"),
    ],
)
def test_arguments_are_checked_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        make(tmp_path / "cache", generate=None, **changes)
    assert not (tmp_path / "cache").exists()


def test_identity(cache, tmp_path):
    """It depends on the fingerprint, which does not change if another processor rounds differently; else on the
    values."""
    loaded = LatentCache.load(cache)
    for same in (LatentCache.load(cache, dtype=torch.float32), LatentCache.open(cache)):
        assert same.identity == loaded.identity
    make(tmp_path / "elsewhere", lambda rows, prompts: teacher(rows, prompts) * 1.001)
    assert LatentCache.load(tmp_path / "elsewhere").identity == loaded.identity
    make(tmp_path / "other", fingerprint=FINGERPRINT | {"seed": 4})
    assert LatentCache.load(tmp_path / "other").identity != loaded.identity
    bare = LatentCache(loaded.latents, loaded.prompt_index)
    on_disk = LatentCache(LatentCache.open(cache).latents, loaded.prompt_index)
    assert (
        bare.identity
        == on_disk.identity
        == sha256_of_tensors({"latents": loaded.latents, "prompt_index": loaded.prompt_index})
    )
    assert LatentCache(loaded.latents.flip(0), loaded.prompt_index).identity != bare.identity
    assert LatentCache(loaded.latents, loaded.prompt_index.flip(0)).identity != bare.identity


def test_latents_and_prompts_must_belong_together():
    with pytest.raises(InputError, match=r"prompt_index: expected torch.int64 \(3,\)"):
        LatentCache(torch.ones(3, 1, 2, 2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(InputError, match=r"latents: expected a floating-point tensor"):
        LatentCache(torch.ones(3, dtype=torch.float32), torch.zeros(3, dtype=torch.int64))


def test_the_writer_refuses_rows_that_do_not_fit(tmp_path):
    spec = {"x": TensorSpec((2,), torch.float32)}
    with RowWriter(tmp_path, kind="test", fingerprint={}, rows=3, tensors=spec) as writer:
        (span,) = writer.missing
        with pytest.raises(InputError, match=r"tensors\['x'\]: expected torch.float32 \(3, 2\), got torch.float64"):
            writer.write(span, {"x": torch.zeros(3, 2, dtype=torch.float64)})
        with pytest.raises(InputError, match=r"tensors: expected the names \['x'\], got \['y'\]"):
            writer.write(span, {"y": torch.zeros(3, 2)})
        writer.write(span, {"x": torch.arange(6.0).reshape(2, 3).T})  # any strides
    assert load_rows(tmp_path, kind="test")[1]["x"].tolist() == [[0, 3], [1, 4], [2, 5]]
