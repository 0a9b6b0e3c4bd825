# SPDX-License-Identifier: Apache-2.0
"""print what a run needs: memory by part, time and disk; no GPU needed"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastdistill.documented import documented

if TYPE_CHECKING:
    from rich.console import Console

    from fastdistill.plan import Plan


@documented
@dataclass(frozen=True)
class PlanConfig:
    """Print the memory, time and disk space that a run needs. This needs neither a GPU nor weights."""

    card: str | None = None
    """GPU to plan for (h100, a100-80gb, rtx4090, ...); none: the run's device on this machine."""
    ranks: int = 1
    """Number of processes that share the batch, each on its own card."""


def run(arguments: list[str]) -> None:
    import json

    from fastdistill.commands._options import quiet, run_file

    given = run_file(PlanConfig, arguments, "plan")
    if given is None:
        return
    quiet()
    from rich.console import Console

    from fastdistill import runs

    found = runs.plan(given.config, card=given.own.card, ranks=given.own.ranks, allow_code=given.allow_code)
    if given.json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        show(found, Console(width=100))


def show(found: Plan, console: Console) -> None:
    """The plan as a table; each line states the source of its figures."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from fastdistill.plan import fits
    from fastdistill.plan.cards import GIB
    from fastdistill.plan.memory import MODELLED, PARTS

    card, ranks = found.card, "" if found.ranks == 1 else f", on each of {found.ranks} ranks"
    ahead = f"{found.micro_batch} at once" + ("" if found.micro_batch == found.batch else f" of {found.batch}")
    console.print(f"[bold]{card.name}[/bold]{ranks}: {ahead}, {found.execution}", highlight=False)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for column, justify in (("memory at the peak", "left"), ("GiB", "right"), ("", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for part, size in found.memory.items():
        if size:
            table.add_row(part, _amount(size / GIB), PARTS[part] + " (model)" * (part in MODELLED), end_section=False)
    table.add_row("all", f"{found.total / GIB:.2f}", f"of {card.memory / GIB:.1f} on {card.name}")
    console.print(table)
    largest = "none fits" if found.largest_micro_batch is None else str(found.largest_micro_batch)
    trained, images = found.parameters["trained"], found.images_per_second
    phases = ", ".join(f"{name} {_amount(operations / 1e9)}" for name, operations in found.flops.items())
    speed = f"{images:,.1f} images/s, {found.step_seconds:.3g} s per step"
    lines = {
        "largest micro-batch": f"{largest} (divisors of {found.batch})",
        "parameters": f"teacher {found.parameters['teacher']:,}, student {found.parameters['student']:,}"
        + ("" if trained == found.parameters["student"] else f", {trained:,} trained"),
        "GFLOP per image": f"{_amount(sum(found.flops.values()) / 1e9)} ({phases}; counted)",
        "speed": f"{speed}, {_amount(found.hours)} hours ({card.source})",
        "disk": ", ".join(f"{name} {_amount(size / GIB)} GiB" for name, size in found.disk.items()),
    }
    for name, text in lines.items():
        console.print(f"  {name:20} {text}", highlight=False, soft_wrap=True)
    for remedy in fits(found, card.memory) or ():
        console.print(f"  {'would help':20} {remedy}", highlight=False, soft_wrap=True)


def _amount(value: float) -> str:
    """Two decimals; a smaller amount is shown differently from zero."""
    return f"{value:,.0f}" if value >= 100 or not value else f"{value:,.2f}" if value >= 0.01 else "<0.01"
