# SPDX-License-Identifier: Apache-2.0
"""Kernels for a GPU on a machine without one: each is registered for CPU tensors too and runs when a test forces it.

Triton's run in its interpreter, CUDA's under ``tests/cuda_on_cpu``, between pages that must not be touched. It is
import-time work, as Triton decides when a kernel is defined whether it will be interpreted. Where there is a GPU the
kernels run there, and nothing is emulated.
"""

from __future__ import annotations

import os
from typing import Any

import torch

EMULATED = not torch.cuda.is_available()
OURS = ("triton", "cuda")  # the backends of attention are others' kernels
if EMULATED:
    os.environ["TRITON_INTERPRET"] = "1"

import fastdistill  # noqa: E402
from fastdistill.ops import OPS, _dispatch, _native  # noqa: E402
from fastdistill.ops._dispatch import Kernel  # noqa: E402
from tests import cuda_on_cpu, sanitizers  # noqa: E402
from tests.cuda_on_cpu.guard import guarded  # noqa: E402


def _emulated(kernel: Kernel) -> Kernel:
    def refuse(*args: Any) -> str | None:
        if _dispatch.forced() != kernel.name:
            return "emulated only when it is asked for"
        return kernel.refuse(*args)

    launch = guarded(kernel.launch) if kernel.name == "cuda" else kernel.launch
    return Kernel(kernel.name, "cpu", launch, lambda: None, refuse)


if sanitizers.SANITIZE:
    fastdistill.__path__.insert(0, str(sanitizers.BUILT / "fastdistill"))
if EMULATED:
    _native.cuda = cuda_on_cpu.module
    for op in OPS.values():
        op.kernels = [*op.kernels, *(_emulated(k) for k in op.kernels if k.device == "cuda" and k.name in OURS)]
