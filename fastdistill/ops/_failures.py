# SPDX-License-Identifier: Apache-2.0
"""Errors of a kernel's launch: after some of them another kernel can run the call, after others the device is unusable.

A kernel that cannot be compiled, loaded or launched has executed nothing. Launches are asynchronous, so a launch can
also report the error of an earlier kernel; after such an error the device cannot be used any more.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.errors import FastdistillError

_CUDA, _TRITON = "CUDA error", "Triton Error [CUDA]"  # in messages of torch and of csrc, and of Triton's launcher
# Messages of CUDA: this GPU or its driver can load neither this kernel nor any other that was built with it.
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
# One launch was refused. A call of csrc may have launched other kernels before; see ``launch_all`` for Triton.
_NOT_LAUNCHED = ("too many resources requested for launch", "invalid configuration argument", "invalid argument")
# Errors after which the process cannot use the device.
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
    """Whether the device cannot be used any more after this error."""
    text = str(error)
    return (_CUDA in text or _TRITON in text) and any(words in text for words in _FINAL)


def reason(error: Exception) -> str | None:
    """Why the kernel could not be compiled, loaded or launched, in one line; None if it may have been executed."""
    if isinstance(error, (FastdistillError, torch.OutOfMemoryError, MemoryError)):
        return None
    text = str(error)
    if _CUDA in text or _TRITON in text:
        refused = _NOT_LOADED + (_NOT_LAUNCHED if _TRITON in text else ())
        return _line(error) if any(words in text for words in refused) else None
    return _line(error) if isinstance(error, ImportError) or _is_of_triton(error) else None


def _is_of_triton(error: Exception) -> bool:
    """Raised by Triton or by a tool that it calls: its compiler, ptxas, the host's C compiler."""
    frames = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(name.split(".")[0] == "triton" for name in (type(error).__module__, *frames))


def _line(error: Exception) -> str:
    """The first and the last line of the message: in Triton's messages the location and the cause."""
    lines = [line.strip(" :") for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *dict.fromkeys(lines[:1] + lines[-1:])])


def kind(args: Sequence[Any]) -> tuple[Any, ...]:
    """The properties for which a kernel is compiled: devices, dtypes, shapes and strides of tensors, integers and
    flags. Calls with the same ones are of one kind."""
    return tuple(_kind(value) for value in args)


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.device, value.dtype, tuple(value.shape), value.stride()
    if isinstance(value, (list, tuple)):
        return kind(value)
    return float if isinstance(value, float) else value


def described(kind: Sequence[Any]) -> str:
    """A kind of call in readable form: the tensors' dtypes and shapes."""
    return ", ".join(_described(value) for value in kind if isinstance(value, tuple))


def _described(value: tuple[Any, ...]) -> str:
    if value and isinstance(value[0], torch.device):
        return f"{str(value[1]).removeprefix('torch.')}{list(value[2])}"
    return f"({described(value)})"
