# SPDX-License-Identifier: Apache-2.0
"""Files that are either complete or absent: atomic replacement, and a lock on a directory (POSIX)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fastdistill.errors import InputError, StorageError, described

LOCK_NAME = ".lock"
_TEMPORARY_SUFFIX = ".tmp"


def located(value: Any, argument: str = "path") -> Path:
    """A path as a user gives it: ``~`` and ``~name`` are home directories.

    Raises:
        InputError: no path, an empty one, one with a NUL, or a user who has no home directory here.
    """
    rule = "the path of a file or directory"
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise InputError.of(argument, rule, described(value))
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InputError.of(argument, rule, f"{text}, a home directory that is not known") from None


def atomic_write(path: str | os.PathLike[str], content: bytes | Callable[[BinaryIO], object]) -> None:
    """Replaces the file ``path`` by ``content``; after any interruption it contains either all of the new or the old
    content.

    ``content``: bytes, or a function that writes into the open binary file that it gets. The bytes are written to a
    temporary file in the same directory and synced (fsync), the file is renamed (``os.replace``), and the directory is
    synced. After any failure, including Ctrl-C, the temporary file is removed. If the process is killed, the next write
    of this file removes it. A full disk, a read-only directory and other I/O errors raise StorageError.
    """
    path = Path(path)
    sweep(path.parent, path.name)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{_TEMPORARY_SUFFIX}")
    try:
        with _temporary(temporary) as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        _sync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        # torch.save hides the OSError of a full disk behind a RuntimeError about file positions.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError) and not isinstance(cause, StorageError):
            raise StorageError(f"{path}: could not be written: {reason(cause)}") from error
        raise


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Yields a new directory next to ``path``, which is renamed to ``path`` if the block ends without an error.

    After any failure, including Ctrl-C, it is removed and ``path`` is unchanged. A process that is killed leaves
    ``.<name>.new.tmp``, or ``.<name>.old.tmp`` of what was to be replaced, until the next call for this ``path``. If
    ``path`` exists, it is refused, or replaced. A full disk, a read-only directory, another writer and other I/O errors
    raise StorageError.
    """
    path = Path(path)
    make_directory(path.parent)
    temporary, former = (path.with_name(f".{path.name}.{kind}{_TEMPORARY_SUFFIX}") for kind in ("new", "old"))
    descriptor = _own_directory(temporary)
    try:
        for entry in temporary.iterdir():  # left by a killed process, like these:
            _remove(entry)
        if os.path.lexists(former) and not os.path.lexists(path):
            os.rename(former, path)
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _sync_file(Path(folder, name))
            _sync_directory(Path(folder))
        if os.path.lexists(path):
            if not replace:
                raise FileExistsError(errno.EEXIST, "there is something by that name")
            os.rename(path, former)
        os.rename(temporary, path)
        _sync_directory(path.parent)
    except BaseException as error:
        if os.path.lexists(former) and not os.path.lexists(path):
            os.rename(former, path)
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            raise StorageError(f"{path}: could not be written: {reason(error)}") from error
        raise
    finally:
        if os.path.lexists(former) and os.path.lexists(path):
            _remove(former)
        os.close(descriptor)


def _own_directory(path: Path) -> int:
    """Creates a directory, or takes over one that a killed process left; returns a descriptor that locks it until
    closed."""
    try:
        while True:
            path.mkdir(exist_ok=True)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.is_dir() and os.path.samestat(os.stat(path), os.fstat(descriptor)):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # the owner has just renamed or removed it
    except BlockingIOError:
        raise StorageError(f"{path}: another process is writing here; wait for it, or end it") from None
    except OSError as error:
        raise StorageError(f"{path}: could not be written: {reason(error)}") from error


def make_directory(path: Path) -> None:
    """Creates ``path`` and its parents if they do not exist; StorageError if this is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise StorageError(f"{path}: expected a directory, got a file in its place or above it") from None
    except OSError as error:
        raise StorageError(f"{path}: the directory could not be created: {reason(error)}") from error


def require_space(path: Path, needed: int) -> None:
    """StorageError if the disk of ``path`` (existing or not) has fewer than ``needed`` bytes free."""
    place = path
    while not os.path.isdir(place):
        if place == place.parent:
            return
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        wanted, got = readable(needed), readable(free)
        if wanted == got:
            wanted, got = f"{needed:,} bytes", f"{free:,} bytes"
        raise StorageError(f"{path}: expected {wanted} of free disk space, got {got}")


@contextlib.contextmanager
def locked(directory: Path, *, wait: bool = False) -> Iterator[None]:
    """Locks the directory for one writer. A second one, in this or another process, gets a StorageError at once, or
    waits.

    The lock is the kernel's (``flock``): it ends with the process that holds it, so a killed run leaves nothing to
    clean up. The lock file itself stays and contains the process that held the directory last.
    """
    descriptor = lock(directory / LOCK_NAME, wait=wait)
    if descriptor is None:
        holder = ""
        with contextlib.suppress(OSError):
            holder = (directory / LOCK_NAME).read_text(errors="replace").strip()
        raise StorageError(
            f"{directory}: another process is writing here (process {holder or 'unknown'}); wait for it, or end it"
        )
    try:
        # The number is only for the message above: a full disk must not prevent a run from resuming here.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def lock(path: Path, *, shared: bool = False, wait: bool = False) -> int | None:
    """The descriptor of a lock file, locked until it is closed; None if another process has it and ``wait`` is
    false."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise StorageError(f"{path.parent}: cannot be written to: {reason(error)}") from error
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError):
            raise StorageError(f"{path.parent}: could not be locked: {reason(error)}") from error
        raise
    return descriptor


def sign(descriptor: int) -> None:
    """Write this process and the time into a lock file that it holds, for ``holder``."""
    with contextlib.suppress(OSError):  # a full disk must not stop anything
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} of {socket.gethostname()}\n".encode(), 0)


def holder(path: Path) -> str:
    """The process that holds a lock file, and since when."""
    try:
        who = path.read_text(errors="replace").strip() or "another process"
        return f"{who} since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(path.stat().st_mtime))}"
    except OSError:
        return "another process"


def sweep(directory: Path, name: str = "") -> None:
    """Removes temporary files of ``atomic_write`` that killed processes left (nobody locks them): for the file
    ``name``, or all in a directory."""
    with contextlib.suppress(OSError):
        for leftover in directory.glob(f".{glob.escape(name)}*{_TEMPORARY_SUFFIX}"):
            with contextlib.suppress(OSError), open(leftover, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()


def _temporary(path: Path) -> BinaryIO:
    """A new file that is locked while it is open, so that ``sweep`` does not remove it."""
    while True:
        file = open(path, "xb")  # noqa: SIM115
        try:
            with contextlib.suppress(OSError):  # on file systems without locks, nothing is removed
                fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists():
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # it was removed before it was locked


def json_value(text: str | bytes) -> Any:
    """The value of a JSON text; ValueError for any other text, also if it is nested too deeply for Python."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deep") from None


def reason(error: OSError) -> str:
    """The operating system's message, without the number and the path; for a copied folder that of the first file."""
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
        return str(error.args[0][0][-1])
    return error.strerror or str(error)


def readable(size: int) -> str:
    """``999`` -> ``"999 bytes"``, ``1234567`` -> ``"1.2 MB"``."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size} bytes"


def _remove(path: Path) -> None:
    """Removes a file, link or directory, as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no fsync of directories
            raise
    finally:
        os.close(descriptor)
