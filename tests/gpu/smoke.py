# SPDX-License-Identifier: Apache-2.0
"""Whether each kernel for a GPU runs at all: ``python -m tests.gpu.smoke DEVICE``, in seconds, before anything else.

Each takes one small step of its op, compared with the reference's on the same device, in a process of its own, a few at
a time, so that a crash costs one kernel of one op. A line each, as they end; the exit code is 1 if one failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from fastdistill.ops import use
from tests.gpu.work import KERNELS, PAIRS, REASONS, WORKS

ROOT = Path(__file__).parents[2]
SECONDS = 120.0  # a process: the import of torch, Triton's compiler, one step
#: Of a tensor's own precision, in norm: both round what they return to it, and compute in float32 at least.
FACTOR = 8.0


def differences(work: str, kernel: str, device: str) -> Iterator[tuple[float, float]]:
    """How far each tensor that a step writes is from the reference's, and how far it may be: relative to its own size,
    or to that of all of them where it is smaller, as what is left of terms that cancel is."""
    written = []
    for name in (kernel, "reference"):
        with use(name):
            written.append([t.detach().cpu() for t in WORKS[work](device).step()])
    floats = [t.double().flatten() for t in written[1] if t.is_floating_point() and t.numel()]
    usual = torch.cat(floats).square().mean().sqrt() if floats else torch.tensor(0.0)
    for a, b in zip(*written, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype or not b.is_floating_point():
            yield (0.0 if a.dtype == b.dtype and torch.equal(a, b) else float("inf")), 0.0
        else:
            size = max(b.double().norm().item(), usual.item() * b.numel() ** 0.5)
            yield (a.double() - b.double()).norm().item(), FACTOR * torch.finfo(b.dtype).eps * size


def one(work: str, kernel: str, device: str) -> str | None:
    """What is wrong with it, or None."""
    for i, (far, bound) in enumerate(differences(work, kernel, device)):
        if not far <= bound:  # NaN is wrong too
            return f"tensor {i}: expected a distance of at most {bound:.2g} from the reference's, got {far:.2g}"
    return None


def _command(work: str, kernel: str, device: str) -> list[str]:
    return [sys.executable, "-m", "tests.gpu.smoke", device, work, kernel]


def _apart(work: str, kernel: str, device: str) -> str | None:
    """The same in another process: what it said last where it did not end well."""
    command = _command(work, kernel, device)
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"not done in {SECONDS:.0f} s"
    said = [line for line in done.stdout.splitlines() if line.strip()][-3:]
    return None if done.returncode == 0 else f"ended with {done.returncode}: {' | '.join(said)}"


def main(device: str, *pair: str) -> int:
    if pair:
        if device == "cpu":
            import tests.gpu_on_cpu  # noqa: F401
        wrong = one(*pair, device)
        print(wrong or "right")
        return 1 if wrong else 0
    for name, reason in REASONS.items():
        if name not in KERNELS:
            print(f"left out: {name}: {reason()}", flush=True)
    start, failed = time.monotonic(), 0
    pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2))
    try:
        waiting = {pool.submit(_apart, work, kernel, device): f"{kernel} {work}" for kernel, work in PAIRS}
        for done in as_completed(list(waiting)):
            failed += done.result() is not None
            its = f"{waiting.pop(done)}: {done.result() or 'right'}"
            print(f"{time.monotonic() - start:5.1f} s  {its}", flush=True)
    finally:
        for name in waiting.values():
            print(f"         {name}: not done", flush=True)
        pool.shutdown(cancel_futures=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
