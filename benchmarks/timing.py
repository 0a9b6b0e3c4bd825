# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: every round runs each contestant once, so that a drift of the machine affects all of them.

On a GPU a round waits for the device first and is timed by events, so it includes the time of Python and of launches; a
captured CUDA graph excludes both. Inputs rotate through copies that together exceed the L2 cache.
"""

from __future__ import annotations

import collections
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.registry import Contestant, Run

Stopwatch = Callable[[], float]  # executes a run and returns milliseconds
_MOST_COPIES = 64
_CAPTURED = 8  # minimum number of runs in a graph
_LONGEST, _FEWEST = 30.0, 11  # after 30 seconds, 11 rounds are enough
UNCOUNTED, _TURN = 4, 11  # the trainer's step becomes a CUDA graph at its fourth run


@dataclass(frozen=True)
class Timing:
    """Median and interquartile range of the rounds, in milliseconds."""

    median: float
    spread: float


def copies(moved: int, device: torch.device) -> int:
    """How many copies of the inputs (``moved`` bytes) are needed so that each one is cold in a GPU's L2. On a CPU one:
    the inputs are larger than a core's caches, or every round uses other rows."""
    if device.type != "cuda" or not moved:
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(math.ceil(3 * cache / moved), 1), _MOST_COPIES)


def stopwatch(runs: Sequence[Run], device: torch.device) -> Stopwatch:
    """Each call executes and times the next of ``runs``."""
    turns = itertools.cycle(runs)
    if device.type != "cuda":

        def on_cpu() -> float:
            run = next(turns)
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)

        return on_cpu
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def on_gpu() -> float:
        run = next(turns)
        torch.cuda.synchronize(device)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return on_gpu


def graphed(runs: Sequence[Run], device: torch.device) -> Stopwatch:
    """All of ``runs`` in one CUDA graph, repeated until there are enough runs that the cost of a replay is negligible.
    A call replays the graph and returns the time of one run.

    Raises any error of the capture.
    """
    count = len(runs) * math.ceil(_CAPTURED / len(runs))
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            for run in runs:
                run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    kept = collections.deque[object](maxlen=len(runs))  # runs may overwrite what was returned to the graph's memory
    with torch.cuda.graph(graph):
        for run in itertools.islice(itertools.cycle(runs), count):
            kept.append(run())
    replay = stopwatch([graph.replay], device)
    return lambda: replay() / count


def interleaved(
    contestants: Mapping[str, Stopwatch], rounds: int, warm_up: int, seconds: float = 2.0
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Times of each contestant; and for all but the first, the median over rounds of (its time / the first one's time).

    At least ``rounds`` rounds are counted, and more if they fit into ``seconds``. Before them, ``warm_up`` and a tenth
    of ``seconds`` are not counted. After half a minute, eleven rounds are enough.
    """
    _times(contestants, warm_up, seconds / 10)
    return summary(_times(contestants, rounds, seconds))


def in_turns(
    contestants: Mapping[str, Contestant],
    device: torch.device,
    seconds: float,
    watch: Callable[[str, list[float]], object] = lambda name, times: None,
) -> dict[str, list[float]]:
    """Times of contestants whose memory would be too much together. In a turn, one contestant runs several times
    uncounted, then as many times counted, then releases what it can. Turns repeat for ``seconds``. ``watch`` is called
    after the runs of each turn, before the GPU has been idle for long."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or not all(times.values()):
        for name, contestant in contestants.items():
            for _ in range(UNCOUNTED):
                contestant()
            timed = stopwatch([contestant], device)
            times[name] += [timed() for _ in range(_TURN)]
            watch(name, times[name][-_TURN:])
            contestant.rest()
            free(device)
    return times


def free(device: torch.device) -> None:
    """Free memory that nothing holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def summary(times: Mapping[str, Sequence[float]]) -> tuple[dict[str, Timing], dict[str, float]]:
    """From the rounds of each contestant: medians and spreads, and the ratios to the first."""
    ours, *rivals = times
    ratios = {r: statistics.median(b / a for a, b in zip(times[ours], times[r], strict=True)) for r in rivals}
    timings = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        timings[name] = Timing(median, high - low)
    return timings, ratios


def _times(contestants: Mapping[str, Stopwatch], rounds: int, seconds: float) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contestants}
    begin = time.perf_counter()
    done, spent = 0, 0.0
    while done < rounds or spent < seconds:
        for name, timed in contestants.items():
            times[name].append(timed())
        done, spent = done + 1, time.perf_counter() - begin
        if spent > _LONGEST and done >= _FEWEST:
            break
    return times
