# SPDX-License-Identifier: Apache-2.0
"""Atomic writes, the lock, and hashes of tensors."""

import errno
import hashlib
import os
import struct
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdistill.data import files
from fastdistill.data.fingerprint import differences, plain, sha256_of_json, sha256_of_tensors
from fastdistill.errors import FastdistillError, InputError, StorageError


def test_atomic_write_replaces_and_leaves_no_temporary_file(tmp_path):
    target = tmp_path / "report.json"
    files.atomic_write(target, b"one")
    files.atomic_write(target, lambda file: file.write(b"two"))
    assert target.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["report.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("where", ["writer", "fsync", "replace"])
def test_interrupted_write_keeps_what_was_there(tmp_path, monkeypatch, error, where):
    target = tmp_path / "weights.bin"
    files.atomic_write(target, b"old")

    def fail(*_):
        raise error

    def writer(file):
        file.write(b"half of the new")
        if where == "writer":
            fail()

    if where != "writer":
        monkeypatch.setattr(os, where, fail)
    expected = StorageError if isinstance(error, OSError) else error
    with pytest.raises(expected) as caught:
        files.atomic_write(target, writer)
    if expected is StorageError:
        assert str(target) in str(caught.value) and "No space left on device" in str(caught.value)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["weights.bin"]


def test_a_file_size_limit_is_one_clear_error(tmp_path):
    """The kernel itself refuses the write (EFBIG), in another process so that the limit stays there."""
    script = f"""
        import os, resource, torch
        from fastdistill.data.files import atomic_write
        from fastdistill.errors import StorageError
        path = {str(tmp_path / "large.bin")!r}
        atomic_write(path, b"old")
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        for content in (bytes(10_000), lambda file: torch.save({{"w": torch.ones(10_000)}}, file)):
            try:
                atomic_write(path, content)
            except StorageError as error:
                print(error)
        print(open(path, "rb").read(), os.listdir({str(tmp_path)!r}))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("large.bin: could not be written: File too large") == 2
    assert "b'old' ['large.bin']" in done.stdout


def test_one_writer_a_directory(tmp_path):
    busy = rf"another process is writing here \(process {os.getpid()}\)"
    with files.locked(tmp_path), pytest.raises(StorageError, match=busy), files.locked(tmp_path):
        pytest.fail("two writers hold the lock")
    with files.locked(tmp_path):
        pass


def test_too_small_a_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda place: type("usage", (), {"free": 1_000_000})())
    files.require_space(tmp_path / "not" / "yet", 1_000_000)
    with pytest.raises(StorageError, match=r"yet: expected 5\.0 MB of free disk space, got 1\.0 MB"):
        files.require_space(tmp_path / "not" / "yet", 5_000_000)
    with pytest.raises(StorageError, match=r"expected 1,000,001 bytes of free disk space, got 1,000,000 bytes"):
        files.require_space(tmp_path, 1_000_001)


def test_errors_of_storage_are_errors_a_caller_can_catch():
    assert issubclass(StorageError, OSError) and issubclass(StorageError, FastdistillError)


def test_hash_of_tensors_sees_names_dtypes_shapes_and_values_and_nothing_else():
    x = torch.arange(24, dtype=torch.float32).reshape(1, 2, 3, 4)
    base = sha256_of_tensors({"a": x, "b": x.bfloat16()})
    assert base == sha256_of_tensors({"b": x.bfloat16(), "a": x.clone(memory_format=torch.channels_last)})
    assert base == sha256_of_tensors({"a": torch.nn.Parameter(x), "b": x.bfloat16()})
    changed = x.clone()
    changed[0, 1, 2, 3] = torch.nextafter(changed[0, 1, 2, 3], torch.tensor(1e9))
    for other in (
        {"a": changed, "b": x.bfloat16()},
        {"a": x, "c": x.bfloat16()},
        {"a": x, "b": x.half()},
        {"a": x.reshape(2, 12), "b": x.bfloat16()},
        {"a": x},
    ):
        assert sha256_of_tensors(other) != base


def test_the_hash_is_specified_to_the_byte():
    """So the hash in a published file never changes with a version of this package."""
    header = b'["w", "float32", [2]]'
    specified = b"%d:%s" % (len(header), header) + struct.pack("<2f", 1.0, -2.5)
    assert sha256_of_tensors({"w": torch.tensor([1.0, -2.5])}) == hashlib.sha256(specified).hexdigest()


def test_hash_of_scalars_empty_tensors_and_meta():
    assert sha256_of_tensors({"n": torch.tensor(3)}) != sha256_of_tensors({"n": torch.tensor([3])})
    assert sha256_of_tensors({"n": torch.empty(0, 2)}) != sha256_of_tensors({"n": torch.empty(2, 0)})
    assert sha256_of_tensors({"n": torch.tensor([True, False])})
    with pytest.raises(InputError, match=r"tensors\['w'\]: expected a tensor with values, got one on the meta device"):
        sha256_of_tensors({"w": torch.empty(2, device="meta")})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_a_fingerprint_does_not_differ_from_itself(value):
    read_back = plain(value)
    assert differences(read_back, plain(read_back)) == []
    assert sha256_of_json(value) == sha256_of_json(dict(reversed(read_back.items())))


def test_differences_name_the_field_and_both_values():
    wanted = {"teacher": "aaa", "sampler": {"steps": 25, "guidance": 7.5}, "seed": 0}
    found = {"teacher": "bbb", "sampler": {"steps": 50, "guidance": 7.5}}
    assert differences(wanted, found) == [
        "sampler.steps: expected 25, got 50",
        "seed: expected 0, got nothing",
        "teacher: expected 'aaa', got 'bbb'",
    ]


def test_a_fingerprint_must_be_json():
    with pytest.raises(InputError, match=r"fingerprint: expected values that JSON holds"):
        plain({"weights": torch.ones(2)})
    with pytest.raises(InputError):
        plain({"scale": float("nan")})
