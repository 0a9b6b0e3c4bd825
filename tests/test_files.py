# SPDX-License-Identifier: Apache-2.0
"""Atomic writes, the lock, and free space."""

import errno
import fcntl
import os
import resource
import shutil
import signal

import pytest
import torch

from fastdistill import files
from fastdistill.errors import FastdistillError, StorageError
from tests import processes


def test_atomic_write_replaces_and_leaves_no_temporary_file(tmp_path):
    target = tmp_path / "report.json"
    files.atomic_write(target, b"one")
    files.atomic_write(target, lambda file: file.write(b"two"))
    assert target.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["report.json"]


def killed_as_it_writes(path):
    files.atomic_write(path, lambda file: (file.write(b"half"), file.flush(), os.kill(os.getpid(), signal.SIGKILL)))


def test_what_a_killed_write_leaves_goes_with_the_next_of_that_file(tmp_path):
    """Temporary files that another process is writing stay, whoever cleans up."""
    for name in ("a.json", "b.json"):
        processes.begin(killed_as_it_writes, tmp_path / name).join(60)
    assert len(list(tmp_path.glob(".*.tmp"))) == 2
    files.atomic_write(tmp_path / "a.json", b"whole")
    (left,) = tmp_path.glob(".*.tmp")
    assert left.name.startswith(".b.json.")

    def meanwhile(file):
        file.write(b"one")
        files.sweep(tmp_path)
        files.atomic_write(tmp_path / "c.json", b"two")

    files.atomic_write(tmp_path / "c.json", meanwhile)
    assert (tmp_path / "c.json").read_bytes() == b"one" and sorted(os.listdir(tmp_path)) == ["a.json", "c.json"]


def test_a_write_is_not_lost_where_a_sweep_was_faster_than_its_lock(tmp_path, monkeypatch):
    real, swept = fcntl.flock, []

    def late(file, operation):
        if not swept:
            swept.append(operation)
            files.sweep(tmp_path)
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    files.atomic_write(tmp_path / "a", b"whole")
    assert swept == [fcntl.LOCK_EX] and (tmp_path / "a").read_bytes() == b"whole" and os.listdir(tmp_path) == ["a"]


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


def written_under_a_limit(path):
    """The message and the remaining files if files are too large; the operating system refuses the write (EFBIG)."""
    files.atomic_write(path, b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    told = []
    for content in (bytes(10_000), lambda file: torch.save({"w": torch.ones(10_000)}, file)):
        with pytest.raises(StorageError) as refused:
            files.atomic_write(path, content)
        told.append(str(refused.value))
    return told, path.read_bytes(), os.listdir(path.parent)


def test_a_file_size_limit_is_one_clear_error(tmp_path):
    told, content, left = processes.call(written_under_a_limit, tmp_path / "large.bin")
    assert told == [f"{tmp_path}/large.bin: could not be written: File too large"] * 2
    assert content == b"old" and left == ["large.bin"]


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


def filled(target, text="new", **options):
    with files.atomic_directory(target, **options) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "file").write_text(text)


def test_a_directory_is_there_as_a_whole(tmp_path):
    target = tmp_path / "deep" / "pipeline"
    filled(target)
    with pytest.raises(StorageError, match="pipeline: could not be written: "):
        filled(target, "other")
    assert (target / "part" / "file").read_text() == "new"
    filled(target, "other", replace=True)
    assert (target / "part" / "file").read_text() == "other" and os.listdir(target.parent) == ["pipeline"]
    (tmp_path / "link").symlink_to(target)
    filled(tmp_path / "link", "third", replace=True)  # the link is removed, its target stays
    assert (target / "part" / "file").read_text() == "other" and not (tmp_path / "link").is_symlink()


def killed(target, before):
    rename = os.rename
    renames = iter(range(3))

    def dies(*arguments):
        if next(renames) == before:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*arguments)

    os.rename = dies
    filled(target, "half", replace=True)


@pytest.mark.parametrize("before", [0, 1])
def test_what_a_killed_process_left_goes_with_the_next_call(tmp_path, before):
    """Also if the old directory was already moved aside; while that process lives, another one is refused."""
    target = tmp_path / "pipeline"
    filled(target, "old")
    process = processes.begin(killed, target, before)
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(os.listdir(tmp_path)) == 2
    with pytest.raises(StorageError, match="there is something by that name"):
        filled(target, "other")
    assert (target / "part" / "file").read_text() == "old" and os.listdir(tmp_path) == ["pipeline"]
    with files.atomic_directory(target, replace=True), pytest.raises(StorageError, match="another process is writing"):
        filled(target, "other", replace=True)
    assert os.listdir(tmp_path) == ["pipeline"] and os.listdir(target) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("call", range(6))
def test_an_interrupted_directory_keeps_what_was_there(tmp_path, monkeypatch, error, call):
    """Whichever system call fails."""
    target = tmp_path / "pipeline"
    filled(target, "old")
    left = [call]

    def failing(function):
        def made(*arguments, **options):
            left[0] -= 1
            if left[0] == -1:
                raise error
            return function(*arguments, **options)

        return made

    for name in ("fsync", "rename"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    with pytest.raises(StorageError if isinstance(error, OSError) else error):
        filled(target, replace=True)
    monkeypatch.undo()
    whole = "new" if call == 5 else "old"  # the last call only syncs the new name to the disk
    assert (target / "part" / "file").read_text() == whole and os.listdir(tmp_path) == ["pipeline"]


def test_the_reason_of_a_folder_that_could_not_be_copied_is_that_of_its_first_file() -> None:
    both = [(name, f"to/{name}", f"[Errno 28] No space left on device: '{name}'") for name in "ab"]
    assert files.reason(shutil.Error(both)) == "[Errno 28] No space left on device: 'a'"
    assert files.reason(OSError(28, "No space left on device", "a")) == "No space left on device"
