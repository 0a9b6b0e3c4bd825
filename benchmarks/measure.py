# SPDX-License-Identifier: Apache-2.0
"""One case into rows: checked, timed against its rivals in one interleaved run, compared with the ceilings."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import machine
from benchmarks.registry import COMPILED, DTYPES, Case, Run, Workload, forget_compiled
from benchmarks.timing import Timing, copies, graphed, interleaved, stopwatch
from fastdistill.ops import OPS, use

Row = dict[str, Any]
FIELDS = (
    "date op shape dtype mode threads rival ratio rival_ms rival_iqr_ms ours ours_ms ours_iqr_ms ours_gb_s ours_tflop_s"
    " percent copy_gb_s matmul_tflop_s note isa driver sm_mhz watts torch triton python commit"
).split()
WRONG = "wrong: "


@dataclass(frozen=True)
class Settings:
    """How to measure: ``rivals`` are those alone (None: all); at least ``rounds`` are counted."""

    device: torch.device
    threads: int = 1
    rounds: int = 41
    warm_up: int = 5
    seconds: float = 2.0
    rivals: Sequence[str] | None = None
    compiled: bool = True


def row(case: Case, settings: Settings, **fields: Any) -> Row:
    common = {"op": case.op, "shape": case.shape, "dtype": case.dtype, "threads": settings.threads}
    return dict.fromkeys(FIELDS, "") | machine.versions(settings.device) | common | fields


def unmeasured(case: Case, settings: Settings, note: str) -> list[Row]:
    """Rows that say why there is no measurement."""
    names = [r for r in case.rivals if settings.rivals is None or r in settings.rivals]
    return [row(case, settings, rival=name, note=note) for name in names]


def measure(case: Case, settings: Settings) -> list[Row]:
    """One row a rival and mode. A kernel that does not match its reference is not timed, and its rows say so."""
    workloads: list[Workload] = []
    _ceilings(case, settings)  # while the memory is free
    try:
        workloads.append(case.build(settings.device))
        others = _other_kernels(case.op, settings.device)
        for kernel in (None, *others):
            with use(kernel) if kernel else contextlib.nullcontext():
                workloads[0].check()
        more = copies(workloads[0].bytes, settings.device) - 1
        workloads += [case.build(settings.device) for _ in range(more)]
        return _timed(case, workloads, others, settings)
    except torch.OutOfMemoryError:
        return unmeasured(case, settings, "out of memory")
    except ImportError as error:
        return unmeasured(case, settings, not_installed(error))
    except AssertionError as error:
        return unmeasured(case, settings, WRONG + line(error))
    finally:
        workloads.clear()
        forget_compiled()
        gc.collect()
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()


def once(case: Case, settings: Settings) -> None:
    """Each kernel of ours once, warm, in a range of the profiler's that has the op's name."""
    workload = case.build(settings.device)
    on_gpu = settings.device.type == "cuda"
    for kernel in (None, *_other_kernels(case.op, settings.device)):
        with use(kernel) if kernel else contextlib.nullcontext():
            workload.check()
            workload.ours()
            name = _kernel_of(case.op, workload.ours)
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
            with torch.cuda.nvtx.range(case.op) if on_gpu else contextlib.nullcontext():
                workload.ours()
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
        print(f"{case}: {name}", flush=True)


def _timed(case: Case, workloads: list[Workload], others: list[str], settings: Settings) -> list[Row]:
    runs, absent = _contestants(case, workloads, others, settings)
    kernel = _kernel_of(case.op, workloads[0].ours)
    in_graphs = settings.device.type == "cuda" and workloads[0].graphs
    modes = {"eager": stopwatch} | ({"graph": graphed} if in_graphs else {})
    rows = []
    for mode, make in modes.items():
        watches, failed = {}, dict(absent)
        for name, some in runs.items():
            try:
                watches[name] = make(some, settings.device)
                watches[name]()
            except Exception as error:
                failed[name] = line(error)
        if "ours" in failed:
            rows += [r | {"mode": mode} for r in unmeasured(case, settings, f"ours: {failed['ours']}")]
            continue
        for name in failed:
            watches.pop(name, None)
        timings, ratios = interleaved(watches, settings.rounds, settings.warm_up, settings.seconds)
        about = {"mode": mode, "ours": kernel, **_reached(case, workloads[0], timings["ours"], settings)}
        for name in (*ratios, *(name for name in failed if name not in ratios)):
            its = {"note": failed[name]} if name in failed else {
                "ratio": round(ratios[name], 3),
                "rival_ms": round(timings[name].median, 4),
                "rival_iqr_ms": round(timings[name].spread, 4),
            }  # fmt: skip
            rows.append(row(case, settings, rival=name, **about, **its))
    return rows


def _contestants(
    case: Case, workloads: list[Workload], others: list[str], settings: Settings
) -> tuple[dict[str, list[Run]], dict[str, str]]:
    """Ours first, its other kernels, the rivals, each with one run a copy of the inputs; and why others are missing."""
    first = workloads[0]
    if set(first.rivals) != set(case.rivals):
        raise ValueError(f"{case}: expected the rivals {case.rivals}, got {tuple(first.rivals)}")
    runs: dict[str, list[Run]] = {"ours": [w.ours for w in workloads]}
    for kernel in others:
        runs[f"ours, {kernel}"] = [_forced(w.ours, kernel) for w in workloads]
    absent: dict[str, str] = {}
    for name in case.rivals:
        made = [w.rivals[name] for w in workloads]
        reason = next((r for r in made if isinstance(r, str)), None)
        if settings.rivals is not None and name not in settings.rivals:
            continue
        if name == COMPILED and not settings.compiled:
            absent[name] = "left out by --no-compiled"
        elif reason is not None:
            absent[name] = reason
        else:
            runs[name] = [r for r in made if not isinstance(r, str)]
    return runs, absent


def _other_kernels(op: str, device: torch.device) -> list[str]:
    """Kernels of the op that would run here if the first were not there."""
    if device.type != "cuda" or op not in OPS:
        return []
    return [k.name for k in OPS[op].kernels if k.device == "cuda" and k.available() is None][1:]


def _forced(run: Run, kernel: str) -> Run:
    def forced() -> object:
        with use(kernel):
            return run()

    return forced


def _kernel_of(op: str, run: Run) -> str:
    if op not in OPS:
        return ""
    before = OPS[op].calls.copy()
    run()
    return "+".join(sorted(OPS[op].calls - before))


def _ceilings(case: Case, settings: Settings) -> tuple[float, float]:
    """GB/s of a copy and TFLOP/s of a matrix product, measured once a run."""
    return machine.copy_gb_s(settings.device), machine.matmul_tflop_s(DTYPES[case.dtype], settings.device)


def _reached(case: Case, workload: Workload, ours: Timing, settings: Settings) -> Row:
    """Ours beside the ceilings of the machine: percent of the time that bytes and FLOPs need at the least."""
    copy, matmul = _ceilings(case, settings)
    floor = max(workload.bytes / copy / 1e6, workload.flops / matmul / 1e9)
    return {
        "ours_ms": round(ours.median, 4),
        "ours_iqr_ms": round(ours.spread, 4),
        "ours_gb_s": round(workload.bytes / ours.median / 1e6, 2) if workload.bytes else "",
        "ours_tflop_s": round(workload.flops / ours.median / 1e9, 3) if workload.flops else "",
        "percent": round(100 * floor / ours.median, 1),
        "copy_gb_s": round(copy, 1),
        "matmul_tflop_s": round(matmul, 3),
        **machine.load(settings.device),
    }


def not_installed(error: ImportError) -> str:
    return f"{error.name} is not installed" if isinstance(error, ModuleNotFoundError) else line(error)


def line(error: BaseException) -> str:
    """A message of one line, without what torch says of how to debug it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:200]}"
