# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM while a run trains."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Signal:
    """The number of the signal that asked for the end; 0 before one did."""

    number = 0


@contextlib.contextmanager
def signals() -> Iterator[Signal]:
    """Notes Ctrl-C or SIGTERM, so that a step is never cut in half; a second one interrupts at once.

    A handler of the program's own is called too. A signal that is ignored stays so.
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
