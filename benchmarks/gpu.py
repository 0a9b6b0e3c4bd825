# SPDX-License-Identifier: Apache-2.0
"""``make gpu PART=1/3`` or ``python -m benchmarks.gpu 1/3``: build, test and measure on a machine with a GPU, offline,
in three parts of at most nine minutes, the most valuable first.

    1/3  the headline benchmarks, the ops' tests on the GPU
    2/3  compute-sanitizer over the CUDA kernels, the other shapes
    3/3  whole training steps, the headline of them first; the headline kernels under Nsight Compute

It needs torch, Triton, NumPy and pytest; from the wheels that ``make gpu-wheels`` has put into build/gpu-wheels it
installs what else is missing, into build/gpu-packages. What is not there is said, not required. Each op has a process
of its own, so that a crash costs one op.

Results are appended to benchmarks/results/<device>.csv, where a step's time goes to <device>.steps.jsonl. What a part
leaves lies in $OUT (runs/gpu): a copy of these, JSON, a plot, and <stage>.log, written line by line. A stage that takes
too long is interrupted, and ten seconds later killed. What the compilers made is kept in build/, for the next part.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
WHEELS, PACKAGES, CACHES = (ROOT / "build" / name for name in ("gpu-wheels", "gpu-packages", "gpu-caches"))
MINUTES = 9.0
_REPORT = 20.0  # seconds of them that are kept for the report
_GRACE = 10.0  # seconds from the interrupt to the end of a stage
PARTS = ("1/3", "2/3", "3/3")
TESTS = "-m pytest -q --tell --tb=short -rfE --maxfail=20 --continue-on-collection-errors -p no:cacheprovider".split()


@dataclass
class Stage:
    """A command of a part and how it ended; ``seconds`` is first its limit, then what it took. Stages of one ``purse``
    share the seconds that are in it."""

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    purse: list[float] = field(default_factory=list)
    ended: str = "not begun: no time left"
    output: str = ""

    def run(self, left: float, log: Path | None = None) -> None:
        """For at most ``left`` seconds; the output is printed, and written to ``log``, as it comes."""
        limit = min(self.seconds, left, *self.purse)
        start = time.monotonic()
        if limit < 5:
            return
        print(f"== {self.name}: {' '.join(self.command)}", flush=True)
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | self.environment
        process = subprocess.Popen(
            self.command, cwd=ROOT, env=environment, text=True, errors="replace", start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        reader = threading.Thread(target=self._read, args=(process.stdout, log), daemon=True)
        reader.start()
        self.ended = "interrupted"
        try:
            process.wait(timeout=limit)
            self.ended = "well" if process.returncode == 0 else f"with {process.returncode}"
        except subprocess.TimeoutExpired:
            self.ended = f"stopped after {limit:.0f} s"
        finally:  # the stage's own session: its children go too
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
            self.purse[0] -= self.seconds
        print(f"== {self.name}: {self.ended} ({self.seconds:.0f} s)", flush=True)

    def _read(self, lines: Iterable[str], log: Path | None) -> None:
        with log.open("w", encoding="utf-8") if log else contextlib.nullcontext() as file:
            for line in lines:
                print(line, end="", flush=True)
                self.output += line
                if file:
                    file.write(line)
                    file.flush()


def stages(part: str, out: Path, capability: str) -> Iterator[Stage]:
    """The stages of a part, in their order."""

    def python(name: str, seconds: float, *arguments: str, prefix: tuple[str, ...] = (), **environment: str) -> Stage:
        return Stage(name, [*prefix, sys.executable, *arguments], seconds, environment)

    def benchmark(name: str, seconds: float, *arguments: str) -> Stage:
        json_file = str(out / f"{name.replace(' ', '-')}.json")
        minutes = f"{max(seconds - 30, 1) / 60:g}"  # after these no case is begun
        limits = "--device", "cuda", "--minutes", minutes, "--json", json_file
        return python(name, seconds, "-m", "benchmarks.run", *limits, *arguments)

    def each_op(name: str, seconds: float, *arguments: str) -> Iterator[Stage]:
        purse = [seconds]
        for op in ops(without="step"):
            stage = benchmark(f"{name} {op}", min(120.0, seconds), "--op", op, *arguments)
            stage.purse = purse
            yield stage

    wheels = sorted(map(str, WHEELS.glob("*.whl")))
    if wheels and not PACKAGES.is_dir():
        install = "-m pip install --quiet --no-index --no-deps --upgrade --target".split()
        yield python("packages", 60, *install, str(PACKAGES), *wheels)
    yield python(
        "build", 180, "setup.py", "build_ext", "--inplace", FASTDISTILL_CUDA="1", FASTDISTILL_CUDA_ARCHS=capability
    )
    if part == "1/3":
        yield from each_op("headline", 270, "--headline")
        many = ("-n", str(min(12, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
        yield python("tests", 150, *TESTS, "-m", "not slow", "tests/gpu", "tests/ops", *many)
    elif part == "2/3":
        for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
            chosen = f"cuda and {tool} or planted" if tool == "memcheck" else f"cuda and {tool}"
            watched = *TESTS, "-v", "-m", "gpu and slow", "-k", chosen, "tests/gpu/test_sanitizers.py"
            yield python(f"compute-sanitizer {tool}", 90, *watched)
        yield from each_op("other shapes", 220, "--no-headline")
    else:
        yield benchmark("headline step", 375, "--op", "step", "--headline")
        yield benchmark("other steps", 165, "--op", "step", "--no-headline")
        ncu = shutil.which("ncu")
        if ncu is None:
            yield Stage("ncu", [], 0, ended="left out: ncu is not installed")
        else:
            flags = "--clock-control none --profile-from-start off --set detailed --log-file".split()
            heavy_last = sorted(ops(without="step"), key="adamw_ema".__eq__)  # it is run again for each set of counters
            for op in heavy_last:
                prefix = (ncu, *flags, str(out / f"ncu-{op}.txt"))
                yield python(f"ncu {op}", 60, "-m", "benchmarks.run", "--headline", "--once", "--op", op, prefix=prefix)
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
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _keep_what_compilers_make()
    done: list[Stage] = []
    try:
        for stage in stages(part, out, "".join(map(str, torch.cuda.get_device_capability()))):
            done.append(stage)
            if stage.name == "report":
                _copy_results(out)
            kept = 0 if stage.name == "report" else _REPORT
            stage.run(60 * MINUTES - kept - (time.monotonic() - start), out / f"{stage.name.replace(' ', '-')}.log")
            _copy_results(out)
            _write(out / f"part-{part[0]}.json", done)
    finally:  # of a part that is stopped, too
        _copy_results(out)
        _write(out / f"part-{part[0]}.json", done)
        print(f"\nmake gpu PART={part}, {time.monotonic() - start:.0f} s; results in {out}")
        for stage in done:
            print(f"  {stage.name:30} {stage.ended}", flush=True)
    return 1 if any(s.ended.startswith(("with", "stopped", "not")) for s in done) else 0


def _keep_what_compilers_make() -> None:
    """Inductor's and Triton's caches in the tree, and the packages of the wheels where Python looks for them."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHES / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHES / "triton"))
    places = [os.environ.get("PYTHONPATH", ""), str(PACKAGES)]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, places))


def _write(path: Path, done: list[Stage]) -> None:
    log = [asdict(s) | {"output": s.output[-20_000:]} for s in done]
    path.write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")


def _copy_results(out: Path) -> None:
    for path in (ROOT / "benchmarks" / "results").glob("gpu-*"):
        shutil.copy2(path, out)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("stopped; what was measured is kept")
