# SPDX-License-Identifier: Apache-2.0
"""write canonical images of some images of each class"""

from __future__ import annotations

import json

from fastdistill.commands._bars import Bars
from fastdistill.commands._options import configured, import_pydantic, quiet, taken


def run(arguments: list[str]) -> None:
    import_pydantic()
    from fastdistill.tasks.context.selecting import ExtractConfig, run_extract

    arguments, allow_code = taken(arguments, "--allow-code")
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--run", *arguments]
    config = configured(ExtractConfig, arguments, "canonical extract")
    if config is None:
        return
    quiet()
    with Bars(not config.json) as bars:
        task = bars.begin("canonical images")
        found = run_extract(
            config,
            lambda done, total: bars.show(task, done, "canonical images", total=total),
            allow_code=allow_code,
        )
    settled, energy = int(found.settled[:].sum()), float(found.energy[:].mean())
    report = {"output": config.output, "rows": len(found), "settled": settled, "energy": energy}
    if config.json:
        print(json.dumps(report))
        return
    print(f"{config.output}: {len(found)} canonical images, {settled} of them with directions that have settled;")
    print(f"  {energy:.1%} of their latents was projected out")
