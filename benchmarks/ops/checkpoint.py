# SPDX-License-Identifier: Apache-2.0
"""How long a checkpoint stops the training loop, compared with one copy of as much memory.

The state is that of a trained float32 student: weights, two moments and averages, in tensors with the sizes of a U-Net.
No earlier write is in progress, as if the time between checkpoints were longer than a write. Before the timing, a
checkpoint is written and read back, and the peak of host memory is printed: beside the state it may take at most 1.1
times the state.
"""

from __future__ import annotations

import functools
import itertools
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.registry import Case, Workload

SIZES = (0.5, 2.0, 8.0)  # GB
SHAPES = ((1280, 1280, 3, 3), (1280,), (640, 640, 3, 3), (10240, 1280), (320, 768), (1280, 1280))  # shapes of weights
COPY = "one memory copy"
FINGERPRINT = {"benchmark": "checkpoint"}


def cases() -> Iterator[Case]:
    for size in SIZES:
        for device in ("cpu", "cuda"):
            build = functools.partial(_workload, size)
            yield Case(
                "checkpoint", f"{size:g} GB", "fp32", device, build, (COPY,), headline=size == 2 and device == "cuda"
            )


def _state(memory: Tensor) -> dict[str, Tensor]:
    """The whole memory [N] float32, divided into named tensors."""
    state: dict[str, Tensor] = {}
    start = 0
    for i, shape in enumerate(itertools.cycle(SHAPES)):
        count = torch.Size(shape).numel()
        for kind in ("student", "exp_avg", "exp_avg_sq", "ema"):
            if start == len(memory):
                return state
            part = memory[start : start + count]
            state[f"{kind}.{i}"] = part.view(shape) if len(part) == count else part
            start += len(part)
    raise AssertionError


def _workload(size: float, device: torch.device) -> Workload:
    from fastdistill.train import checkpoint
    from fastdistill.train.writing import Writer

    memory = torch.empty(round(size * 1e9) // 4, device=device)
    memory.uniform_(-1, 1, generator=torch.Generator(device).manual_seed(0))
    state, writer = _state(memory), Writer()

    def ours() -> None:
        writer.wait()
        checkpoint.head(state, 1, 0.0, FINGERPRINT, [])
        writer.staging.hold(state)
        writer.begin(lambda going: None)

    def copy() -> None:
        into = writer.staging.memory[: memory.nbytes].view(torch.float32)
        into.copy_(memory, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def check() -> None:
        before = _resident()
        with tempfile.TemporaryDirectory() as folder:
            head = checkpoint.head(state, 1, 0.0, FINGERPRINT, [])
            path = checkpoint.save(Path(folder), writer.staging.hold(state), head)
            extra = (1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / memory.nbytes
            print(f"  peak of the host's memory: {extra:.3f} times the state, beside it", file=sys.stderr, flush=True)
            assert extra <= 1.1, f"{extra:.3f} times the state, beside it"
            if size < 1:
                found = checkpoint.read(path)[0].state
                assert all(torch.equal(found[name], tensor.cpu()) for name, tensor in state.items())

    return Workload(ours, {COPY: copy}, check, bytes=2 * memory.nbytes, graphs=False)


def _resident() -> int:
    """The resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
