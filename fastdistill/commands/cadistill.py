# SPDX-License-Identifier: Apache-2.0
"""train classifiers with a diffusion teacher's canonical images (context task)

``--json`` prints the results; ``kinds`` and ``seeds`` say which are trained.
"""

from __future__ import annotations

import json
from typing import Any

from fastdistill.commands._bars import Bars
from fastdistill.commands._options import configured, import_pydantic, taken


def run(arguments: list[str]) -> None:
    import_pydantic()
    from rich.console import Console
    from rich.table import Table

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
    table = Table(title="Right on held-out images, by the hue of the background")
    for column in ("classifier", "seed", *HELD_OUT, "seconds"):
        table.add_column(column, justify="left" if column == "classifier" else "right", no_wrap=True)
    for row in results:
        found = (f"{row['right'][kind]:.1%}" for kind in HELD_OUT)
        table.add_row(row["kind"], str(row["seed"]), *found, f"{row['seconds']:.1f}")
    console = Console()
    console.print(table)
    console.print(f"Weights and students.json: {config.output}", soft_wrap=True)
