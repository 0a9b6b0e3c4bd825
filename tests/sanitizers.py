# SPDX-License-Identifier: Apache-2.0
"""The ops' tests with all compiled code under the compiler's sanitizers: ``python -m tests.sanitizers [pytest's]``.

Address and undefined behavior, over the C++ kernels and over the CUDA kernels as ``tests/cuda_on_cpu`` runs them. Both
are built beside the ordinary ones, with ``FASTDISTILL_SANITIZE`` set; a first finding ends the process with its report.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SANITIZE = os.environ.get(
    "FASTDISTILL_SANITIZE", ""
)  # what -fsanitize takes; set: this process loads what was built so
BUILT = ROOT / "build" / "sanitized"
TESTS = [
    "tests/ops",
    "tests/build/test_primitives.py",
    "tests/cuda_on_cpu/test_sanitizers.py",
    "-m",
    "not slow",
    "-k",
    "not triton and not reference",
]


def environment(sanitize: str) -> dict[str, str]:
    """For a Python that was built without sanitizers; nothing is seen of a GPU, so that CUDA kernels are emulated."""
    names = "libasan.so", "libstdc++.so"
    runtimes = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in names]
    return os.environ | {
        "FASTDISTILL_SANITIZE": sanitize,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps much to its end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def main(arguments: list[str]) -> int:
    sanitize = SANITIZE or "address,undefined"
    settings = {"FASTDISTILL_SANITIZE": sanitize, "FASTDISTILL_CPU": "1", "FASTDISTILL_CUDA": "0"}
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(BUILT)]
    subprocess.run(build, cwd=ROOT, env=os.environ | settings, check=True)
    tests = [sys.executable, "-m", "pytest", *TESTS, *arguments]
    return subprocess.run(tests, cwd=ROOT, env=environment(sanitize)).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
