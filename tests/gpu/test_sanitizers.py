# SPDX-License-Identifier: Apache-2.0
"""Every kernel for a GPU under NVIDIA's compute-sanitizer, in a process of its own: ``make gpu-sanitizers``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.work import KERNELS, PAIRS, main

ROOT = Path(__file__).parents[2]
PLACES = [os.environ.get("PATH", ""), *(f"{os.environ.get(v, '')}/bin" for v in ("CUDA_HOME", "CUDA_PATH"))]
TOOL = shutil.which("compute-sanitizer", path=os.pathsep.join([*PLACES, "/usr/local/cuda/bin"]))
# Every tensor is a separate allocation, so that accesses past its end are detected.
WITHOUT_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
PLANTED = """
import torch
from fastdistill.ops import _native
x, factor = torch.ones(64, device="cuda"), torch.full((), 2.0, device="cuda")
_native.cuda().scale_gradients([x.data_ptr()], [65], [0], factor.data_ptr(), _native.queue(x))
torch.cuda.synchronize()
"""


def run(tool: str, *command: str) -> tuple[int, str]:
    """The exit code and the output; the output is also printed at once, because the run may be stopped."""
    assert TOOL is not None
    options = "--error-exitcode", "17", "--print-limit", "20"
    output = ""
    with subprocess.Popen(
        [TOOL, "--tool", tool, *options, sys.executable, *command],
        cwd=ROOT, env=os.environ | WITHOUT_CACHE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        for line in process.stdout or ():
            print(line, end="", flush=True)
            output += line
    return process.returncode, output


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.skipif(TOOL is None, reason="no compute-sanitizer on PATH, in CUDA_HOME or in /usr/local/cuda")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_every_kernel_is_clean(tool: str, kernel: str) -> None:
    code, output = run(tool, "-m", "tests.gpu.work", "cuda", kernel)
    assert code == 0, output[-12000:]
    assert all(f"{kernel} {op} wrote" in output for k, op in PAIRS if k == kernel), output[-12000:]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.skipif(TOOL is None, reason="no compute-sanitizer on PATH, in CUDA_HOME or in /usr/local/cuda")
def test_a_planted_bug_is_found() -> None:
    code, output = run("memcheck", "-c", PLANTED)
    assert code != 0 and "Invalid __global__" in output, output[-4000:]


def test_what_the_process_that_is_watched_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Every kernel; emulated if there is no GPU."""
    main("cuda" if torch.cuda.is_available() else "cpu")
    assert [line.split(" wrote")[0] for line in capsys.readouterr().out.splitlines()] == [f"{k} {w}" for k, w in PAIRS]
