# SPDX-License-Identifier: Apache-2.0
"""The lab of guidance (``fastdistill guidance lab``): worlds with exact scores measured over schedules, samplers,
dimensions and numbers of classes, as the rows of a report and a picture."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from fastdistill.data.fingerprint import sha256_of_json
from fastdistill.diffusion.distortion import Method
from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.errors import StorageError
from fastdistill.evaluate.diversity import Interval
from fastdistill.evaluate.figures import label, png
from fastdistill.evaluate.frontier import MEASURED, Row, frontier
from fastdistill.evaluate.phase import phase_picture
from fastdistill.files import atomic_write, located, locked, make_directory
from fastdistill.schemas import REPORT, WORLD
from fastdistill.tables import print_table
from fastdistill.tasks import workers
from fastdistill.tasks.guidance.config import LabConfig, World
from fastdistill.tasks.guidance.measure import Measured, measure
from fastdistill.tasks.guidance.worlds import Gaussian, Hypercube, RandomCentres, TwoClass
from fastdistill.tasks.guidance.worlds import World as Model
from fastdistill.train.config import validated

#: Called with (rows done, total rows, what is measured).
Progress = Callable[[int, int, str], object]
_SCHEDULE = NoiseSchedule.cosine()
_SHADES = "karras:30@30..0.09"  # the grid of the task shades
_INK = 3.87  # norm (root mean square) of its digits, there the length of a tint of 1; sigma acts as sigma / 3.87
_CONSTANTS = ("0", "0.1", "0.25", "0.5", "0.75", "1", "1.5", "2", "3", "4", "6")
_WINDOWS = ("4@8,-1@2,0", "4@10,-0.5@2,0", "8@10,-1@2,0", "8@8,-1@2,0", "8@7,-1@3,0")
_SWEEP = tuple(f"{w}@{switch},-1@{stop},0" for w in (4, 6, 8, 12) for switch in (7, 8, 10, 12) for stop in (1, 2, 3))
_DRAWS = 400  # draws for the interval of ``recovered``
_PHASE = "1"  # the weight of the phase picture
_GAUSSIAN = (1.3, 0.4, 2.0)  # mu, c, u
_ANISOTROPIC = ([1.3, -0.5, 0.2], [0.4, 1.0, 0.05], [2.0, 1.2, 0.5])


def run(config: LabConfig, console: Console | None = None) -> Path:
    """Measure, or continue an interrupted run. Returns the path of ``report.json``; ``phase.png`` and
    ``phase-dark.png`` are in the same folder.

    Raises:
        FastdistillError: the output cannot be written, or another process is writing there.
    """
    config = validated(config, "guidance lab").resolved()
    console = console or Console()
    output = located(config.output, "output")
    make_directory(output)
    start = time.perf_counter()
    with locked(output):
        with workers.bars(console) as bars:
            task = bars.add_task("rows", total=None)
            worlds = measured(
                config,
                output / "worlds",
                lambda done, total, what: bars.update(task, completed=done, total=total, description=label(what)),
            )
        for name, figure in pictures(worlds).items():
            for suffix, dark in (("", False), ("-dark", True)):
                atomic_write(output / f"{name}{suffix}.png", png(figure, dark=dark))
        options = [*(["--quick"] if config.quick else []), f"--samples {config.samples} --seed {config.seed} --world"]
        report = {
            "schema": REPORT.version,
            "worlds": worlds,
            "seconds": {"total": time.perf_counter() - start},
            "versions": workers.versions(),
            "reproduce": [" ".join(["fastdistill guidance lab", *options, *config.world])],
        }
        atomic_write(output / "report.json", json.dumps(report, indent=1, allow_nan=False).encode())
    _summarize(console, worlds)
    console.print(f"\nReport: [bold]{output / 'report.json'}[/bold]", soft_wrap=True)
    return output / "report.json"


@dataclass(frozen=True)
class Point:
    """The settings of a row. grid: a text, or the highest and lowest sigma of 48 levels in equal ratios. limit: the
    expected moments are those in the limit of infinitely many steps. m: magnitude of the centers' values; the spread of
    a class is 0.7 m. phase: whether the row belongs to the phase figure."""

    schedule: str
    grid: str | tuple[float, float] = _SHADES
    method: Method = "ddim"
    dimension: int = 1
    classes: int | None = None
    m: float = 1.0
    limit: bool = False
    phase: bool = False
    samples: int | None = None

    def levels(self) -> Grid:
        if isinstance(self.grid, str):
            return Grid.parse(self.grid, _SCHEDULE)
        steps, (high, low) = 48, self.grid
        ratio = torch.linspace(0, 1, steps, dtype=torch.float64, device="cpu")
        sigma = torch.cat([high * (low / high) ** ratio, torch.zeros(1, dtype=torch.float64, device="cpu")])
        signal, clock = (1 + sigma**2).rsqrt(), 1 - ratio / steps
        return Grid(signal, sigma * signal, 1000 * clock, clock)

    def world(self, kind: World, grid: Grid, seed: int) -> Model:
        if kind == "gaussian":
            return Gaussian(grid, *(_GAUSSIAN if self.dimension == 1 else _ANISOTROPIC))
        options: dict[str, Any] = {"m": self.m, "s": 0.7 * self.m}
        if kind == "random_centres":
            return RandomCentres(grid, self.dimension, self.classes or 1, seed=seed, **options)
        return {"two_class": TwoClass, "hypercube": Hypercube}[kind](grid, self.dimension, **options)


def points(kind: World, quick: bool) -> list[Point]:
    """The points that are measured in a world."""
    if kind == "gaussian":
        schedules = ("0", "2", "2@2,-0.6@0.3,0") if quick else ("-0.5", "0", "1", "2", "4", "2@2,-0.6@0.3,0", "4@2,0")
        methods: tuple[Method, ...] = ("ddim", "heun", "ancestral")
        found = [Point(s, grid, method) for s in schedules for grid in (_SHADES, "flow:28@3") for method in methods]
        found += [Point(s, _SHADES, method, dimension=3) for s in schedules[1:] for method in methods]
        steps = 500 if quick else 1500
        limits: tuple[tuple[int, Method], ...] = ((steps // 5, "heun"), (steps, "ancestral"))
        ended = [Point(w, f"flow:{n}", method, limit=True, samples=2048) for w in ("0", "2") for n, method in limits]
        return found + ended
    if kind == "random_centres":
        dimensions, alphas = ((6, 8, 10), (0.0, 0.15, 0.3, 0.45, 0.6)) if quick else ((8, 10, 12), _alphas(10))
        counts = [(d, max(1, round(math.exp(alpha * d)))) for d in dimensions for alpha in alphas]
        most = 1024 if quick else 2048
        return [_phase(d, classes=k, samples=most) for d, k in dict.fromkeys(counts)]
    shades = [Point(s, dimension=1 if kind == "two_class" else 3, m=_INK) for s in (*_CONSTANTS, *_WINDOWS)]
    if kind == "two_class":
        return shades + [_phase(d) for d in ((4, 16, 64) if quick else (1, 4, 16, 64, 256))]
    swept = [] if quick else [Point(s, dimension=3, m=_INK) for s in _SWEEP if s not in _WINDOWS]
    return shades + swept + [_phase(d) for d in ((1, 4, 16, 64) if quick else (1, 2, 4, 8, 16, 32, 64))]


def row(kind: World, point: Point, config: LabConfig) -> tuple[dict[str, Any], list[list[float]]]:
    """A row of ``worlds.<world>.rows[]``, JSON values (None if no exact value is known); and ``Measured.groups``."""
    grid = point.levels()
    world = point.world(kind, grid, config.seed)
    samples = min(config.samples, point.samples or config.samples)
    options: dict[str, Any] = {"samples": samples, "method": point.method, "seed": config.seed, "limit": point.limit}
    found = measure(world, grid, point.schedule, **options)
    return _row(point, grid, world, found), found.groups.nan_to_num().tolist()


def measured(config: LabConfig, directory: Path, progress: Progress | None = None) -> dict[str, dict[str, Any]]:
    """The part ``worlds`` of a report. For each world: its ``rows``; which of them (``phase``) form the phase figure;
    ``fits`` of those; and, if there are constants and windows on the grid of the shades, what the windows restore
    (``recovered``, as for a model).

    Rows are stored in ``directory/<world>.json``; the next call with the same configuration continues from there.
    """
    report = progress or (lambda done, total, what: None)
    plan = {kind: points(kind, config.quick) for kind in dict.fromkeys(config.world)}
    total, done = sum(map(len, plan.values())), 0
    make_directory(directory)
    worlds: dict[str, dict[str, Any]] = {}
    for kind, wanted in plan.items():
        file = directory / f"{kind}.json"
        made_from = sha256_of_json([[dataclasses.asdict(p) for p in wanted], config.samples, config.seed])
        kept = _kept(file, made_from)
        for point in wanted[len(kept) :]:
            report(done + len(kept), total, kind)
            kept.append(row(kind, point, config))
            content = {"schema": WORLD.version, "made_from": made_from, "rows": kept}
            atomic_write(file, json.dumps(content).encode())
        done += len(kept)
        report(done, total, kind)
        rows = [one for one, _ in kept]
        phase = [place for place, point in enumerate(wanted) if point.phase]
        worlds[kind] = {"rows": rows, "phase": phase, "fits": _fits(kind, [rows[place] for place in phase])}
        compared = [place for place, point in enumerate(wanted) if point.m == _INK]
        if compared:
            worlds[kind]["recovered"] = _recovered([kept[place] for place in compared])
    return worlds


def pictures(worlds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of the part ``worlds`` of a report, by name."""
    phase = {name: [world["rows"][i] for i in world["phase"]] for name, world in worlds.items() if world["phase"]}
    return {"phase": phase_picture(phase)} if phase else {}


def _summarize(console: Console, worlds: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the table at the end."""
    rows = []
    for name, world in worlds.items():
        exact = [row for row in world["rows"] if row["source"] is not None]
        apart = [
            abs(row[part] - row["expected"][part]) / row["standard_error"][part]
            for row in exact
            for part in ("mean", "variance")
            if row["source"] == "recursion"
        ]
        fits = "\n".join(_words(key, value) for key, value in world["fits"].items())
        furthest = f"{max(apart):.1f} standard errors" if apart else "-"
        rows.append((label(name), str(len(world["rows"])), str(len(exact)), furthest, fits or "-"))
    columns = ("world", "rows", "known exactly", "furthest from that", "phase picture")
    print_table(console, columns, rows, title="Exact worlds", left=["phase picture"])


def _words(key: str, fit: Mapping[str, float]) -> str:
    name = label(key)
    if "collapse" in fit:
        return f"{name}: dimensions apart by {fit['collapse']:.1%} of the range"
    return f"{name} ~ d^{fit['slope']:.3f} +- {fit['slope_error']:.3f}"


def _phase(dimension: int, classes: int | None = None, samples: int | None = None) -> Point:
    """A point of the phase figure: grids from levels without any information on the classes to the final decision."""
    reach = 100.0 * math.sqrt(dimension) if classes is None else 100.0
    most = max(1024, 2**19 // dimension) if samples is None else samples
    return Point(_PHASE, (reach, 0.02), "heun", dimension, classes, phase=True, samples=most)


def _alphas(n: int) -> tuple[float, ...]:
    return tuple(math.log(2) * i / n for i in range(n + 1))


def _row(point: Point, grid: Grid, world: Model, found: Measured) -> dict[str, Any]:
    classes = world.classes
    return {
        "schedule": point.schedule,
        "method": point.method,
        "grid": str(grid),
        "dimension": world.dimension,
        "classes": classes,
        "alpha": None if classes is None else math.log(classes) / world.dimension,
        "mean": found.found.mean,
        "variance": found.found.variance,
        "shift": found.shift,
        "variance_ratio": found.variance_ratio,
        "standard_error": dataclasses.asdict(found.standard_error),
        "expected": {"mean": None, "variance": None} if found.expected is None else dataclasses.asdict(found.expected),
        "source": found.source,
    }


def _kept(file: Path, made_from: str) -> list[Any]:
    """The rows from an earlier run with the same points."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        WORLD.check(found.get("schema", 1), file)
        return list(found["rows"]) if found["made_from"] == made_from else []
    except StorageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _recovered(kept: Sequence[tuple[Mapping[str, Any], list[list[float]]]]) -> list[dict[str, Any]]:
    """What windows restore, with intervals from draws of groups of samples, which are the same for every schedule."""
    groups = torch.tensor([groups for _, groups in kept], dtype=torch.float64)  # [rows, G, 3]
    random = torch.Generator().manual_seed(0)
    chosen = torch.randint(groups.shape[1], (_DRAWS, groups.shape[1]), generator=random, device="cpu")
    drawn = groups[:, chosen].mean(2)  # [rows, draws, 3]
    unknown = Interval(math.nan, math.nan, math.nan)
    rows = []
    for (one, _), values, draws in zip(kept, groups.mean(1).tolist(), drawn, strict=True):
        separation, ratio, right = (Interval(value, math.nan, math.nan) for value in values)
        named = {"separation": separation, "variance_ratio": ratio, "right": right}
        named |= dict.fromkeys(("mean_shift", "right_variance_ratio", "precision", "recall"), unknown)
        named |= dict.fromkeys(("density", "coverage", "vendi"), unknown)
        columns = torch.full((_DRAWS, len(MEASURED)), math.nan, dtype=torch.float64, device="cpu")
        for column, name in enumerate(("separation", "variance_ratio", "right")):
            columns[:, MEASURED.index(name)] = draws[:, column]
        rows.append(Row(one["schedule"], one["grid"], 1, 0, 0, math.nan, **named, draws=columns))
    return [found.to_json() for found in frontier(rows)]


def _fits(kind: World, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Fits of ``shift`` and ``variance_ratio`` in the phase figure: ``slope``, the exponent of the dimension, with
    ``slope_error``; for random centers ``collapse``: the largest distance between the curves of two dimensions at the
    same alpha, divided by the range of all."""
    if kind == "random_centres":
        return {name: {"collapse": _collapse(rows, name)} for name in ("shift", "variance_ratio")}
    found: dict[str, dict[str, float]] = {}
    for name, part in (("shift", "mean"), ("variance_ratio", "variance")) if rows else ():
        d, values = np.log([row["dimension"] for row in rows]), np.array([row[name] for row in rows])
        unit = np.array([row[part] for row in rows]) / (values + (name == "shift"))  # of the class without guidance
        weights = np.abs(values) * unit / np.array([row["standard_error"][part] for row in rows])
        slopes, covariance = np.polyfit(d, np.log(np.abs(values)), 1, w=weights, cov="unscaled")
        found[name] = {"slope": float(slopes[0]), "slope_error": float(covariance[0, 0] ** 0.5)}
    return found


def _collapse(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    dimensions = sorted({row["dimension"] for row in rows})
    curves = {
        d: np.array(sorted((row["alpha"], row[name]) for row in rows if row["dimension"] == d)) for d in dimensions
    }
    values = np.array([row[name] for row in rows])
    apart = []
    for one in curves.values():
        for other in curves.values():
            inside = one[(one[:, 0] >= other[0, 0]) & (one[:, 0] <= other[-1, 0])]
            apart.append(np.abs(np.interp(inside[:, 0], other[:, 0], other[:, 1]) - inside[:, 1]).max())
    return float(max(apart) / (values.max() - values.min()))
