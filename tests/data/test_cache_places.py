# SPDX-License-Identifier: Apache-2.0
"""Places in which a latent cache cannot be written: no data are lost, and the error gives the reason."""

import errno
import os
import shutil

import pytest
import torch

from fastdistill import files
from fastdistill.data import shards
from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.manifest import read_manifest
from fastdistill.errors import StorageError
from tests.data.caches import content, make, teacher
from tests.processes import call


def test_full_disk_in_the_middle(tmp_path, monkeypatch, whole):
    real = shards.files.atomic_write

    def full(path, data):
        if path.name == "shard-00002.safetensors":

            def data(file):
                file.write(b"some of it")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(shards.files, "atomic_write", full)
        with pytest.raises(
            StorageError, match=r"shard-00002.safetensors: could not be written: No space left on device"
        ):
            make(tmp_path)
    assert sorted(read_manifest(tmp_path).shards) == [0, 1]
    assert not list(tmp_path.glob(".*.tmp"))
    make(tmp_path)
    assert content(tmp_path) == whole


def test_a_directory_that_vanishes(tmp_path, whole):
    """Its contents are created again."""

    def vanish(rows, prompt_index):
        if rows[0] == 6:
            shutil.rmtree(tmp_path / "cache")
        return teacher(rows, prompt_index)

    with pytest.raises(StorageError, match=r"cache/shard-00001.safetensors: could not be written: No such file"):
        make(tmp_path / "cache", vanish)
    make(tmp_path / "cache")
    assert content(tmp_path / "cache") == whole


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda place: type("usage", (), {"free": 100})())
    with pytest.raises(StorageError, match=r"cache: expected [\d.]+ kB of free disk space, got 100 bytes"):
        make(tmp_path / "cache", generate=None)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("place", ["file", "below a file"])
def test_a_file_in_the_way(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    path = tmp_path / "file" if place == "file" else tmp_path / "file" / "cache"
    with pytest.raises(StorageError, match="expected a directory, got a file"):
        make(path)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(StorageError, match=r"expected a directory with manifest\.json, got none"):
        LatentCache.load(path)


def test_a_directory_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(
        StorageError, match=r"expected an empty directory or one with manifest.json, got one with thesis"
    ):
        make(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def refusals(directory):
    """The errors for a user without permission (root gives up its rights for this)."""
    os.chdir(directory)
    torch.ones(1).half()  # loads what it needs while this is possible
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    told = []
    for path in ("place", "place/cache"):
        with pytest.raises(StorageError) as refused:
            make(path, generate=None)
        told.append(str(refused.value))
    return told


def test_a_read_only_place(tmp_path):
    (tmp_path / "place").mkdir()
    os.chmod(tmp_path / "place", 0o555)
    os.chmod(tmp_path, 0o755)
    first, second = call(refusals, tmp_path)
    assert first == "place: cannot be written to: Permission denied"
    assert second == "place/cache: the directory could not be created: Permission denied"
    assert os.listdir(tmp_path / "place") == []
