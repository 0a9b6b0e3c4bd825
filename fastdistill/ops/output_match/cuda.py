# SPDX-License-Identifier: Apache-2.0
"""Output matching in CUDA: ``csrc/output_match/cuda.cu``. It supports the same calls as the C++ kernel."""

from __future__ import annotations

from typing import Any

import torch

from fastdistill.ops import _native
from fastdistill.ops.output_match.cpp import addresses


def output_match(*arguments: Any) -> None:
    """Two launches; arguments as in the reference. A timestep or latent index out of range makes the loss
    NaN."""
    student = arguments[0]
    given = addresses(*arguments)
    batch, matched = given[13], given[14]
    size = _native.cuda().output_match_workspace(batch, matched)
    workspace = torch.empty(size, dtype=torch.float64, device=student.device)
    _native.cuda().output_match(*given, workspace.data_ptr(), _native.queue(student))
