# SPDX-License-Identifier: Apache-2.0
"""print a schedule of guidance step by step, with its cost, and draw it"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from fastdistill.commands._options import configured, import_pydantic, quiet, taken
from fastdistill.errors import FastdistillError, called


def run(arguments: list[str]) -> None:
    import_pydantic()
    from fastdistill.tasks.guidance.config import ShowConfig

    arguments, as_json = taken(arguments, "--json")
    if arguments and re.match(r"[^-]|-[\d.]", arguments[0]):  # weights may be negative
        arguments = [f"--schedule={arguments[0]}", *arguments[1:]]
    config = configured(ShowConfig, arguments, "guidance show")
    if config is None:
        return
    if config.schedule is None:
        raise FastdistillError("guidance show: expected a schedule such as 8@10,-1@2,0, got none")
    quiet()
    from fastdistill.diffusion.grid import Grid
    from fastdistill.diffusion.guidance import Guidance
    from fastdistill.diffusion.schedule import NoiseSchedule

    with called("schedule"):
        schedule = Guidance.parse(config.schedule)
    with called("grid"):
        grid = Grid.parse(config.grid, NoiseSchedule.from_config({"name": config.noise}))
    weights, passes = schedule.weights(grid).tolist(), schedule.passes(grid).tolist()
    sigma = [None if math.isinf(value) else value for value in grid.sigma[:-1].tolist()]
    levels = zip(grid.times.tolist(), sigma, weights, passes, strict=True)
    order = 2 if config.method == "heun" else 1
    report = {
        "schedule": str(schedule),
        "describe": schedule.describe(),
        "grid": str(grid),
        "noise": config.noise,
        "method": config.method,
        "steps": [
            {"step": step, "t": t, "sigma": sigma, "w": w, "g": 1 + w, "passes": passes}
            for step, (t, sigma, w, passes) in enumerate(levels)
        ],
        "evaluations": schedule.evaluations(grid, order),
        "constant_evaluations": Guidance.constant(1).evaluations(grid, order),
    }
    if config.png is not None:
        from fastdistill.evaluate import png, schedule_curve
        from fastdistill.files import atomic_write, located, make_directory

        picture = png(schedule_curve([schedule], grid), transparent=False)
        file = located(config.png, "png")
        make_directory(file.parent)
        atomic_write(file, picture)
        report["png"] = config.png
    print(json.dumps(report, indent=2) if as_json else _text(report))


def _text(report: dict[str, Any]) -> str:
    lines = [
        report["schedule"],
        f"  {report['describe']}",
        "",
        "  step        t       sigma         w         g  passes",
    ]
    for row in report["steps"]:
        sigma = math.inf if row["sigma"] is None else row["sigma"]
        numbers = f"{row['t']:9.6g}{sigma:12.5g}{row['w']:10.4g}{row['g']:10.4g}"
        lines.append(f"  {row['step']:4d}{numbers}{row['passes']:8d}")
    cost = f"{report['evaluations']} evaluations per image ({report['constant_evaluations']} of a constant weight)"
    lines += ["", f"  {cost} on {report['grid']} by {report['method']}"]
    return "\n".join([*lines, *([f"  {report['png']}"] if "png" in report else [])])
