# SPDX-License-Identifier: Apache-2.0
"""The draw of a training batch in CUDA: ``csrc/noise_gather/cuda.cu``. It supports the same calls as the C++ kernel."""

from __future__ import annotations

from typing import Any

from fastdistill.ops import _native
from fastdistill.ops.noise_gather.cpp import arguments


def noise_gather(*args: Any) -> None:
    """One launch; arguments as in the reference. A prompt row that is out of range gives a row with all bits set
    (NaN, -1)."""
    _native.cuda().noise_gather(*arguments(*args), _native.queue(args[14]))
