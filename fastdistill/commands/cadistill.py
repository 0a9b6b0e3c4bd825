# SPDX-License-Identifier: Apache-2.0
"""train classifiers with a diffusion teacher's canonical images (context task)

``--json`` prints the results; ``--kinds`` and ``--seeds`` select what is trained.
"""

from __future__ import annotations

import json
from typing import Any

from fastdistill.commands._bars import Bars
from fastdistill.commands._options import configured, import_pydantic, taken


def run(arguments: list[str]) -> None:
    import_pydantic()
    from rich.console import Console

    from fastdistill.tables import print_table
    from fastdistill.tasks.context.students import StudentsConfig

    arguments, as_json = taken(arguments, "--json")
    config = configured(StudentsConfig, arguments, "cadistill")
    if config is None:
        return
    from fastdistill.tasks.context.data import HELD_OUT
    from fastdistill.tasks.context.students import train_students

    with Bars(not as_json) as bars:
        shown: dict[str, Any] = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in shown:
                shown[name] = bars.begin(name, total)
            bars.show(shown[name], done, name, total=total)

        results = train_students(config, show)
    if as_json:
        print(json.dumps({"students": results, "output": config.output}, allow_nan=False))
        return
    console = Console()
    rows = [
        (row["kind"], str(row["seed"]), *(f"{row['right'][kind]:.1%}" for kind in HELD_OUT), f"{row['seconds']:.1f}")
        for row in results
    ]
    title = "Right on held-out images, by the hue of the background"
    print_table(console, ("classifier", "seed", *HELD_OUT, "seconds"), rows, title=title)
    console.print(f"Weights and students.json: {config.output}", soft_wrap=True)
