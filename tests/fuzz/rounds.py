# SPDX-License-Identifier: Apache-2.0
"""A round of a target: one run of hypothesis; its seed follows from its number. A child with limited memory and time
runs
rounds one after another and writes a line of JSON after each: ``python -m tests.fuzz.rounds TARGET SEED FIRST
SECONDS``."""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase

from tests.fuzz.targets import Target, named

SETTINGS = {
    "deadline": None,  # the parent process has one
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "phases": (Phase.generate, Phase.shrink),
    "report_multiple_bugs": False,
    "print_blob": False,
}


def run(target: Target, seed: int, number: int, examples: int | None = None) -> tuple[Counter[str], str | None]:
    """Run a round. Returns how often each outcome occurred, and the smallest example of a fault, if there is one."""
    counts: Counter[str] = Counter()

    @hypothesis.seed(seed * 10**9 + number)
    @hypothesis.settings(max_examples=examples or target.examples, **SETTINGS)
    @hypothesis.given(target.strategy())
    def round_of(example: Any) -> None:
        target.check(example, counts)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            round_of()
        except Exception as error:
            return counts, _told(error)
    return counts, None


def _told(error: BaseException) -> str:
    """The message of a fault; for other errors also the traceback."""
    if isinstance(error, BaseExceptionGroup):
        return "\n".join(map(_told, error.exceptions))
    if isinstance(error, AssertionError) and str(error):
        return str(error)
    return "".join(traceback.format_exception(error))[-4000:]


def limit_memory(room: int) -> None:
    """Limit the address space to its current size plus ``room`` bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + room, resource.RLIM_INFINITY))


def main(name: str, seed: int, first: int, seconds: float) -> None:
    """Run rounds from ``first`` on until the time is over; the last line says so."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    target = named(name)
    target.prepare()
    limit_memory(target.memory)
    end, number = time.monotonic() + seconds, first
    while time.monotonic() < end:
        start = time.monotonic()
        counts, fault = run(target, seed, number)
        line = {"round": number, "seconds": round(time.monotonic() - start, 3), "counts": counts, "fault": fault}
        os.write(1, (json.dumps(line) + "\n").encode())
        number += 1


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
