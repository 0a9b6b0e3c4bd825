# SPDX-License-Identifier: Apache-2.0
"""Triton kernels on a machine without a GPU: each is registered for CPU tensors too and run by Triton's interpreter.

It is import-time work, as Triton decides when a kernel is defined whether it will be interpreted. Where there is a GPU
the kernels run there, and nothing is interpreted.
"""

from __future__ import annotations

import os
from typing import Any

import torch

INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"

from fastdistill.ops import OPS  # noqa: E402
from fastdistill.ops._dispatch import Kernel, _forced  # noqa: E402


def _interpreted(kernel: Kernel) -> Kernel:
    def refuse(*args: Any) -> str | None:
        if _forced.get() != kernel.name:
            return "interpreted only when it is asked for"
        return kernel.refuse(*args)

    return Kernel(kernel.name, "cpu", kernel.launch, lambda: None, refuse)


if INTERPRETED:
    for op in OPS.values():
        op.kernels = [*op.kernels, *(_interpreted(k) for k in op.kernels if k.name == "triton")]
