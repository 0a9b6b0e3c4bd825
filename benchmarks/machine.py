# SPDX-License-Identifier: Apache-2.0
"""The machine of a measurement: its name, versions, and its peak rates, measured in the same run."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import stopwatch
from fastdistill.ops import _native

ROOT = Path(__file__).parent.parent


def device_name(device: torch.device) -> str:
    """The name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def slug(device: torch.device) -> str:
    """The name of the device's file: ``cpu-intel-xeon-processor``, ``gpu-nvidia-h100-80gb-hbm3``."""
    name = re.sub(r"\((r|tm)\)", "", device_name(device).lower())
    kind = "gpu" if device.type == "cuda" else "cpu"
    return f"{kind}-{re.sub(r'[^a-z0-9]+', '-', name).strip('-')}"


@functools.cache
def versions(device: torch.device) -> dict[str, Any]:
    """The fields of a row that tell where it comes from."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    now = datetime.datetime.now(datetime.UTC)
    return {
        "date": now.date().isoformat(),
        "run": now.time().isoformat("seconds"),  # equal in all rows of a process
        "isa": _native.cpu().isa() if device.type == "cpu" and _native.cpu_reason() is None else "",
        "driver": _smi("driver_version", device),
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "commit": commit(),
    }


def commit(name: str = "") -> str:
    """The commit of this tree (FASTDISTILL_COMMIT, or git's, with "-dirty" if it was changed), or of ``name``."""
    if not name and (told := os.environ.get("FASTDISTILL_COMMIT")):
        return told
    described = "git describe --always --dirty".split()
    wanted = ["git", "rev-parse", "--short", "--verify", f"{name}^{{commit}}"] if name else described
    done = subprocess.run(wanted, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() or ("" if name else "unknown")


def load(device: torch.device) -> dict[str, str]:
    """A GPU's current clocks in MHz and power in watts; "" if nvidia-smi does not report them."""
    names = ("sm_mhz", "memory_mhz", "watts")
    told = _smi("clocks.sm,clocks.mem,power.draw", device)
    values = [value.strip() for value in told.split(",")]
    return dict(zip(names, values if len(values) == len(names) else [""] * len(names), strict=True))


def _smi(fields: str, device: torch.device) -> str:
    """What nvidia-smi reports for this GPU. It numbers all GPUs of the machine, CUDA only the visible ones."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ""
    uuid = torch.cuda.get_device_properties(device).uuid
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", f"--id=GPU-{uuid}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@functools.cache
def copy_gb_s(device: torch.device) -> float:
    """Bytes per second that a copy of 256 MiB (1 GiB on a GPU) reads and writes, median of several. An op can only
    reach more than 100 % of it if its data are in a cache."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timed = stopwatch([lambda: target.copy_(source)], device)
    timed()
    return 2 * size / 1e6 / statistics.median(timed() for _ in range(11))


@functools.cache
def matmul_tflop_s(dtype: torch.dtype, device: torch.device) -> float:
    """TFLOP/s of a square matrix product of random numbers: size 8192 on a GPU, 1024 on a CPU."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    out = torch.empty_like(a)
    timed = stopwatch([lambda: torch.mm(a, b, out=out)], device)
    return 2 * n**3 / 1e9 / min(timed() for _ in range(25))
