# SPDX-License-Identifier: Apache-2.0
"""Every kernel for a GPU compiles for GPUs that are not here, and spills nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernels import cuda
from benchmarks.kernels.resources import occupancy
from fastdistill.ops import OPS, _native

ROOT = Path(__file__).parents[2]


def test_triton_ahead_of_time() -> None:
    """In a process of its own: where Triton interprets, it does not compile."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.kernels.triton"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    for op in (name for name, op in OPS.items() if any(k.name == "triton" for k in op.kernels)):
        for arch in ("sm_80", "sm_90", "sm_100"):
            compiled = [row for row in rows if row["op"].split()[0] == op and row["arch"] == arch]
            assert compiled, f"{op} was not compiled for {arch}"
            assert all(row["spill_bytes"] == 0 and row["registers"] > 0 for row in compiled), compiled
            assert all(0 < row["occupancy"] <= 1 for row in compiled), compiled


def test_triton_of_the_smallest_sizes() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.build.ones"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    ops = {line.split()[0] for line in done.stdout.splitlines()}
    assert ops == {name for name, op in OPS.items() if any(k.name == "triton" for k in op.kernels)}


@pytest.mark.skipif(_native.cuda_summary() != "built", reason="the CUDA kernels were not built")
def test_cuda_as_built() -> None:
    rows = list(cuda.rows())
    for op in (name for name, op in OPS.items() if any(k.name == "cuda" for k in op.kernels)):
        assert {row.arch for row in rows if row.op == op} == {"sm_80", "sm_90", "sm_100"}
    assert all(row.spill_bytes == 0 and 0 < row.occupancy <= 1 for row in rows), rows


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "expected"),
    [
        (80, 32, 0, 256, 1.0),
        (80, 64, 0, 256, 0.5),
        (80, 33, 0, 256, 0.75),  # 40 registers a thread are 48 warps
        (80, 255, 0, 256, 0.125),
        (86, 32, 0, 1024, 2 / 3),  # one block of 32 warps of 48
        (90, 32, 115 << 10, 256, 0.125),  # one block holds more than half of the shared memory
        (90, 16, 0, 32, 0.5),  # 32 blocks of one warp
    ],
)
def test_occupancy(arch: int, registers: int, shared: int, threads: int, expected: float) -> None:
    """The figures of the occupancy calculator."""
    assert occupancy(arch, registers, shared, threads) == pytest.approx(expected)
