# SPDX-License-Identifier: Apache-2.0
"""Errors of a kernel's launch: which leave the call to another kernel, and which end all work on the device.

A kernel that cannot be compiled, loaded or launched has executed nothing. A launch is asynchronous, so an error of an
earlier kernel can come up in it too; after such an error nothing runs on the device any more.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.errors import FastdistillError

_CUDA, _TRITON = "CUDA error", "Triton Error [CUDA]"  # in messages of torch and of csrc, and of Triton's launcher
# In the words of CUDA: this GPU or its driver cannot load the kernel, nor any other that was built with it.
_NOT_LOADED = (
    "no kernel image is available",
    "device kernel image is invalid",
    "invalid device function",
    "named symbol not found",
    "a PTX JIT compilation failed",
    "PTX JIT compiler library",
    "PTX was compiled with an unsupported toolchain",
    "CUDA driver version is insufficient",
)
# One launch was refused. A call of csrc may have made others before, one of Triton's says so (``launch_all``).
_NOT_LAUNCHED = ("too many resources requested for launch", "invalid configuration argument", "invalid argument")
# Errors that stay with the process.
_FINAL = (
    "illegal memory access",
    "unspecified launch failure",
    "device-side assert",
    "misaligned address",
    "illegal instruction",
    "global/shared address space",
    "invalid program counter",
    "hardware stack error",
    "launch timed out",
    "uncorrectable",
)


def is_final(error: BaseException) -> bool:
    """Whether nothing runs on the device any more."""
    text = str(error)
    return (_CUDA in text or _TRITON in text) and any(words in text for words in _FINAL)


def reason(error: Exception) -> str | None:
    """Why the kernel could not be compiled, loaded or launched, in one line; None where it may have been executed."""
    if isinstance(error, (FastdistillError, torch.OutOfMemoryError, MemoryError)):
        return None
    text = str(error)
    if _CUDA in text or _TRITON in text:
        refused = _NOT_LOADED + (_NOT_LAUNCHED if _TRITON in text else ())
        return _line(error) if any(words in text for words in refused) else None
    return _line(error) if isinstance(error, ImportError) or _is_of_triton(error) else None


def _is_of_triton(error: Exception) -> bool:
    """Raised by Triton or below it: its compiler, ptxas, the host's C compiler."""
    frames = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(name.split(".")[0] == "triton" for name in (type(error).__module__, *frames))


def _line(error: Exception) -> str:
    """The first and the last line of the message: Triton puts the place first, the source between, the cause last."""
    lines = [line.strip(" :") for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *dict.fromkeys(lines[:1] + lines[-1:])])


def kind(args: Sequence[Any]) -> tuple[Any, ...]:
    """What calls have in common that a kernel is compiled for: devices, dtypes, shapes and strides of tensors, whole
    numbers and flags."""
    return tuple(_kind(value) for value in args)


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.device, value.dtype, tuple(value.shape), value.stride()
    if isinstance(value, (list, tuple)):
        return kind(value)
    return float if isinstance(value, float) else value


def described(kind: Sequence[Any]) -> str:
    """A kind of call for people: the tensors' dtypes and shapes."""
    return ", ".join(_described(value) for value in kind if isinstance(value, tuple))


def _described(value: tuple[Any, ...]) -> str:
    if value and isinstance(value[0], torch.device):
        return f"{str(value[1]).removeprefix('torch.')}{list(value[2])}"
    return f"({described(value)})"
