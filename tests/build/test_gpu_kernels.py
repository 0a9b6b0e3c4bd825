# SPDX-License-Identifier: Apache-2.0
"""Every GPU kernel compiles without a GPU, has no spills, and keeps copies of sums equal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernels import cuda
from benchmarks.kernels.resources import occupancy, unequal_copies
from fastdistill.ops import OPS, _native

ROOT = Path(__file__).parents[2]


def test_triton_ahead_of_time() -> None:
    """In a new process, because Triton does not compile in a process in which it interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.kernels.triton"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    for op in (name for name, op in OPS.items() if any(k.name == "triton" for k in op.kernels)):
        for arch in ("sm_90", "sm_100") if op == "quantize_rows" else ("sm_80", "sm_90", "sm_100"):
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
        (80, 33, 0, 256, 0.75),  # 40 registers per thread allow 48 warps
        (80, 255, 0, 256, 0.125),
        (86, 32, 0, 1024, 2 / 3),  # one block of 32 warps of 48
        (90, 32, 115 << 10, 256, 0.125),  # one block holds more than half of the shared memory
        (90, 16, 0, 32, 0.5),  # 32 blocks of one warp
    ],
)
def test_occupancy(arch: int, registers: int, shared: int, threads: int, expected: float) -> None:
    """The figures of NVIDIA's occupancy calculator."""
    assert occupancy(arch, registers, shared, threads) == pytest.approx(expected)


def test_unequal_copies_of_a_sum() -> None:
    """Sums of products over threads in float32 and float64 as Triton generates them, and similar code that is
    correct."""
    fused = "fma.rn.f32 \t%r391, %r236, %r388, %r390;"
    wide = "fma.rn.f64 \t%rd5, %rd1, %rd2, %rd4;"
    ptx = f"""
        mul.f32 \t%r389, %r236, %r388;
        shfl.sync.bfly.b32 \t%r390, %r389, 8, 31, -1;
        {fused}
        shfl.sync.bfly.b32 \t%r392, %r391, 4, 31, -1;
        add.f32 \t%r393, %r391, %r392;
        fma.rn.f32 \t%r394, %r7, %r8, %r393;
        mov.b64 \t{{%r1, %r2}}, %rd3;
        shfl.sync.bfly.b32 \t%r3|%p1, %r1, 8, 31, -1;
        @%p2 shfl.sync.bfly.b32 \t%r4|%p1, %r2, 8, 31, -1;
        mov.b64 \t%rd4, {{%r3, %r4}};
        {wide}
        fma.rn.f32 \t%r392, %r392, %r7, 0f00000000;
        fma.rn.f32 \t%r396, %r7, %r8, %r392;
    """
    assert unequal_copies(ptx) == [fused, wide]
