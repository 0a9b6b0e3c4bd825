# SPDX-License-Identifier: Apache-2.0
"""The ops' tests with all compiled code under the compiler's sanitizers: ``python -m tests.sanitizers [pytest's]``.

AddressSanitizer and UndefinedBehaviorSanitizer check the C++ kernels and the CUDA kernels emulated by
``tests/cuda_on_cpu``. Both are built separately with ``FASTDISTILL_SANITIZE``; the first finding ends the process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SANITIZE = os.environ.get(
    "FASTDISTILL_SANITIZE", ""
)  # the value of -fsanitize; if set, this process loads the sanitized build
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
    """The environment for a Python without sanitizers. GPUs are hidden, so that CUDA kernels are emulated."""
    names = "libasan.so", "libstdc++.so"
    runtimes = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in names]
    return os.environ | {
        "FASTDISTILL_SANITIZE": sanitize,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python frees much memory only at exit or not at all
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
