# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.fuzz``: runs rounds of all targets in child processes until the wanted counts are reached.

``--replay TARGET ROUND`` repeats one round in this process; ``--report`` writes docs/evidence/fuzz.md and .json.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from fastdistill.files import locked
from tests.fuzz.targets import TARGETS, Target, calls_of, named

ROOT = Path(__file__).parents[2]
STATE = ROOT / "build" / "fuzz" / "state.json"
PATIENCE = 300.0  # a child hangs if it finishes no round in so many seconds (including its imports)
SLICE = 60.0  # seconds that a child runs


class State:
    """The record in a JSON file: for each target the next round, outcomes and seconds; faults; and the child runs."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.value: dict[str, Any] = {"seed": seed, "targets": {}, "faults": [], "sittings": []}
        if path.exists():
            self.value = json.loads(path.read_text(encoding="utf-8"))
            if self.value["seed"] != seed:
                raise SystemExit(f"{path}: of seed {self.value['seed']}, not {seed}; --state names another file")

    def of(self, target: Target) -> dict[str, Any]:
        new = {"next": 0, "calls": 0, "seconds": 0.0, "counts": {}}
        found: dict[str, Any] = self.value["targets"].setdefault(target.name, new)
        return found

    def add(self, target: Target, line: dict[str, Any]) -> None:
        """Record a round that has ended in any way."""
        mine, counts = self.of(target), Counter(line["counts"])
        mine["next"] = line["round"] + 1
        mine["calls"] += calls_of(counts, target)
        mine["seconds"] = round(mine["seconds"] + line["seconds"], 3)
        mine["counts"] = dict(sorted((Counter(mine["counts"]) + counts).items()))
        sitting = self.value["sittings"][-1]
        sitting["rounds"].setdefault(target.name, [line["round"], None])[1] = line["round"]
        if line["fault"]:
            where = {"target": target.name, "round": line["round"], "commit": sitting["commit"]}
            self.value["faults"].append(where | {"fault": line["fault"]})
            print(f"\n== {target.name}, round {line['round']}: {line['fault']}\n   again: {again(where)}", flush=True)

    def begin(self) -> None:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
        self.value["sittings"].append({"commit": commit, "at": time.strftime("%Y-%m-%d %H:%M"), "rounds": {}})

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.value, indent=1) + "\n", encoding="utf-8")
        os.replace(new, self.path)


def again(fault: dict[str, Any]) -> str:
    """The command that repeats a fault."""
    return f"python -m tests.fuzz --replay '{fault['target']}' {fault['round']}"


def sit(state: State, target: Target, seconds: float, patience: float = PATIENCE) -> None:
    """Run a child with rounds of a target for some seconds."""
    first = state.of(target)["next"]
    command = [sys.executable, "-m", "tests.fuzz.rounds", target.name, str(state.value["seed"]), str(first)]
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "FASTDISTILL_ATTENTION": "default"}
    errors = state.path.with_suffix(".stderr")
    state.path.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(errors, "w+", encoding="utf-8") as told,
        subprocess.Popen(
            [*command, str(seconds)], cwd=ROOT, env=os.environ | settings, stdout=subprocess.PIPE, stderr=told
        ) as child,
    ):
        assert child.stdout is not None
        at, waiting, hangs = first, b"", False
        try:
            while True:
                if not select.select([child.stdout], [], [], patience)[0]:
                    hangs = True
                    child.kill()
                data = os.read(child.stdout.fileno(), 2**20)
                if not data:
                    break
                *lines, waiting = (waiting + data).split(b"\n")
                for line in lines:
                    state.add(target, json.loads(line))
                    at += 1
        except BaseException:
            child.kill()
            raise
        status = child.wait()
        told.seek(0)
        words = told.read()[:2000]
    if status:
        reason = f"a hang: no round in {patience:.0f} s" if hangs else f"a crash: status {status}"
        state.add(target, {"round": at, "seconds": 0.0, "counts": {}, "fault": f"{reason}\n{words}"})
    state.save()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--state", type=Path, default=STATE, help="what was done, to go on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets whose names begin so")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end after so many")
    parser.add_argument("--slice", type=float, default=SLICE, help="seconds of a child")
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "ROUND"), help="run one round again, in this process")
    parser.add_argument("--report", action="store_true", help="write docs/evidence/fuzz.md and .json, run nothing")
    options = parser.parse_args(arguments)
    if options.replay:
        return _replay(named(options.replay[0]), options.seed, int(options.replay[1]))
    if options.report:
        from tests.fuzz.evidence import write

        return write(State(options.state, options.seed).value)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options.state.parent.mkdir(parents=True, exist_ok=True)
    with locked(options.state.parent):  # two processes would overwrite each other's counts
        return _go_on(State(options.state, options.seed), options)


def _go_on(state: State, options: argparse.Namespace) -> int:
    """Run rounds until the wanted counts are reached or the time is over; returns 1 if there are faults."""
    state.begin()
    end = time.monotonic() + 60 * options.minutes
    chosen = [target for target in TARGETS if target.name.startswith(options.only)]
    try:
        while time.monotonic() < end:
            left = [target for target in chosen if state.of(target)["calls"] < target.wanted]
            if not left:
                break
            target = min(left, key=lambda one: state.of(one)["calls"] / one.wanted)
            sit(state, target, min(options.slice, end - time.monotonic()))
            mine = state.of(target)
            print(f"{target.name}: {mine['calls']:,} of {target.wanted:,} calls, {mine['seconds']:.0f} s", flush=True)
    finally:
        state.save()
    faults = len(state.value["faults"])
    print(f"{sum(state.of(target)['calls'] for target in chosen):,} calls, {faults} faults; {state.path}")
    return int(faults > 0)


def _replay(target: Target, seed: int, number: int) -> int:
    from tests.fuzz.rounds import run

    target.prepare()
    counts, fault = run(target, seed, number)
    print(fault or f"no fault: {dict(counts)}")
    return int(fault is not None)


if __name__ == "__main__":
    sys.exit(main())
