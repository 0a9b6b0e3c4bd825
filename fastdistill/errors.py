# SPDX-License-Identifier: Apache-2.0
"""Exceptions of the package. Each message names the argument, the rule and the value."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping


class FastdistillError(Exception):
    """Base class of all exceptions that the package raises. The command line prints only the message."""


class InputError(FastdistillError, ValueError):
    """An invalid argument. Raised before anything is launched or written."""

    @classmethod
    def of(cls, argument: str, rule: object, value: object) -> InputError:
        """An error with the message "argument: expected rule, got value"."""
        return cls(f"{argument}: expected {rule}, got {value}")


class _Described:
    """Its text is made only if a message is: that of a tensor takes seconds on a GPU, and waits for it."""

    __slots__ = ("_value",)

    def __init__(self, value: object) -> None:
        self._value = value

    def __str__(self) -> str:
        if isinstance(self._value, type):
            return f"the class {self._value.__name__}"
        text = repr(self._value)
        return text if len(text) <= 80 and "\n" not in text and not text.startswith("<") else type(self._value).__name__


def described(value: object) -> _Described:
    """A wrong argument in a message: itself if that is short, else its type."""
    return _Described(value)


def quoted(error: BaseException) -> str:
    """Kind and first line of another error, for a message: ``"RuntimeError: no data"``."""
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])


class StorageError(FastdistillError, OSError):
    """A file or directory that cannot be read or written, or whose content does not match its manifest."""


@contextlib.contextmanager
def named(field: str) -> Iterator[None]:
    """Names, in a StorageError about a path, the field that holds this path."""
    try:
        yield
    except StorageError as error:
        raise StorageError(f"{field}: {error}") from error


@contextlib.contextmanager
def called(field: str, argument: str | None = None) -> Iterator[None]:
    """Names, in an InputError about ``argument`` (None: about any argument), the field that contains it."""
    try:
        yield
    except InputError as error:
        name, _, rule = str(error).partition(": ")
        if argument not in (None, name):
            raise
        raise InputError(f"{field}: {rule}") from error


@contextlib.contextmanager
def set_by(fields: Mapping[str, str]) -> Iterator[None]:
    """Names, in an InputError about an argument (or a part of it), the field of a file that sets this argument."""
    try:
        yield
    except InputError as error:
        name, colon, rule = str(error).partition(": ")
        for end in [len(name), *(at for at in reversed(range(len(name))) if name[at] in ".[ ")]:
            if name[:end] in fields:
                raise InputError(fields[name[:end]] + name[end:] + colon + rule) from error
        raise


class KernelError(FastdistillError, RuntimeError):
    """A kernel selected by name cannot run here; the message contains the reason."""


class DeviceError(FastdistillError, RuntimeError):
    """The device has failed: nothing can run on it in this process any more; start a new process."""


class Stopped(KeyboardInterrupt, SystemExit):
    """Ctrl-C or SIGTERM ended a run after a complete step. If it is not caught, the process ends without a traceback,
    with exit status 128 + the number of the signal (130, 143)."""

    code: int

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.code = 128 + signal
