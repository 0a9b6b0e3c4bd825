# SPDX-License-Identifier: Apache-2.0
"""Progress bars of commands."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

_PERIOD = 600.0  # speed and remaining time are estimated from the last steps: these seconds, at most 1000 steps


class Bars(Progress):
    """Progress bars on stderr: items done and in total, speed, and remaining time."""

    def __init__(self, shown: bool = True) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[rate]}"),
        )
        console = Console(stderr=True)
        super().__init__(
            *columns,
            TimeRemainingColumn(table_column=Column(no_wrap=True)),  # in a narrow terminal, only the bar shrinks
            console=console,
            refresh_per_second=2,
            speed_estimate_period=_PERIOD,
            disable=not shown,
        )
        self._lazy = not console.is_interactive

    def start(self) -> None:
        """In a log, print only the last state, and only if there is something to show."""
        if not self._lazy:
            super().start()

    def stop(self) -> None:
        if self.live.is_started:
            super().stop()

    def begin(self, description: str, total: int | None = None) -> TaskID:
        """A new bar."""
        return self.add_task(description, total=total, rate="")

    def show(
        self, task: TaskID, done: int, description: str, images: int | None = None, *, total: int | None = None
    ) -> None:
        """Show that ``done`` of ``total`` items (None: as before) are done; an item is ``images`` images (None: 1)."""
        if self._lazy and done:
            self._lazy = False
            self.start()
        fields: dict[str, Any] = {} if total is None else {"total": total}
        self.update(task, completed=done, description=description, **fields)
        if speed := self._tasks[task].speed:
            self.update(task, rate=f"{_figure(speed)}/s" if images is None else rate(speed, images))


def rate(speed: float, images: int) -> str:
    """The text for ``speed`` steps per second with ``images`` images each."""
    return f"{_figure(speed)} it/s {_figure(speed * images)} img/s"


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"
