# SPDX-License-Identifier: Apache-2.0
"""``make test-isa``: tests that compute with models, under every instruction set of this processor, with one and two
threads.

torch's own kernels, oneDNN, MKL and our kernels choose code by the instruction set. A test whose result depends on it
would fail on another machine. Before the tests of a level, a probe asks each library which instruction set it uses,
because a library may ignore the variable. Levels that the processor does not have are listed as not run.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEVELS = {
    "baseline": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "MKL_CBWR": "COMPATIBLE",
        "FASTDISTILL_CPU_ISA": "baseline",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "MKL_CBWR": "AVX2",
        "FASTDISTILL_CPU_ISA": "avx2",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "MKL_CBWR": "AVX512",
        "FASTDISTILL_CPU_ISA": "avx512",
    },
}
FLAGS = {"baseline": set(), "avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}}
TESTS = "diffusion distill evaluate models ops tasks train test_readme.py".split()
#: The tests that are most sensitive to rounding; they take about a minute.
SHORT = [
    "tests/diffusion",
    "tests/distill",
    "tests/models/test_fuse.py",
    "tests/tasks/test_digits_parts.py",
    "tests/train/test_trainer.py",
]
_PROBE = """
import torch
from torch.nn import functional as F
torch.mm(torch.ones(32, 32), torch.ones(32, 32))
F.conv2d(torch.ones(2, 32, 32, 32), torch.ones(32, 32, 3, 3))
from fastdistill.ops import _native
ours = _native.cpu().isa() if _native.cpu_reason() is None else "not built"
print("probe", torch.backends.cpu.get_cpu_capability().lower(), ours)
"""


def missing(level: str) -> str | None:
    """The instructions of a level that this processor lacks, or None."""
    info = _processor()
    if not info:
        return "no /proc/cpuinfo to read the processor's instructions from" if FLAGS[level] else None
    found = re.search(r"^flags\s*:(.*)$", info, re.MULTILINE)
    lacking = sorted(FLAGS[level] - set(found[1].split() if found else ()))
    return f"this processor has no {', '.join(lacking)}" if lacking else None


def _processor() -> str:
    """/proc/cpuinfo; empty if it does not exist."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""


def environment(level: str, threads: int) -> dict[str, str]:
    # Inductor's cache does not distinguish instruction sets, so each level has its own.
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(ROOT / "build" / "isa" / level)}
    return os.environ | LEVELS[level] | cache | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}


def probe(level: str) -> dict[str, str]:
    """The instruction set that each library reports at a level."""
    verbose = environment(level, 1) | {"ONEDNN_VERBOSE": "1", "MKL_VERBOSE": "1"}
    told = subprocess.run([sys.executable, "-c", _PROBE], cwd=ROOT, env=verbose, capture_output=True, text=True)
    if told.returncode:
        raise SystemExit(f"test-isa: the probe of level {level} failed:\n{told.stderr}")
    patterns = {
        "torch": r"^probe (\S+)",
        "fastdistill": r"^probe \S+ (\S+)",
        "oneDNN": r"^onednn_verbose,.*cpu,isa:(.*)$",
        "MKL": r"^MKL_VERBOSE .*CNR:(\S+)",
    }
    found = {name: re.search(pattern, told.stdout, re.MULTILINE) for name, pattern in patterns.items()}
    return {name: match[1] if match else "unknown" for name, match in found.items()}


def effective(level: str, used: dict[str, str]) -> list[str]:
    """Libraries whose instruction set is not that of the level; libraries that this torch does not have are left out.
    On processors of other makers than Intel, MKL obeys only the lowest level and else chooses itself (AUTO)."""
    wanted = {
        "torch": LEVELS[level]["ATEN_CPU_CAPABILITY"],
        "fastdistill": level,
        "oneDNN": {"baseline": "SSE4.1", "avx2": "AVX2", "avx512": "AVX-512"}[level],
        "MKL": LEVELS[level]["MKL_CBWR"],
    }
    return [
        f"{name} uses {used[name]}, not {want}"
        for name, want in wanted.items()
        if used[name] not in ("unknown", "not built")
        and want not in used[name]
        and not (name == "MKL" and used[name] == "AUTO" and level != "baseline" and "GenuineIntel" not in _processor())
    ]


def run(level: str, threads: int, tests: list[str], arguments: list[str]) -> tuple[str, int]:
    """The tests at a level: the last line of pytest's output, and its exit status."""
    workers = ["-n", "2", "--dist", "worksteal"] if threads == 1 else ["-n", "0"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    process = subprocess.Popen(
        [*command, *workers, *tests, *arguments],
        cwd=ROOT, env=environment(level, threads), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        if line.startswith(("FAILED", "ERROR", "E  ")):
            print(line, end="", flush=True)
        last = line.strip(" =\n") or last
    return last, process.wait()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.isa", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--short", action="store_true", help="the lowest level, one thread, the most sensitive tests")
    parser.add_argument("--level", nargs="+", choices=list(LEVELS), default=list(LEVELS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    options, rest = parser.parse_known_args(arguments)
    tests = SHORT if options.short else [f"tests/{name}" for name in TESTS]
    rows, failed = [], False
    for level in ["baseline"] if options.short else options.level:
        if reason := missing(level):
            rows.append((level, "-", f"not run: {reason}", ""))
            continue
        if wrong := effective(level, used := probe(level)):
            raise SystemExit(f"test-isa: level {level} is not in effect: {'; '.join(wrong)}")
        print(f"== {level}: " + ", ".join(f"{name} {isa}" for name, isa in used.items()), flush=True)
        for threads in [1] if options.short else options.threads:
            start = time.monotonic()
            outcome, status = run(level, threads, tests, rest)
            failed |= status != 0
            rows.append((level, str(threads), outcome, f"{time.monotonic() - start:.0f} s"))
    print(f"\n{'level':10} {'threads':8} outcome")
    for level, count, outcome, seconds in rows:
        print(f"{level:10} {count:8} {outcome}  {seconds}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
