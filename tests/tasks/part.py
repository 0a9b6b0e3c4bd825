# SPDX-License-Identifier: Apache-2.0
"""A module with the parts that ``test_processes`` runs."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from fastdistill.errors import FastdistillError
from fastdistill.tasks.processes import Report, serve

_done: list[str] = []


def run(job: Path, report: Report) -> None:
    what = json.loads(job.read_text())["what"]
    _done.append(what)
    report(phase="work", done=0, total=1)
    if what == "refuse":
        raise FastdistillError("no such thing")
    if what == "fail":
        raise ValueError("told in the log")
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    while what == "wait":
        report(phase="work", done=0, total=1)
        time.sleep(0.02)
    (job.parent / "result.json").write_text(json.dumps({"done": _done, "parent": os.getppid(), "process": os.getpid()}))


if __name__ == "__main__":
    sys.exit(serve(run, "less"))
