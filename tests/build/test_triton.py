# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles for GPUs that are not here, and spills nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from fastdistill.ops import OPS

ROOT = Path(__file__).parents[2]


def test_ahead_of_time() -> None:
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
