# SPDX-License-Identifier: Apache-2.0
"""The errors a user can meet. Each message names the argument, the rule and the value it got."""

from __future__ import annotations


class FastdistillError(Exception):
    """Base of every error raised on purpose; the command line prints its message as one line."""


class InputError(FastdistillError, ValueError):
    """An argument breaks a rule. Raised before anything is launched or written."""

    @classmethod
    def of(cls, argument: str, rule: object, value: object) -> InputError:
        """``InputError.of("teacher[2]", "the shape of student[2] (8, 64)", (8, 32))`` in the one wording used
        everywhere."""
        return cls(f"{argument}: expected {rule}, got {value}")


def described(value: object) -> str:
    """A wrong argument, to be named in a message: itself where that is short, else its type."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text and not text.startswith("<") else type(value).__name__


def quoted(error: BaseException) -> str:
    """Kind and first line of another error, to be quoted in a message: ``"RuntimeError: no data"``."""
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])


class StorageError(FastdistillError, OSError):
    """A file or directory could not be read or written, or holds something else than its manifest says."""


class KernelError(FastdistillError, RuntimeError):
    """A kernel that was asked for by name cannot run here; the message holds its reason."""
