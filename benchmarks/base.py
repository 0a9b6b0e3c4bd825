# SPDX-License-Identifier: Apache-2.0
"""Compares this tree with another commit: two processes, one with the kernels of each, take turns.

The commit is checked out and built in a temporary worktree with the benchmarks of this tree, so that both run the same
benchmarks. ``python -m benchmarks.base`` is such a process: it reads cases and numbers of rounds and returns times.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.measure import Row, Settings, line, row
from benchmarks.registry import Case, Workload, cases
from benchmarks.timing import copies, graphed, stopwatch, summary

_TURN = 5  # number of rounds in a turn


class Base:
    """Compares cases of this tree with a commit; when its context ends, the worktree is removed."""

    def __init__(self, commit: str, settings: Settings) -> None:
        self._commit, self._settings = commit, settings
        self._stack = contextlib.ExitStack()
        try:
            tree = self._stack.enter_context(_worktree(commit, settings.device))
            self._workers = {
                "ours": self._stack.enter_context(_Worker(machine.ROOT, settings)),
                "base": self._stack.enter_context(_Worker(tree, settings)),
            }
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Base:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def measure(self, case: Case) -> list[Row]:
        """One row per mode: how many times as fast this tree is as the commit."""
        rival = f"base {self._commit}"
        rows = []
        for mode in ("eager", "graph") if self._settings.device.type == "cuda" else ("eager",):
            request = {"op": case.op, "case": str(case), "mode": mode}
            failed = {n: e for n, w in self._workers.items() if (e := w.ask({**request, "rounds": _TURN}).get("error"))}
            if failed:
                note = "; ".join(f"{name}: {error}" for name, error in failed.items())
                rows.append(row(case, self._settings, mode=mode, rival=rival, note=note))
                continue
            times: dict[str, list[float]] = {name: [] for name in self._workers}
            turns = list(self._workers.items())
            while len(times["base"]) < self._settings.rounds:
                for name, worker in turns:
                    times[name] += worker.ask({**request, "rounds": _TURN})["times"]
                turns.reverse()  # the first one alternates, so that a drift of the machine affects both equally
            timings, ratios = summary(times)
            ours, theirs = timings["ours"], timings["base"]
            rows.append(
                row(
                    case, self._settings, mode=mode, rival=rival, ratio=round(ratios["base"], 3),
                    rival_ms=round(theirs.median, 4), rival_iqr_ms=round(theirs.spread, 4),
                    ours_ms=round(ours.median, 4), ours_iqr_ms=round(ours.spread, 4),
                )
            )  # fmt: skip
        return rows


@contextlib.contextmanager
def _worktree(commit: str, device: torch.device) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fastdistill-base-") as folder:
        tree = Path(folder, "tree")
        git = ["git", "-C", str(machine.ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", str(tree), commit], check=True)
        try:
            shutil.rmtree(tree / "benchmarks", ignore_errors=True)
            shutil.copytree(machine.ROOT / "benchmarks", tree / "benchmarks")
            wanted = {"FASTDISTILL_CUDA": "0"} if device.type == "cpu" else {}
            print(f"building {commit}", file=sys.stderr, flush=True)
            build = [sys.executable, "setup.py", "build_ext", "--inplace"]
            subprocess.run(build, cwd=tree, check=True, stdout=subprocess.DEVNULL, env=wanted | os.environ)
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


class _Worker:
    """A process in a tree, with its kernels."""

    def __init__(self, tree: Path, settings: Settings) -> None:
        command = [sys.executable, "-m", "benchmarks.base", settings.device.type, str(settings.threads)]
        environment = os.environ | {"PYTHONPATH": str(tree)}
        self._process = subprocess.Popen(
            command, cwd=tree, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            return {"error": f"the process ended with {self._process.wait()}"}
        return answer


def _answer(request: dict[str, Any], device: torch.device, made: dict[str, Any]) -> list[float]:
    """Times of one case; its tensors are kept until another case is requested."""
    key = f"{request['case']} {request['mode']}"
    if key not in made:
        made.clear()
        case = next(c for c in cases(device.type, [request["op"]]) if str(c) == request["case"])
        workloads: list[Workload] = [case.build(device)]
        workloads[0].check()
        workloads += [case.build(device) for _ in range(copies(workloads[0].bytes, device) - 1)]
        make = graphed if request["mode"] == "graph" else stopwatch
        made[key] = make([w.ours for w in workloads], device)
    return [made[key]() for _ in range(request["rounds"])]


def main() -> int:
    device = torch.device(sys.argv[1])
    torch.set_num_threads(int(sys.argv[2]))
    answers, made = sys.stdout, {}  # type: ignore[var-annotated]
    sys.stdout = sys.stderr  # stdout carries only the answers
    for request in sys.stdin:
        try:
            answer: dict[str, Any] = {"times": _answer(json.loads(request), device, made)}
        except Exception as error:
            answer = {"error": line(error)}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
