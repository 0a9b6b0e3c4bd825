# SPDX-License-Identifier: Apache-2.0
"""``make gpu PART=1/3``: build, test and measure on a machine with a GPU, offline, in three parts of at most nine
minutes, the most valuable first.

    1/3  the ops' tests on the GPU, the headline benchmarks
    2/3  compute-sanitizer over the CUDA kernels, the other shapes
    3/3  whole training steps, the headline of them first; the headline kernels under Nsight Compute

Results are appended to benchmarks/results/<device>.csv, where a step's time goes to <device>.steps.jsonl. What a part
leaves lies in $OUT (runs/gpu): a copy of these, JSON, a plot, and a log with the end of every stage's output. What is
not installed is said, not required.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
MINUTES = 9.0
_REPORT = 20.0  # seconds of them that are kept for the report
PARTS = ("1/3", "2/3", "3/3")
TESTS = ("tests/gpu", "tests/ops", "-q", "-p", "no:cacheprovider", "-m", "not slow")


@dataclass
class Stage:
    """A command of a part and how it ended; ``seconds`` is first its limit, then what it took."""

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str]
    ended: str = "not begun: no time left"
    output: str = ""

    def run(self, left: float) -> None:
        limit = min(self.seconds, left)
        start = time.monotonic()
        if limit < 5:
            return
        print(f"== {self.name}: {' '.join(self.command)}", flush=True)
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | self.environment
        process = subprocess.Popen(
            self.command, cwd=ROOT, env=environment, text=True, errors="replace", start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            self.output, _ = process.communicate(timeout=limit)
            self.ended = "well" if process.returncode == 0 else f"with {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # the stage's own session: its children go too
            self.output, _ = process.communicate()
            self.ended = f"stopped after {limit:.0f} s"
        self.seconds = round(time.monotonic() - start, 1)
        print(self.output[-6000:], flush=True)
        print(f"== {self.name}: {self.ended} ({self.seconds:.0f} s)", flush=True)


def stages(part: str, out: Path, capability: str) -> Iterator[Stage]:
    """The stages of a part, in their order."""

    def python(name: str, seconds: float, *arguments: str, prefix: tuple[str, ...] = (), **environment: str) -> Stage:
        return Stage(name, [*prefix, sys.executable, *arguments], seconds, environment)

    def benchmark(name: str, minutes: float, *arguments: str) -> Stage:
        limits = "--minutes", f"{minutes:g}", "--json", str(out / f"{name.replace(' ', '-')}.json")
        return python(name, 60 * minutes + 45, "-m", "benchmarks.run", "--device", "cuda", *limits, *arguments)

    yield python(
        "build", 180, "setup.py", "build_ext", "--inplace", FASTDISTILL_CUDA="1", FASTDISTILL_CUDA_ARCHS=capability
    )
    if part == "1/3":
        yield benchmark("headline", 4, "--headline", "--op", *ops(without="step"))
        many = ("-n", "4") if importlib.util.find_spec("xdist") else ()
        yield python("tests", 150, "-m", "pytest", *TESTS, *many)
    elif part == "2/3":
        watched = "-v", "-p", "no:cacheprovider", "-m", "gpu and slow", "-k", "cuda or planted"
        yield python("compute-sanitizer", 230, "-m", "pytest", "tests/gpu", *watched)
        yield benchmark("other shapes", 3, "--no-headline", "--op", *ops(without="step"))
    else:
        yield benchmark("headline step", 5.5, "--op", "step", "--headline")
        yield benchmark("other steps", 2, "--op", "step", "--no-headline")
        ncu = shutil.which("ncu")
        if ncu is None:
            yield Stage("ncu", [], 0, {}, "left out: ncu is not installed")
        else:
            flags = "--clock-control none --profile-from-start off --set detailed --log-file".split()
            prefix = (ncu, *flags, str(out / "ncu.txt"))
            yield python(
                "ncu", 100, "-m", "benchmarks.run", "--headline", "--once", "--op", *ops(without="step"), prefix=prefix
            )
    yield python("report", 60, "-m", "benchmarks.report", "--results", str(out))


def ops(without: str) -> list[str]:
    """All but one; first what this package alone has."""
    names = {path.stem for path in (ROOT / "benchmarks" / "ops").glob("[a-z]*.py")} - {without}
    first = ("feature_match", "noise_gather", "adamw_ema")
    return [*first, *sorted(names - set(first))]


def no_gpu() -> str | None:
    """Why there is no GPU to measure on, or None."""
    try:
        import torch
    except ImportError:
        return f"torch is not installed in {sys.executable} (make gpu PYTHON=...)"
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return f"torch {torch.__version__} ({built}) finds no CUDA device"
    return None


def main(arguments: list[str]) -> int:
    part = arguments[0] if arguments else PARTS[0]
    if part not in PARTS:
        print(f"make gpu: PART: expected one of {', '.join(PARTS)}, got {part!r}", file=sys.stderr)
        return 2
    if reason := no_gpu():
        print(f"make gpu: {reason}; nothing was run", file=sys.stderr)
        return 2
    import torch

    start = time.monotonic()
    out = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu").resolve()
    out.mkdir(parents=True, exist_ok=True)
    done = []
    for stage in stages(part, out, "".join(map(str, torch.cuda.get_device_capability()))):
        if stage.name == "report":
            _copy_results(out)
        kept = 0 if stage.name == "report" else _REPORT
        stage.run(60 * MINUTES - kept - (time.monotonic() - start))
        done.append(stage)
        log = [asdict(s) | {"output": s.output[-20_000:]} for s in done]
        (out / f"part-{part[0]}.json").write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")
        if stage.name == "build" and stage.ended != "well":
            break
    print(f"\nmake gpu PART={part}, {time.monotonic() - start:.0f} s; results in {out}")
    for stage in done:
        print(f"  {stage.name:14} {stage.ended}")
    return 1 if any(s.ended.startswith(("with", "stopped", "not")) for s in done) else 0


def _copy_results(out: Path) -> None:
    for path in (ROOT / "benchmarks" / "results").glob("gpu-*"):
        shutil.copy2(path, out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
