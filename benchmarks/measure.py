# SPDX-License-Identifier: Apache-2.0
"""Turns a case into rows: checks it, times it against its rivals in one interleaved run, compares it with the peaks."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import statistics
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import machine
from benchmarks.attribution import attribution
from benchmarks.registry import COMPILED, DTYPES, Case, Contestant, Run, Workload, compiles, forget_compiled
from benchmarks.timing import UNCOUNTED, Timing, copies, free, graphed, in_turns, interleaved, stopwatch, summary
from fastdistill.ops import OPS, use

Row = dict[str, Any]
FIELDS = (
    "date run op shape dtype mode threads rival ratio rival_ms rival_iqr_ms rival_img_s rival_peak_gb ours ours_ms"
    " ours_iqr_ms ours_img_s ours_peak_gb ours_gb_s ours_tflop_s percent copy_gb_s matmul_tflop_s note isa driver"
    " sm_mhz memory_mhz watts torch triton python commit"
).split()
WRONG, FAILED = "wrong: ", "failed: "


@dataclass(frozen=True)
class Settings:
    """How to measure. ``rivals``: only these (None: all). ``rounds``: minimum number of counted rounds."""

    device: torch.device
    threads: int = 1
    rounds: int = 41
    warm_up: int = 5
    seconds: float = 2.0
    rivals: Sequence[str] | None = None
    compiled: bool | None = None  # None: decided by ``compiles``


def row(case: Case, settings: Settings, **fields: Any) -> Row:
    common = {"op": case.op, "shape": case.shape, "dtype": case.dtype, "threads": settings.threads}
    return dict.fromkeys(FIELDS, "") | machine.versions(settings.device) | common | fields


def unmeasured(case: Case, settings: Settings, note: str) -> list[Row]:
    """Rows that give the reason for a missing measurement."""
    names = [r for r in case.rivals if settings.rivals is None or r in settings.rivals]
    return [row(case, settings, rival=name, note=note) for name in names]


def measure(case: Case, settings: Settings) -> Iterator[Row]:
    """One row per rival and mode, as they are measured; compiled rivals come last. A kernel that does not match its
    reference is not timed, and its rows say so. After an error the remaining rows give it as the reason; if the device
    is unusable then, the process ends after them. Rows of training steps have two more entries than FIELDS,
    ``ours_parts``
    and ``rival_parts``: where the milliseconds went."""
    workloads: list[Workload] = []
    _ceilings(case, settings)  # before memory is allocated
    told: set[str] = set()
    note = ""
    try:
        workloads.append(case.build(settings.device))
        others = _other_kernels(case.op, settings.device)
        for kernel in (None, *others):
            with use(kernel) if kernel else contextlib.nullcontext():
                workloads[0].check()
        more = copies(workloads[0].bytes, settings.device) - 1
        workloads += [case.build(settings.device) for _ in range(more)]
        for found in _timed(case, workloads, others, settings):
            told.add(found["rival"])
            yield found
    except torch.OutOfMemoryError:
        note = "out of memory"
    except ImportError as error:
        note = not_installed(error)
    except AssertionError as error:
        note = WRONG + line(error)
    except Exception as error:
        note = FAILED + traced(error)
    finally:
        workloads.clear()
        forget_compiled()
    if note:
        yield from (found for found in unmeasured(case, settings, note) if found["rival"] not in told)
    free(settings.device)  # raises if an error has made the device unusable


def once(case: Case, settings: Settings) -> None:
    """Run each of our kernels once, warm, in a range of the profiler with the op's name."""
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


def _timed(case: Case, workloads: list[Workload], others: list[str], settings: Settings) -> Iterator[Row]:
    first = workloads[0]
    runs, absent = _contestants(case, workloads, others, settings)
    for group in first.groups:
        wanted = {name: runs[name] for name in ("ours", *group.rivals) if name in runs}
        missing = {name: absent[name] for name in group.rivals if name in absent}
        if wanted.keys() <= {"ours"} and not missing:  # none of these rivals was requested
            continue
        try:
            yield from _steps(case, first, wanted, missing, settings, group.seconds)
        except torch.OutOfMemoryError:
            yield from (r for r in unmeasured(case, settings, "out of memory") if r["rival"] in group.rivals)
        except Exception as error:
            note = FAILED + traced(error)
            yield from (r for r in unmeasured(case, settings, note) if r["rival"] in group.rivals)
        for name in wanted.keys() - {"ours"}:
            wanted[name][0].close()  # type: ignore[attr-defined]
        forget_compiled()
        free(settings.device)
    if first.groups:
        return
    if isinstance(first.ours, Contestant):
        yield from _steps(case, first, runs, absent, settings)
        return
    kernel = _kernel_of(case.op, first.ours)
    modes = {"eager": stopwatch} | ({"graph": graphed} if settings.device.type == "cuda" and first.graphs else {})
    late = [name for name in runs if name.startswith(COMPILED)]  # compiling may take minutes
    turns = [([name for name in runs if name not in late], absent)] + ([(["ours", *late], {})] if late else [])
    for (names, missing), (mode, make) in itertools.product(turns, modes.items()):
        if names == ["ours"] and not missing:
            continue
        watches, failed = {}, dict(missing)
        for name in names:
            try:
                watches[name] = make(runs[name], settings.device)
                watches[name]()
            except Exception as error:
                failed[name] = traced(error)
        if "ours" in failed:
            note = f"{FAILED}ours: {failed['ours']}"
            yield from (
                r | {"mode": mode} for r in unmeasured(case, settings, note) if r["rival"] in (*names, *missing)
            )
            continue
        for name in failed:
            watches.pop(name, None)
        timed = interleaved(watches, settings.rounds, settings.warm_up, settings.seconds)
        peaks = {name: allocated_gb(runs[name][0], settings.device) for name in watches} if first.memory else {}
        for found in _rows(case, first, settings, *timed, failed, mode=mode, ours=kernel):
            both = {"ours": "ours", "rival": found["rival"]}
            memory = {f"{side}_peak_gb": peaks[name] for side, name in both.items() if name in peaks}
            yield found | _images(first.samples, timed[0], found["rival"]) | memory


def _images(samples: int, timings: dict[str, Timing], rival: str) -> Row:
    """Images per second of both, if a run produces images."""
    both = {"ours": "ours", "rival": rival} if samples else {}
    return {f"{side}_img_s": round(1e3 * samples / timings[k].median, 2) for side, k in both.items() if k in timings}


def _steps(
    case: Case,
    workload: Workload,
    runs: dict[str, list[Run]],
    absent: dict[str, str],
    settings: Settings,
    seconds: float = 0.0,
) -> Iterator[Row]:
    """Rows of training steps. With ``seconds``, each contestant runs several steps at a time and has the memory
    alone."""
    contestants: dict[str, Contestant] = {}
    failed, seen = dict(absent), {}
    for name, (run,) in runs.items():
        assert isinstance(run, Contestant)
        try:
            peak = peak_gb(run, settings.device)
            seen[name] = {"peak_gb": peak, "parts": attribution(run, settings.device)}
            contestants[name] = run
        except Exception as error:
            failed[name] = traced(error)
        if seconds:
            run.rest()
            free(settings.device)
    if "ours" in failed:
        note = f"{FAILED}ours: {failed['ours']}"
        yield from (r for r in unmeasured(case, settings, note) if r["rival"] in runs or r["rival"] in absent)
        return
    if seconds:
        watched = functools.partial(_tell_load, settings.device)
        timed = summary(in_turns(contestants, settings.device, seconds, watched))
    else:
        watches = {name: stopwatch([run], settings.device) for name, run in contestants.items()}
        timed = interleaved(watches, settings.rounds, settings.warm_up, settings.seconds)
    for found in _rows(case, workload, settings, *timed, failed, mode="eager"):
        both = {"ours": "ours", "rival": found["rival"]}
        yield (
            found
            | _images(workload.samples, timed[0], found["rival"])
            | {f"{side}_{k}": v for side, name in both.items() for k, v in seen.get(name, {}).items()}
        )
        seen["ours"].pop("parts", None)  # only in the first row


def _tell_load(device: torch.device, name: str, times: list[float]) -> None:
    """Print the clocks during a turn; a GPU lowers them if it gets too hot or takes too much power."""
    its = ", ".join(f"{key} {value or 'unknown'}" for key, value in machine.load(device).items())
    print(f"  a turn of {name}: {statistics.median(times):.2f} ms; {its}", file=sys.stderr, flush=True)


def peak_gb(run: Contestant, device: torch.device) -> float | str:
    """The most memory, in 10^9 bytes, that torch had allocated at once for a run and what it holds; "" without a GPU.

    For a CUDA graph measured at its capture, so memory of other contestants is not included.
    """
    if device.type != "cuda":
        return ""
    for _ in range(UNCOUNTED - 1):
        run()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return round((torch.cuda.max_memory_allocated(device) - before + run.held()) / 1e9, 3)


def allocated_gb(run: Run, device: torch.device) -> float:
    """The most memory, in 10^9 bytes, that a run has allocated at once in addition to what was allocated before: on a
    GPU by torch's allocator, on a CPU in tensors."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return round((torch.cuda.max_memory_allocated(device) - before) / 1e9, 6)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    results: Any = recorded.profiler
    changes = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    live = itertools.accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
    return round(max(live, default=0) / 1e9, 6)


def _rows(
    case: Case,
    workload: Workload,
    settings: Settings,
    timings: dict[str, Timing],
    ratios: dict[str, float],
    failed: dict[str, str],
    **about: str,
) -> Iterator[Row]:
    reached = _reached(case, workload, timings["ours"], settings)
    for name in (*ratios, *(name for name in failed if name not in ratios)):
        its = {"note": failed[name]} if name in failed else {
            "ratio": round(ratios[name], 3),
            "rival_ms": round(timings[name].median, 4),
            "rival_iqr_ms": round(timings[name].spread, 4),
        }  # fmt: skip
        yield row(case, settings, rival=name, **about, **reached, **its)


def _contestants(
    case: Case, workloads: list[Workload], others: list[str], settings: Settings
) -> tuple[dict[str, list[Run]], dict[str, str]]:
    """Ours, its other kernels and the rivals, each with one run per copy of the inputs; and why others are missing."""
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
        if name.startswith(COMPILED) and settings.compiled is False:
            absent[name] = "left out by --no-compiled"
        elif name.startswith(COMPILED) and settings.compiled is None and not compiles(case):
            absent[name] = "at the smallest shape alone"
        elif reason is not None:
            absent[name] = reason
        else:
            runs[name] = [r for r in made if not isinstance(r, str)]
    return runs, absent


def _other_kernels(op: str, device: torch.device) -> list[str]:
    """Our other kernels of the op that can run here."""
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
    """GB/s of a copy and TFLOP/s of a matrix product; measured once per process."""
    return machine.copy_gb_s(settings.device), machine.matmul_tflop_s(DTYPES[case.dtype], settings.device)


def _reached(case: Case, workload: Workload, ours: Timing, settings: Settings) -> Row:
    """How close ours is to the peaks of the machine: the time that its bytes or FLOPs need at least, in percent."""
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


def traced(error: BaseException) -> str:
    """The error in one line; its traceback is printed before."""
    traceback.print_exception(error, limit=-12)
    return line(error)


def line(error: BaseException) -> str:
    """A message in one line, without torch's hints on debugging."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:200]}"
