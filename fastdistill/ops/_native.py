# SPDX-License-Identifier: Apache-2.0
"""The compiled extensions, loaded once; without them the ops use their references and report the reason."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # fd::Dtype of csrc/common.h


@cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(f"fastdistill.{name}"), None
    except ModuleNotFoundError:
        return None, f"the extension fastdistill.{name} was not built"
    except ImportError as error:
        return None, f"the extension fastdistill.{name} does not load: {error}"


def cpu() -> ModuleType:
    """The C++ kernels; call only if ``cpu_reason`` is None."""
    module = _load("_cpu")[0]
    assert module is not None
    return module


def cpu_reason() -> str | None:
    """Why the C++ kernels cannot run in this installation, or None."""
    reason = _load("_cpu")[1]
    return reason and f"{reason} (no C++ compiler when it was installed?)"


def cpu_summary() -> str:
    """Which instruction set the C++ kernels use; call only if ``cpu_reason`` is None."""
    return f"built, uses {cpu().isa()} (this machine has {', '.join(cpu().isas())})"


def cuda() -> ModuleType:
    """The CUDA kernels; call only if ``cuda_reason`` is None."""
    module = _load("_cuda")[0]
    assert module is not None
    return module


@cache
def cuda_reason() -> str | None:
    """Why the CUDA kernels cannot run in this installation, or None."""
    if reason := _load("_cuda")[1]:
        return f"{reason} (no nvcc when it was installed?)"
    if not torch.cuda.is_available():
        return "no CUDA device"
    reason = cuda().unavailable()
    return reason and f"the extension fastdistill._cuda was not built for this GPU and driver: {reason}"


def cuda_summary() -> str:
    """Whether the CUDA kernels were built."""
    return "built" if _load("_cuda")[1] is None else str(cuda_reason())


def stream(tensor: Tensor) -> int:
    """The handle of the CUDA stream on which a kernel for this tensor must be launched."""
    return int(torch.cuda.current_stream(tensor.device).cuda_stream) if tensor.is_cuda else 0


def queue(tensor: Tensor) -> tuple[int, int]:
    """The same handle, and the GPU's number of multiprocessors; small if the GPU is emulated, so that persistent loops
    iterate."""
    return stream(tensor), _processors(tensor.get_device()) if tensor.is_cuda else 2


@cache
def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def triton_reason() -> str | None:
    """Why the Triton kernels cannot run in this installation, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation may raise anything
        return f"triton does not load: {error}"
    return None


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, without gaps or overlaps, in any order of the dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def overlaps(tensor: Tensor) -> bool:
    """Whether two elements may share their memory, as those of an expanded tensor do."""
    if tensor.is_contiguous():
        return False
    end = 0  # largest offset that the dimensions so far can reach
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride <= end:
            return tensor.numel() > 0
        end += stride * (size - 1)
    return False


def same_order(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape have their elements in the same order in memory."""
    if (steps := one.stride()) == (others := other.stride()):
        return True
    return all(size < 2 or a == b for size, a, b in zip(one.shape, steps, others, strict=True))
