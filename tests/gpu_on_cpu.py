# SPDX-License-Identifier: Apache-2.0
"""GPU kernels on a machine without a GPU: each is also registered for CPU tensors and runs if a test selects it.

Triton kernels run in its interpreter, CUDA kernels under ``tests/cuda_on_cpu``, on tensors between protected pages.
This module must be imported first, because Triton decides when a kernel is defined whether it will be interpreted. If
there is a GPU, the kernels run on it and nothing is emulated.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

EMULATED = not torch.cuda.is_available()
OURS = ("triton", "cuda")  # the backends of attention are kernels of other packages
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


def _patch_once() -> None:
    """Triton's interpreter patches the modules of its language for each launch, and again in every call of a device
    function, which takes half of its time. With this patch, each module is patched only once per launch."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = interpreter._patch_lang
    patched: set[str] = set()  # in this launch

    @functools.cache
    def seen_by(fn: Any) -> set[str]:
        return {module.__name__ for module in fn.__globals__.values() if module is tl or module is tl.core}

    def patch_what_is_not(fn: Any) -> Any:
        if patched:
            if not seen_by(fn) <= patched:
                patch(fn)
                patched.update(seen_by(fn))
            return None
        scope = patch(fn)
        patched.update(seen_by(fn))
        restore = scope.restore

        def end() -> None:
            patched.clear()
            restore()

        scope.restore = end
        return scope

    interpreter._patch_lang = patch_what_is_not


def _round_float8() -> None:
    """Triton's interpreter loses the carry of a rounded significand in float8; a GPU rounds as torch does."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    convert = interpreter._convert_float

    def rounded(input: Any, input_dtype: Any, output_dtype: Any, rounding_mode: Any) -> Any:
        if input_dtype != tl.float32 or output_dtype != tl.float8e4nv:
            return convert(input, input_dtype, output_dtype, rounding_mode)
        values = torch.frombuffer(bytearray(input.tobytes()), dtype=torch.float32)
        return values.to(torch.float8_e4m3fn).view(torch.uint8).reshape(input.shape).numpy()

    interpreter._convert_float = rounded


if sanitizers.SANITIZE:
    fastdistill.__path__.insert(0, str(sanitizers.BUILT / "fastdistill"))
if EMULATED:
    _patch_once()
    _round_float8()
    _native.cuda = cuda_on_cpu.module
    for op in OPS.values():
        op.kernels = [*op.kernels, *(_emulated(k) for k in op.kernels if k.device == "cuda" and k.name in OURS)]
