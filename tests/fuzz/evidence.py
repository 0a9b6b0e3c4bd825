# SPDX-License-Identifier: Apache-2.0
"""Writes ``docs/evidence/fuzz.md`` and ``fuzz.json`` from the recorded rounds."""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.fuzz.targets import TARGETS

FOLDER = Path(__file__).parents[2] / "docs" / "evidence"
PACKAGES = ("torch", "numpy", "triton", "safetensors", "pydantic", "PyYAML", "pyarrow", "hypothesis")
GROUPS = {
    "ops": "Calls of the ops' functions, each with the reference and with the C++ kernel (attention: with torch's)",
    "emulated": "Accepted calls of the Triton kernels in the interpreter and of the CUDA kernels in the emulation",
    "others": "Configurations and files that were read",
}


def write(state: dict[str, Any]) -> int:
    """Write both files; returns 1 if a target has fewer calls than wanted, else 0."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    state = state | {"faults": [fault | {"fault": _nowhere(fault["fault"])} for fault in state["faults"]]}
    versions = {name: metadata.version(name) for name in PACKAGES} | {"Python": platform.python_version()}
    (FOLDER / "fuzz.json").write_text(json.dumps({"versions": versions} | state, indent=1) + "\n", encoding="utf-8")
    (FOLDER / "fuzz.md").write_text("\n".join(text(state, versions)) + "\n", encoding="utf-8")
    return int(any(state["targets"].get(t.name, {"calls": 0})["calls"] < t.wanted for t in TARGETS))


def _nowhere(fault: str) -> str:
    """The text of a fault without paths of this machine."""
    for place in (FOLDER.parents[1], sys.prefix, sys.base_prefix):
        fault = fault.replace(f"{place}/", "")
    return fault


def text(state: dict[str, Any], versions: dict[str, str]) -> list[str]:
    """The lines of ``fuzz.md``."""
    done = state["targets"]
    commits = list(dict.fromkeys(sitting["commit"] for sitting in state["sittings"]))
    lines = [
        "# Fuzzing", "",
        "`make fuzz` (`tests/fuzz/`): hypothesis generates calls, files and configurations; a child process runs them"
        " with limits on memory and time. Each round of a target is a run of hypothesis with a seed that follows from"
        " the number of the round. So every round can be repeated: `python -m tests.fuzz --replay TARGET ROUND`. This"
        " page lists the rounds and the faults that they found; `fuzz.json` has all counts and the rounds of each"
        " commit.", "",
        f"Seed {state['seed']}, commits {', '.join(commits)}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".", "",
    ]  # fmt: skip
    for group, what in GROUPS.items():
        targets = [target for target in TARGETS if target.group == group]
        calls = sum(done.get(target.name, {"calls": 0})["calls"] for target in targets)
        lines += [f"## {what}: {calls:,}", "", "| target | rounds | calls | wanted | outcomes | seconds |"]
        lines += ["| --- | ---: | ---: | ---: | --- | ---: |"]
        for target in targets:
            mine = done.get(target.name, {"next": 0, "calls": 0, "counts": {}, "seconds": 0.0})
            outcomes = ", ".join(f"{key.split(' ', 1)[1]} {count:,}" for key, count in mine["counts"].items())
            name = target.name.partition(".")[2]
            lines.append(
                f"| {name} | {mine['next']:,} | {mine['calls']:,} | {target.wanted:,} | {outcomes}"
                f" | {mine['seconds']:.0f} |"
            )
        lines.append("")
    lines += ["## Faults", "", f"{len(state['faults'])} rounds found a fault. The first line of each:", ""]
    for fault in state["faults"]:
        first = fault["fault"].splitlines()[0].replace("|", "\\|")[:300]
        since = fault.get("mended", "open")  # written by the person who fixed it
        lines.append(f"- `{fault['target']}`, round {fault['round']}, at {fault['commit']}: {first} ({since})")
    return lines
