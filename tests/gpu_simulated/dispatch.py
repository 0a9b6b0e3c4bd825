# SPDX-License-Identifier: Apache-2.0
"""Calls with CPU tensors go the way of a GPU's tensors, from the public functions to the launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from fastdistill.ops import OPS, _dispatch, _native
from fastdistill.ops._dispatch import Kernel, Kind


class _Extension:
    """The CUDA extension, if it was built, without its launches."""

    def __getattr__(self, name: str) -> Any:
        if name.endswith(("_shared", "_workspace")):  # how much memory a call needs is computed on the host
            return getattr(_native._load("_cuda")[0], name)
        return lambda *args: None


@contextmanager
def as_on_a_gpu(kernel: str) -> Iterator[None]:
    """Inside, calls with CPU tensors go the way of a GPU's, and take this kernel where an op has it."""
    extension = _Extension()
    with ExitStack() as stack:
        stack.enter_context(patch.object(Kind, "of", classmethod(lambda cls, tensors: cls(on_cpu=False))))
        stack.enter_context(patch.object(_dispatch, "_several_gpus", lambda: False))
        stack.enter_context(patch.object(_native, "cuda", lambda: extension))
        for op in OPS.values():
            found = [k for k in op.kernels if k.device == "cuda" and k.name in (kernel, "triton")]
            kernels = [
                Kernel(k.name, device, k.launch, lambda: None, k.refuse)
                for k in found
                for device in ("cuda", "cpu")  # some calls go through torch's dispatcher, which goes by the tensors
            ]
            stack.enter_context(patch.object(op, "kernels", kernels))
        yield
