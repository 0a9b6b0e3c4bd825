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


class StorageError(FastdistillError, OSError):
    """A file or directory could not be read or written, or holds something else than its manifest says."""


class KernelError(FastdistillError, RuntimeError):
    """A kernel that was asked for by name cannot run here; the message holds its reason."""


class DeviceError(FastdistillError, RuntimeError):
    """The device has failed: nothing more can run on it in this process, which has to be started again."""
