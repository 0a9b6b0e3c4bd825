# SPDX-License-Identifier: Apache-2.0
"""``make gpu`` or ``python -m benchmarks.gpu``: build, test and measure on a machine with a GPU, offline; the most
valuable and cheapest parts come first.

    1/3  tests on the GPU, including compute-sanitizer, and the headline benchmarks of the ops
    2/3  headline benchmark of whole training steps
    3/3  the headline kernels under Nsight Compute, the other shapes and steps

It needs torch, Triton, NumPy and pytest. Other missing packages are installed into build/gpu-packages, from the wheels
that ``make gpu-wheels`` has put into build/gpu-wheels. Anything still missing is reported but not required. A crash
costs only one op: another process measures the ops after it.

All results are written to a folder at once: the output of all stages to stages.log, how each stage ended to
stages.jsonl, rows to <device>.csv and .steps.jsonl (as always also to benchmarks/results), at the end a plot. A stage
that takes too long is interrupted, and killed ten seconds later. Compilation caches stay in build/ for the next part.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).parent.parent
WHEELS, PACKAGES, CACHES = (ROOT / "build" / name for name in ("gpu-wheels", "gpu-packages", "gpu-caches"))
PARTS = ("1/3", "2/3", "3/3")
MINUTES = 4.0  # of a part; the limits of its stages are written for this and scale with --minutes
REPORT = "report"
_KEPT = 20.0  # seconds reserved for the plot
_LEAST = 5.0  # a stage is not started with fewer seconds left
_GRACE = 10.0  # seconds that a stage has to end after the interrupt
TESTS = "-m pytest -v --tell --tb=short -rfE --maxfail=20 --continue-on-collection-errors -p no:cacheprovider".split()
TESTS += ["-o", "faulthandler_timeout=60"]  # prints where a test hangs
PLACES = "tests/gpu tests/ops tests/train/test_step.py tests/train/test_graph.py tests/data/test_staged.py".split()
_CASE = re.compile(r"\[\d+/\d+\] (\w+), ")  # the line with which benchmarks.run begins a case: its op


@dataclass
class Purse:
    """Seconds that several stages share. Each gets at least half of an equal share; unused seconds go to later
    stages."""

    seconds: float
    stages: int

    def __post_init__(self) -> None:
        self._least = self.seconds / self.stages / 2

    def limit(self) -> float:
        return max(self._least, self.seconds - self._least * (self.stages - 1))

    def pay(self, seconds: float) -> None:
        self.seconds, self.stages = self.seconds - seconds, self.stages - 1


@dataclass
class Stage:
    """A command and how it ended. ``seconds``: its limit, later the time it took; ``begun``: the last op that began."""

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    purse: Purse | None = None
    begun: str = ""
    ended: str = "not begun: no time left"

    def run(self, left: float, log: TextIO | None = None) -> None:
        """Run it for at most ``left`` seconds; the output is printed and written to ``log`` at once."""
        limit = min(self.seconds, left, self.purse.limit() if self.purse else left)
        start = time.monotonic()
        if limit < _LEAST:
            self.seconds = 0.0
            if self.purse:
                self.purse.pay(0.0)
            return
        tell(f"== {self.name}, at most {limit:.0f} s: {' '.join(self.command)}\n", log)
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | self.environment
        process = subprocess.Popen(  # a process group of this session: both end with its children
            self.command, cwd=ROOT, env=environment, text=True, errors="replace", process_group=0,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        reader = threading.Thread(target=self._pass_on, args=(process.stdout, log), daemon=True)
        reader.start()
        self.ended = "interrupted"
        try:
            process.wait(timeout=limit)
            self.ended = "well" if process.returncode == 0 else f"with {process.returncode}"
        except subprocess.TimeoutExpired:
            self.ended = f"stopped after {limit:.0f} s"
        finally:
            for number, wait in ((signal.SIGINT, _GRACE), (signal.SIGKILL, 5.0)):
                if process.poll() is None:
                    os.killpg(process.pid, number)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=wait)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        reader.join(timeout=5)
        self.seconds = round(time.monotonic() - start, 1)
        if self.purse:
            self.purse.pay(self.seconds)
        tell(f"== {self.name}: {self.ended} ({self.seconds:.0f} s)\n", log)

    def _pass_on(self, lines: Iterable[str], log: TextIO | None) -> None:
        for line in lines:
            if found := _CASE.match(line):
                self.begun = found[1]
            tell(line, log)


def tell(line: str, log: TextIO | None) -> None:
    """Write a line to the log, and print it if stdout is still open."""
    if log:
        log.write(line)
        log.flush()
    with contextlib.suppress(BrokenPipeError):
        print(line, end="", flush=True)


def stages(part: str, out: Path, device: str = "cuda", scale: float = 1.0) -> Iterator[Stage]:
    """The stages of a part, in order; ``device`` is "cuda", or "cpu" for a rehearsal."""

    def python(name: str, seconds: float, *arguments: str, prefix: tuple[str, ...] = (), **environment: str) -> Stage:
        return Stage(name, [*prefix, sys.executable, *arguments], scale * seconds, environment)

    def benchmark(name: str, seconds: float, *arguments: str) -> Stage:
        its = "-m", "benchmarks.run", "--device", device, "--out", str(out)
        if device == "cpu":  # a CPU has no headline cases, and the rows of a rehearsal are no results
            return python(name, seconds, *its, "--csv", "none", *(a for a in arguments if "headline" not in a))
        return python(name, seconds, *its, *arguments)

    def each_op(name: str, seconds: float, *arguments: str) -> Iterator[Stage]:
        """Run all ops in one process, because imports take seconds. If an op ends it, a new process runs the ops after
        it."""
        names = ops(without="step")
        while names:
            stage = benchmark(
                f"{name} {names[0]} to {names[-1]}", seconds, "--op", *names, "--seconds", "0.7", *arguments
            )
            yield stage
            names = names[names.index(stage.begun) + 1 :] if stage.begun and stage.ended.startswith("with") else []
            seconds -= stage.seconds / scale

    if part == "1/3":
        many = ("-n", str(min(12, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
        yield python("tests", 150, *TESTS, "-m", "gpu or not slow", "-k", "cuda or gpu", *PLACES, *many)
        yield from each_op("headline", 180, "--headline")
        yield python("machine", 30, "-m", "torch.utils.collect_env")
    elif part == "2/3":
        yield benchmark("headline step", 240, "--op", "step", "--headline")
    else:
        if ncu := shutil.which("ncu"):
            flags = "--clock-control none --profile-from-start off --set detailed".split()
            heavy_last = sorted(ops(without="step"), key="adamw_ema".__eq__)  # run for each set of counters
            purse = Purse(scale * 100, len(heavy_last))
            for op in heavy_last:
                once = "-m", "benchmarks.run", "--headline", "--once", "--op", op
                stage = python(f"ncu {op}", 60, *once, prefix=(ncu, *flags))
                stage.purse = purse
                yield stage
        else:
            yield Stage("ncu", [], 0, ended="left out: ncu is not installed")
        yield from each_op("other shapes", 120, "--no-headline")
        yield benchmark("other steps", 120, "--op", "step", "--no-headline")


def first(archs: str, scale: float = 1.0) -> Iterator[Stage]:
    """The stages before any part: install missing packages, compile the kernels."""
    wheels, done = sorted(map(str, WHEELS.glob("*.whl"))), PACKAGES / "installed"
    if wheels and not done.exists():
        pip = "-m pip install --quiet --no-index --no-deps --no-compile --upgrade --target".split()
        packages = Stage("packages", [sys.executable, *pip, str(PACKAGES), *wheels], 60 * scale)
        yield packages
        if packages.ended == "well":
            done.touch()
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {"FASTDISTILL_CUDA": "1", "FASTDISTILL_CUDA_ARCHS": archs} if archs else {"FASTDISTILL_CUDA": "0"}
    yield Stage("build", build, 120 * scale, environment)


def ops(without: str) -> list[str]:
    """All ops but one; first those that exist only in this package."""
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


def parser() -> argparse.ArgumentParser:
    description = (__doc__ or "").partition("\n\nIt needs")[0]
    p = argparse.ArgumentParser(
        "make gpu", description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("part", nargs="*", metavar="PART", help="1/3, 2/3, 3/3: these alone")
    p.add_argument("--minutes", type=float, help=f"for all of it, {MINUTES:g} a part; the limits of stages follow")
    out = os.environ.get("OUT") or ROOT / "runs" / "gpu"
    p.add_argument("--out", type=Path, default=out, help="folder for what is known, $OUT or %(default)s")
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal")
    return p


def main(arguments: list[str]) -> int:
    p = parser()
    options = p.parse_args(arguments)
    parts = options.part or PARTS
    for unknown in set(parts) - set(PARTS):
        p.error(f"PART: expected some of {', '.join(PARTS)}, got {unknown!r}")
    minutes = MINUTES * len(parts) if options.minutes is None else options.minutes
    if not 1 <= minutes <= 1440:
        p.error(f"--minutes: expected 1 to 1440, got {minutes:g}")
    archs = ""
    if options.device == "cuda":
        if reason := no_gpu():
            print(f"make gpu: {reason}; nothing was run", file=sys.stderr)
            return 2
        import torch

        archs = "".join(map(str, torch.cuda.get_device_capability()))
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # in background jobs of a shell, SIGINT is ignored, also by their children
        signal.signal(number, signal.default_int_handler)
    _keep_what_compilers_make()
    return run(plan(parts, options.out.resolve(), options.device, archs, minutes), options.out.resolve(), minutes)


def plan(parts: Iterable[str], out: Path, device: str, archs: str, minutes: float) -> Iterator[Stage]:
    """All stages of these parts, with limits that fit the given minutes."""
    parts = tuple(parts)
    scale = minutes / MINUTES / len(parts)
    yield from first(archs, scale)
    for part in parts:
        yield from stages(part, out, device, scale)
    yield Stage(REPORT, [sys.executable, "-m", "benchmarks.report", "--results", str(out)], 60)


def run(planned: Iterable[Stage], out: Path, minutes: float) -> int:
    """Run the stages one after another and copy their results to ``out`` at once; returns 1 if one failed."""
    start, done = time.monotonic(), list[Stage]()
    out.mkdir(parents=True, exist_ok=True)
    with (out / "stages.log").open("a", encoding="utf-8") as log:
        try:
            for stage in planned:
                done.append(stage)
                kept = 0 if stage.name == REPORT else _KEPT
                try:
                    stage.run(60 * minutes - kept - (time.monotonic() - start), log)
                finally:
                    _record(out / "stages.jsonl", stage)
        finally:  # also if it is stopped
            tell(f"\nmake gpu: {time.monotonic() - start:.0f} s; results in {out}\n", log)
            for stage in done:
                tell(f"  {stage.name:30} {stage.ended}\n", log)
    return 1 if any(s.ended.startswith(("with", "stopped", "not")) for s in done) else 0


def _keep_what_compilers_make() -> None:
    """Put the caches of Inductor and Triton into the tree, and installed wheels on Python's path."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHES / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHES / "triton"))
    places = [os.environ.get("PYTHONPATH", ""), str(PACKAGES)]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, places))


def _record(path: Path, stage: Stage) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    its = {"at": now, "stage": stage.name, "ended": stage.ended, "seconds": stage.seconds, "command": stage.command}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(its) + "\n")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("stopped; what was measured is kept")
