# SPDX-License-Identifier: Apache-2.0
"""The draw of a training batch in CUDA: ``csrc/noise_gather/cuda.cu``. It takes the calls that the C++ kernel takes."""

from __future__ import annotations

from typing import Any

from fastdistill.ops import _native
from fastdistill.ops.noise_gather.cpp import arguments


def noise_gather(*args: Any) -> None:
    """One launch; arguments as the reference's. A prompt row that the bank does not have comes out with all bits set:
    NaN, -1."""
    _native.cuda().noise_gather(*arguments(*args), _native.queue(args[14]))
