# SPDX-License-Identifier: Apache-2.0
"""measure settings of canonical latents, with their controls, and choose one"""

from __future__ import annotations

import json

from fastdistill.commands._bars import Bars
from fastdistill.commands._options import configured, import_pydantic, quiet


def run(arguments: list[str]) -> None:
    import_pydantic()
    from fastdistill.tasks.context.selecting import SweepConfig, run_sweep

    config = configured(SweepConfig, arguments, "canonical sweep")
    if config is None:
        return
    quiet()
    with Bars(not config.json) as bars:
        task = bars.begin("settings: evaluations")
        found = run_sweep(config, lambda done, total: bars.show(task, done, "settings: evaluations", total=total))
    if config.json:
        print(json.dumps(found, allow_nan=False))
        return
    from rich.console import Console

    from fastdistill.tables import print_table

    console = Console()
    rows = [[_text(row[name]) for name in _COLUMNS] for row in found["sweep"]]
    print_table(console, list(_COLUMNS.values()), rows, left=["tap"])
    console.print(_WORDS, soft_wrap=True)
    if (best := found["chosen"]) is not None:
        console.print(f"\nchosen: t_e {best['t_e']}, k {best['k']}, {best['tap']}: {best['reason']}", soft_wrap=True)
    console.print(f"{config.output}/sweep.json", soft_wrap=True)


_WORDS = """\
removed: shares of the variance within classes; random: selectivity of random directions of equal energy. NMI of noise
and of noise projected is what the prompt alone gives: only what is above it is of the images."""


_COLUMNS = {
    "t_e": "t_e", "k": "k", "tap": "tap", "irrelevant_removed": "irrelevant", "relevant_removed": "relevant",
    "selectivity": "selectivity", "selectivity_random": "random", "judge_right": "right", "energy": "energy",
    "nmi_raw": "NMI raw", "nmi": "canonical", "nmi_noise": "noise", "nmi_noise_projected": "projected",
    "nmi_shuffled_prompt": "shuffled", "nmi_null": "null", "products": "products", "seconds_per_image": "s/image",
}  # fmt: skip


def _text(value: float | str | None) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
