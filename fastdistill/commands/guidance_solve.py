# SPDX-License-Identifier: Apache-2.0
"""solve the window of guidance that keeps the variance within classes"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from fastdistill.commands._bars import Bars
from fastdistill.commands._options import configured, import_pydantic, quiet, taken
from fastdistill.errors import FastdistillError, called

if TYPE_CHECKING:
    from fastdistill.diffusion.schedule import Schedule
    from fastdistill.diffusion.spectrum import Spectrum
    from fastdistill.tasks.guidance.config import SolveConfig


def run(arguments: list[str]) -> None:
    import_pydantic()
    from fastdistill.tasks.guidance.config import SolveConfig

    arguments, as_json = taken(arguments, "--json")
    arguments, allow_code = taken(arguments, "--allow-code")
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--run", *arguments]
    config = configured(SolveConfig, arguments, "guidance solve")
    if config is None:
        return
    quiet()
    from fastdistill.diffusion.grid import Grid
    from fastdistill.diffusion.guidance import Guidance
    from fastdistill.diffusion.spectrum import variance_neutral

    spectrum, schedule = _given(config, allow_code, not as_json)
    with called("grid"):
        grid = Grid.parse(config.grid, schedule)
    found = variance_neutral(
        spectrum, grid, config.w_plus, config.switch, config.stop, config.floor, method=config.method
    )
    constant, order = Guidance.constant(config.w_plus), 2 if config.method == "heun" else 1
    free, held = (spectrum.variance(grid, w, method=config.method) for w in (0.0, config.w_plus))
    report = {
        "schedule": str(found.schedule),
        "w_minus": None if math.isnan(found.w_minus) else found.w_minus,
        "reachable": found.reachable,
        "variance_ratio": found.ratio,
        "constant_variance_ratio": held / free,
        "steps": found.steps,
        "grid": str(grid),
        "evaluations": found.schedule.evaluations(grid, order),
        "constant_evaluations": constant.evaluations(grid, order),
    }
    print(json.dumps(report, indent=2) if as_json else _text(config, report, found.schedule.describe()))


def _text(config: SolveConfig, report: dict[str, Any], words: str) -> str:
    lines = [str(report["schedule"]), f"  {words}"]
    kept = f"variance over that of w = 0: {report['variance_ratio']:.4f}"
    lines.append(f"  {kept} (w = {config.w_plus:g} throughout: {report['constant_variance_ratio']:.4f})")
    spared = f"{report['evaluations']} evaluations per image ({report['constant_evaluations']} throughout)"
    lines.append(f"  {spared} on {report['grid']}")
    if not report["reachable"]:
        wanted = "no weight" if report["w_minus"] is None else f"w = {report['w_minus']:.4g}"
        steps = "no number of steps is enough" if report["steps"] is None else f"{report['steps']} steps are enough"
        lines.append(f"  the nearest: all of the variance needs {wanted}; with {config.floor:g} {steps}")
    return "\n".join(lines)


def _given(config: SolveConfig, allow_code: bool, shown: bool) -> tuple[Spectrum, Schedule]:
    """The variances and the noise schedule from the options."""
    from fastdistill.diffusion.schedule import NoiseSchedule
    from fastdistill.diffusion.spectrum import Spectrum

    chosen = [config.run is not None, config.cache is not None, bool(config.c or config.u)]
    if sum(chosen) != 1:
        got = "several" if any(chosen) else "none"
        raise FastdistillError(f"guidance solve: expected one of a run file, --cache, or --c and --u, got {got}")
    noise: Schedule = NoiseSchedule.from_config({"name": config.noise})
    if config.c or config.u:
        if len(config.c) != len(config.u):
            got = f"{len(config.c)} and {len(config.u)}"
            raise FastdistillError(f"guidance solve: expected as many variances in --c as in --u, got {got}")
        return Spectrum.of(config.c, config.u), noise
    folder = str(config.cache)
    if config.run is not None:
        from fastdistill.runs import RunConfig
        from fastdistill.runs.opened import opened
        from fastdistill.train.config import from_yaml

        opened_run = opened(from_yaml(RunConfig, config.run), allow_code=allow_code)
        size = opened_run.sizes[0]
        folder, noise = str(opened_run.latents_place(size)), opened_run.pipeline.schedule(size)
    with Bars(shown) as bars:
        task = bars.begin("variances")
        return Spectrum.beside(
            folder, config.rank, progress=lambda done, total: bars.show(task, done, "variances", total=total)
        ), noise
