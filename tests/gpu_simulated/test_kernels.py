# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel, as compiled for a GPU, gives the reference's results and contains no forbidden operation."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import processes
from tests.gpu_simulated import block, memory
from tests.gpu_simulated.driver import missing

REASON = "there is a GPU" if torch.cuda.is_available() else missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
ROOT = Path(__file__).parents[2]
OLDEST = ROOT / "build" / "triton-3.6.0"  # make kernels-report
EPS = torch.finfo(torch.float32).eps
QUICK = ["geglu", "layer_norm_modulate", "group_norm_silu", "cross_attention"]
#: The instruction that is removed from every kernel of a step (``works.PLANTS``), and what is then detected.
PLANTED = {
    "bar.sync": {
        memory.READ_AFTER_WRITE, memory.WRITE_AFTER_WRITE, memory.WRITE_AFTER_READ, memory.NO_BARRIER
    },
    "fence.proxy.async": {memory.NO_FENCE},
    "wgmma.wait_group": {block.ACCUMULATOR_READ, memory.READ_BY_WGMMA, memory.NOT_AWAITED},
    "cp.async.wait_group": {memory.COPY_UNDER_WAY, memory.UNWRITTEN, memory.NOT_AWAITED},
}  # fmt: skip
SUMS = {"cross_attention-77-fp32": 80}  # its head dim: a score's terms
#: The largest number of float8 and the step there, for results in float8: the GELU before them is computed in float32,
#: whose last bit differs between processors, so of two neighbors either may be found. (Without GELU the bits are equal:
#: tests/ops/test_quantize_rows.py.)
STEPS = {"quantize_rows": (448.0, 32.0)}
#: Triton 3.6 omits a fence between a cp.async or store and the wgmma that reads its data. In one place of
#: ``_cross_attention_backward`` it writes registers after the wgmma.fence. 3.9 has fixed both.
KNOWN = {"3.6": {memory.NO_FENCE, block.NOT_FENCED}}


def simulate(*arguments: str, triton: Path | None = None) -> dict[str, Any]:
    """The output of ``works`` in a new process, with the installed Triton or the one in a folder."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if triton is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(triton), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu_simulated.works", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout)


def check(made: dict[str, Any], names: list[str] | None = None) -> None:
    """Equal within 8 eps of the largest value (both may be off by 4), plus 4 of float32, which is left if terms of size
    1 cancel. Sums in float64 have float32 terms. ``SUMS``: two sums of n terms, each off by eps sqrt(n) of the terms'
    magnitudes, whose sum is larger than the largest result."""
    known = KNOWN.get(".".join(made["triton"].split(".")[:2]), set())
    for name in names or made["works"]:
        work = made["works"][name]
        assert not work["fault"], f"{name}: {work['fault']}"
        found = [tuple(row) for row in work["found"] if row[1] not in known]
        assert not found, f"{name}: {found[:8]}"
        assert work["errors"] and work["ran"], name
        for dtype, error, largest in work["errors"]:
            number = getattr(torch, dtype)
            eps = max(torch.finfo(number).eps, EPS) if number.is_floating_point else 0.0
            factor = max(8.0, 2 * math.sqrt(SUMS.get(name, 1)))
            allowed = factor * eps * largest + (4 * EPS if eps else 0)
            if name in STEPS and largest == STEPS[name][0]:
                allowed = STEPS[name][1]
            assert error <= allowed, f"{name}: off by {error} of {largest} in {dtype}, allowed {allowed}"


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "made.json").write_text(json.dumps(simulate(*QUICK, "--plant")))

    return json.loads((processes.once(tmp_path_factory, "simulated", make) / "made.json").read_text())


@pytest.mark.parametrize("name", QUICK)
def test_kernels(quick: dict[str, Any], name: str) -> None:
    check(quick, [name])


@pytest.mark.parametrize("pattern", PLANTED)
def test_an_instruction_that_a_kernel_lacks_is_found(quick: dict[str, Any], pattern: str) -> None:
    made = quick["planted"][pattern]
    assert PLANTED[pattern] <= {what for _, what, *_ in made["found"]}, made


def kernels() -> set[str]:
    """The names of all Triton kernels in the committed report."""
    with (ROOT / "benchmarks" / "kernels" / "report.csv").open(encoding="utf-8") as file:
        return {row["kernel"] for row in csv.DictReader(file) if row["backend"] == "triton"}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["90", "80"])
def test_every_kernel(arch: str) -> None:
    made = simulate("--arch", arch)
    check(made)
    if arch == "90":
        assert {kernel for work in made["works"].values() for kernel in work["ran"]} == kernels()


@pytest.mark.slow
def test_every_kernel_of_the_oldest_triton() -> None:
    if not OLDEST.is_dir():
        pytest.skip("no build/triton-3.6.0 (make kernels-report)")
    made = simulate(triton=OLDEST)
    assert made["triton"] == "3.6.0"
    check(made)
