# SPDX-License-Identifier: Apache-2.0
"""Tables in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def print_table(
    console: Console,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    left: Sequence[str] = (),
) -> None:
    """Print a table without truncated cells, even if it is wider than the terminal or the output is a file.

    left: columns aligned to the left, in addition to the first; the others are aligned to the right.
    """
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in (columns[0], *left) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    table.width = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    console.print(table, crop=False)
