# SPDX-License-Identifier: Apache-2.0
"""What runs here and what does not, with the reason."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import fastdistill
from fastdistill.ops import OPS, _failures, _native, trials

_PACKAGES = ("torch", "diffusers", "triton", "safetensors", "numpy", "xformers")


def examine(*, try_kernels: bool = False) -> dict[str, Any]:
    """Versions, devices, extensions, and a row for every kernel of every op with the reason why it cannot run here.

    Args:
        try_kernels: make a tiny call of every kernel that should run, and use its error as the reason. On a GPU this
            compiles the Triton kernels, which takes some seconds if they are not in Triton's cache.

    Returns:
        A dict of JSON values. ``"failures"``: calls in this process whose kernel could not be compiled, loaded or
        launched, so that the next kernel got them.
    """
    devices = ["cpu", *(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count()))]
    kinds = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    tried = {kind: trials.failures(kind) if try_kernels else {} for kind in kinds}
    kernels = []
    for name, op in OPS.items():
        rows = op.table()
        for row in rows:
            row["reason"] = row["reason"] or tried.get(str(row["device"]), {}).get((name, str(row["kernel"])))
        chosen = {
            kind: next(r["kernel"] for r in rows if r["device"] in (kind, "any") and not r["reason"]) for kind in kinds
        }
        for row in rows:
            takes = [
                kind for kind, kernel in chosen.items() if kernel == row["kernel"] and row["device"] in (kind, "any")
            ]
            kernels.append({"op": name, "formula": op.summary, **row, "chosen_for": takes})
    return {
        "versions": {"fastdistill": fastdistill.__version__, "python": platform.python_version(), **_versions()},
        "devices": devices,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "extensions": {
            "_cpu": _native.cpu_reason() or _native.cpu_summary(),
            "_cuda": _native.cuda_summary(),
        },
        "kernels": kernels,
        "failures": [
            {"op": name, "kernel": kernel, "call": _failures.described(kind), "reason": reason}
            for name, op in OPS.items()
            for (kernel, kind), reason in list(op.failures.items())
        ],
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def doctor(console: Console, *, as_json: bool = False) -> None:
    """Print what ``examine`` finds; with a GPU it tries the kernels."""
    found = examine(try_kernels=torch.cuda.is_available())
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for title, values in {"versions": found["versions"], "extensions": found["extensions"]}.items():
        console.print(f"[bold]{title}[/bold]")
        for key, value in values.items():
            console.print(f"  {key:12} {value}", highlight=False, soft_wrap=True)
    console.print("[bold]devices[/bold]")
    if len(found["devices"]) == 1:
        console.print("  no CUDA device", highlight=False)
    for device in found["devices"]:
        console.print(f"  {device}", highlight=False)
    console.print(f"  {found['threads']} of {found['cores']} CPU threads in use", highlight=False)
    table = Table(title="kernels, best first", title_justify="left", box=SIMPLE_HEAD, padding=0)
    for column in ("op", "kernel", "device", "chosen for", "why it cannot run here"):
        table.add_column(column, no_wrap=column == "op")  # names stay whole, reasons wrap
    above = {reason: f"no {name}" for name, reason in found["extensions"].items()}
    previous = None
    for row in found["kernels"]:
        op = row["op"] if row["op"] != previous else ""
        previous = row["op"]
        reason = f"{above[row['reason']]} (above)" if row["reason"] in above else row["reason"] or ""
        table.add_row(op, row["kernel"], row["device"], ", ".join(row["chosen_for"]), reason)
    console.print(table)
    if found["failures"]:
        console.print("[bold]calls that went to the next kernel[/bold]")
    for failure in found["failures"]:
        told = f"{failure['op']}, {failure['kernel']}, {failure['call']}: {failure['reason']}"
        console.print(f"  {told}", highlight=False, markup=False, soft_wrap=True)
