# SPDX-License-Identifier: Apache-2.0
"""No instruction of a compiled kernel accesses registers of an unfinished wgmma; a planted one is detected."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernels import lint
from benchmarks.kernels.sass import Instruction
from fastdistill.ops import _native
from tests.gpu_simulated.hazards import ACCUMULATOR_READ, ACCUMULATOR_WRITTEN, OPERAND_WRITTEN, hazards
from tests.gpu_simulated.test_kernels import OLDEST, ROOT

#: A loop whose wgmma has A in registers 4 to 7 and adds to 24 to 31.
LOOP = """
    LDG.E.128 R4, desc[UR4][R2.64]
    WARPGROUP.ARRIVE
    HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0
    IADD3 R2, R2, 0x10, RZ
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    FADD R32, R24, R25
    ISETP.NE.AND P0, PT, R2, R3, PT
    BRA 0x0
    STG.E.128 desc[UR4][R2.64], R24
    EXIT
"""
BUGS = {
    "operand": ("IADD3 R2, R2, 0x10, RZ", "IADD3 R5, R2, 0x10, RZ", (0x30, OPERAND_WRITTEN)),
    "operand by a wide load": ("IADD3 R2, R2, 0x10, RZ", "LDS.64 R6, [R2]", (0x30, OPERAND_WRITTEN)),
    "accumulator": ("IADD3 R2, R2, 0x10, RZ", "MOV R30, RZ", (0x30, ACCUMULATOR_WRITTEN)),
    "accumulator before the wait": ("IADD3 R2, R2, 0x10, RZ", "FADD R33, R31, R25", (0x30, ACCUMULATOR_READ)),
    "operand of the turn before": ("gsb0, 0x0", "gsb0, 0x1", (0x0, OPERAND_WRITTEN)),
    "accumulator that is stored": ("gsb0, 0x0", "gsb0, 0x1", (0x80, ACCUMULATOR_READ)),
}


def assembled(text: str) -> list[Instruction]:
    lines = [line.strip() for line in text.strip().splitlines()]
    return [Instruction(16 * i, line, "", 1, 7, 7, 0) for i, line in enumerate(lines)]


def test_a_loop_that_waits() -> None:
    assert not hazards(assembled(LOOP))


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_hazard_is_found(bug: str) -> None:
    right, wrong, found = BUGS[bug]
    assert LOOP.count(right) == 1
    assert found in hazards(assembled(LOOP.replace(right, wrong)))


def compiled(folder: Path | None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if folder is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu_simulated.wgmmas"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.skipif(_native.cuda_summary() != "built", reason="the CUDA kernels were not built")
def test_the_cuda_kernels_with_wgmmas() -> None:
    from fastdistill import _cuda

    with_products = 0
    for name, code in lint.code_of(_cuda.__file__).items():
        with_products += any(i.name == "HGMMA" for i in code)
        assert not hazards(code), name
    assert with_products == 28


@pytest.mark.slow
@pytest.mark.parametrize("folder", [None, OLDEST], ids=["installed", "oldest"])
def test_every_kernel_with_wgmmas(folder: Path | None) -> None:
    if folder is not None and not folder.is_dir():
        pytest.skip("no build/triton-3.6.0 (make kernels-report)")
    done = compiled(folder)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(kernels) >= 10
    assert any(int(from_registers) for _, _, from_registers, *_ in kernels)
    assert not [kernel for kernel in kernels if kernel[3]], kernels
    assert all(int(kernel[4]) for kernel in kernels), kernels
