# SPDX-License-Identifier: Apache-2.0
"""``make soak``: a run of the digits that is killed at random moments ends with the same bits as an undisturbed run.

A sitting is one execution of the command ``fastdistill distill``, on one process or under ``torchrun`` on two. Some
sittings are killed between steps, some while a checkpoint is being written, some while they start. With two processes
one of them is killed, or both and ``torchrun``. The final checkpoint and the metrics (except times) are compared with
those of an undisturbed run of the same command.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch

from fastdistill import runs
from fastdistill.cli import main as fastdistill
from fastdistill.files import atomic_write
from fastdistill.train import checkpoint, distributed
from fastdistill.train.config import to_yaml
from tests import processes
from tests.harness import untimed
from tests.tasks.test_digits_run import run_config

ROOT = Path(__file__).parent.parent
EVIDENCE = ROOT / "docs" / "evidence" / "soak.md"
PATIENCE = 600.0  # maximum seconds until a sitting reaches the next kill, or ends after it
WHOLE = 3600.0  # maximum seconds of an undisturbed sitting
MOMENTS = {"step": 9, "write": 9, "start": 2}  # when a sitting is killed, and how often in 20 kills


PAGE = """\
# Killed at random moments: the digits

Written by `make soak` (`tests/soak.py`). `fastdistill distill` on the digits was killed (SIGKILL) at random moments and
started again with the same command, on one process and under `torchrun` on two. All tensors and values of the last
checkpoint, and the metrics except times, are compared with those of an undisturbed run of the same command.

- date: {date}; commit: {commit}; seed: {seed}
- processor: {processor}
- Python {python}, torch {torch}, eager steps, one thread per process

In the tables, a kill during "write" came while a checkpoint was being written, "start" before the first step, and
"step" at any other time.

| processes | steps | kills | kills that left a half-written checkpoint | kills during the start | minutes | outcome |
|---|---|---|---|---|---|---|
{runs}

| processes | killed | moment | checkpoint at the start | newest checkpoint after the kill | half-written file |
|---|---|---|---|---|---|
{kills}
"""


class Sitting(Protocol):
    """One execution of ``fastdistill distill``."""

    def ranks(self) -> list[int]:
        """The process ids of the ranks, in their order; while it starts there may be fewer."""

    def others(self) -> list[int]:
        """The process ids of its other processes (``torchrun``)."""

    def status(self) -> int | None:
        """The exit status; None while it runs."""


Start = Callable[[Path, int], Sitting]


class Command:
    """A sitting of one process, or of several under ``torchrun``; its output goes to a file next to the run file."""

    def __init__(self, file: Path, ranks: int, command: str = "distill") -> None:
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
        with file.with_suffix(".log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *torchrun, "fastdistill", command, str(file)], cwd=ROOT, stdout=log, stderr=log
            )
        self._single, self._started = ranks == 1, list[int]()  # children of torchrun; they may outlive it

    def ranks(self) -> list[int]:
        pid = self._process.pid
        if self._single:
            return [pid]
        with contextlib.suppress(OSError):
            self._started = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return self._started

    def others(self) -> list[int]:
        return [] if self._single else [self._process.pid]

    def status(self) -> int | None:
        return None if any(map(running, self._started)) else self._process.poll()


def _forked(rank: int, ranks: int, port: int, command: str, file: Path) -> None:
    """What a rank under ``torchrun``, or a single process, executes."""
    torch.set_num_threads(1)
    distributed.ANSWER = 1.0
    if ranks > 1:
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "soak"} | {k: str(v) for k, v in own.items()}
    sys.exit(fastdistill([command, str(file)]))


class Forked:
    """A sitting without torchrun, with processes that are forked after all imports. If one dies, the others are ended
    like torchrun does: with SIGTERM, and later with SIGKILL."""

    def __init__(self, file: Path, ranks: int, command: str = "distill") -> None:
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        self._processes = [processes.begin(_forked, rank, ranks, port, command, file) for rank in range(ranks)]
        self._told: float | None = None

    def ranks(self) -> list[int]:
        return [process.pid or 0 for process in self._processes]

    def others(self) -> list[int]:
        return []

    def status(self) -> int | None:
        codes = [process.exitcode for process in self._processes]
        if None not in codes:
            return max(map(abs, codes))
        if any(codes) and self._told is None:
            self._told = time.monotonic()
            for process in self._processes:
                process.terminate()
        elif self._told is not None and time.monotonic() - self._told > 3.0:
            for process in self._processes:
                process.kill()
        return None


@dataclass(frozen=True)
class Kill:
    """``moment``: a key of MOMENTS. ``victim``: "rank N" or "all". ``begun``, ``reached``: step of the newest
    checkpoint before and after the sitting. ``half``: whether it left a half-written checkpoint."""

    moment: str
    victim: str
    begun: int
    reached: int
    half: bool


@dataclass
class Outcome:
    ranks: int
    kills: list[Kill] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)  # differences from the undisturbed run
    seconds: float = 0.0


def running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def newest(directory: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    return max(checkpoint.steps(directory), default=0)


def half_written(directory: Path) -> set[Path]:
    return set(directory.glob(".step-*.tmp"))


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def give_up(sitting: Sitting, why: str) -> NoReturn:
    if sitting.status() is None:
        kill([*sitting.others(), *sitting.ranks()])
    raise SystemExit(f"soak: {why}")


def until(condition: Callable[[], object], sitting: Sitting) -> None:
    """Wait for the condition; an error if the sitting ends before, or after ``PATIENCE`` seconds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if sitting.status() is not None:
            give_up(sitting, f"a sitting ended by itself (status {sitting.status()})")
        if time.monotonic() > end:
            give_up(sitting, f"a sitting did not reach the next kill in {PATIENCE:.0f} seconds")
        time.sleep(0.0005)


def ended(sitting: Sitting, seconds: float) -> int:
    """Wait for its exit status; an error after ``seconds`` seconds."""
    end = time.monotonic() + seconds
    while (status := sitting.status()) is None:
        if time.monotonic() > end:
            give_up(sitting, f"a sitting did not end in {seconds:.0f} seconds")
        time.sleep(0.01)
    return status


def strike(
    sitting: Sitting, directory: Path, moment: str, target: int, ranks: int, early: float, draw: random.Random
) -> Kill:
    """Kill a sitting after it has a new checkpoint and has reached the target step; or (``start``) while it starts."""
    begun, before = newest(directory), half_written(directory)
    if moment == "start":
        until(lambda: len(sitting.ranks()) == ranks, sitting)
        time.sleep(draw.uniform(0.0, early))
    else:
        until(lambda: newest(directory) >= max(target, begun + 1), sitting)
        time.sleep(draw.uniform(0.0, 0.04 * early))
    if moment == "write":
        until(lambda: half_written(directory) - before, sitting)
    victims = sitting.ranks()
    victim = draw.choice(["all", *range(ranks)]) if ranks > 1 else "all"
    kill([*sitting.others(), *victims] if victim == "all" else [victims[int(victim)]])
    if ended(sitting, PATIENCE) == 0:
        give_up(sitting, "a sitting ended before it was killed")
    half = bool(half_written(directory) - before)
    return Kill(moment, "all" if victim == "all" else f"rank {victim}", begun, newest(directory), half)


def soak(
    place: Path, ranks: int, steps: int, kills: int, seed: int, start: Start, early: float = 8.0, **train: Any
) -> Outcome:
    """One run that is killed ``kills`` times and one undisturbed run, in folders of ``place``. ``early``: seconds until
    the first step of a sitting."""
    began, draw, outcome = time.monotonic(), random.Random(seed), Outcome(ranks)
    settings = {"steps": steps, "execution": "eager", **train}
    files = {}
    for name in ("alone", "killed"):
        config = run_config(place, directory=str(place / name), train=settings, log=["jsonl"])
        files[name] = place / f"{name}.yaml"
        atomic_write(files[name], to_yaml(config).encode())
    runs.cache(config)
    if ended(start(files["alone"], ranks), WHOLE) != 0:
        raise SystemExit(f"soak: the undisturbed run failed; see {place}")
    killed = place / "killed"
    moments = draw.sample(list(MOMENTS), kills, counts=[-(-count * kills // 20) for count in MOMENTS.values()])
    targets = sorted(draw.sample(range(1, steps - max(20, steps // 10)), kills))
    for moment, target in zip(moments, targets, strict=True):
        sitting = start(files["killed"], ranks)
        outcome.kills.append(strike(sitting, killed, moment, target, ranks, early, draw))
        print(f"soak: {ranks} rank(s), {outcome.kills[-1]}", flush=True)
    if ended(start(files["killed"], ranks), WHOLE) != 0:
        raise SystemExit(f"soak: the last sitting failed; see {place}")
    outcome.unlike = unlike(place / "alone", killed, steps)
    outcome.seconds = time.monotonic() - began
    return outcome


def unlike(alone: Path, killed: Path, steps: int) -> list[str]:
    """The differences of two runs: tensors and values of the last checkpoint that are not equal to the bit, the
    metrics, and files that only one of them has."""
    one, two = (checkpoint.read(place / f"step-{steps:08d}.safetensors")[0].state for place in (alone, killed))
    found = sorted(one.keys() ^ two.keys())
    found += [name for name in one.keys() & two.keys() if content(one[name]) != content(two[name])]
    lines = [untimed(json.loads(line) for line in (place / "metrics.jsonl").open()) for place in (alone, killed)]
    if lines[0] != lines[1] or not lines[0]:
        found.append("metrics.jsonl")
    names = [{path.name for path in place.iterdir()} for place in (alone, killed)]
    return found + sorted(names[0] ^ names[1])


def content(value: Any) -> Any:
    return (value.dtype, value.shape, value.reshape(-1).view(torch.uint8).tolist()) if torch.is_tensor(value) else value


def described(outcomes: list[Outcome], steps: int, seed: int) -> str:
    """The text of the page: what ran where, and the results."""
    told = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    models = [line.partition(": ")[2] for line in info.splitlines() if line.startswith("model name")]
    runs_, kills = [], []
    for outcome in outcomes:
        half, early = sum(k.half for k in outcome.kills), sum(k.moment == "start" for k in outcome.kills)
        result = f"differs: {', '.join(outcome.unlike)}" if outcome.unlike else "equal to the bit"
        counts = f"{steps:,} | {len(outcome.kills)} | {half} | {early} | {outcome.seconds / 60:.0f}"
        runs_.append(f"| {outcome.ranks} | {counts} | {result} |")
        for k in outcome.kills:
            half_written = "yes" if k.half else "no"
            kills.append(f"| {outcome.ranks} | {k.victim} | {k.moment} | {k.begun} | {k.reached} | {half_written} |")
    return PAGE.format(
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        commit=told.stdout.strip() or "unknown",
        seed=seed,
        processor=f"{models[0] if models else 'unknown'}, {os.cpu_count()} cores, {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        runs="\n".join(runs_),
        kills="\n".join(kills),
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.soak", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=None, help="seed of the moments; by default a random one")
    parser.add_argument("--place", type=Path, default=ROOT / "build" / "soak")
    parser.add_argument("--to", type=Path, default=EVIDENCE, help="page to write")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    os.environ["OMP_NUM_THREADS"] = "1"
    outcomes = []
    for ranks in options.ranks:
        place = options.place / f"{seed}-{ranks}"
        place.mkdir(parents=True)
        outcomes.append(
            soak(place, ranks, options.steps, options.kills, seed, Command, log_every=5, checkpoint_every=10)
        )
    options.to.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(options.to, described(outcomes, options.steps, seed).encode())
    print(options.to.read_text(encoding="utf-8"))
    return int(any(outcome.unlike for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
