# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM while a run trains."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Signal:
    """``number``: the signal that asked the run to stop; 0 if there was none."""

    number = 0


@contextlib.contextmanager
def signals() -> Iterator[Signal]:
    """Inside, Ctrl-C or SIGTERM is only recorded, so that no step is interrupted; a second one interrupts at once.

    The program's own handler is called too. A signal that the program ignores stays ignored.
    """
    stopped = Signal()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.number = number
        signal.signal(number, signal.default_int_handler)
        own = before[signal.Signals(number)]
        if callable(own) and own is not signal.default_int_handler:
            own(number, frame)

    try:
        for number in before:
            signal.signal(number, stop)
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
