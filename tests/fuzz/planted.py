# SPDX-License-Identifier: Apache-2.0
"""Planted faults, to check that the fuzzer finds them."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st

Parts = tuple[st.SearchStrategy[int], Callable[[int, Counter[str]], None]]


def _at_the_third(fault: Callable[[], Any]) -> Parts:
    seen: Counter[str] = Counter()

    def check(_: int, counts: Counter[str]) -> None:
        seen["examples"] += 1
        counts["planted reader accepted"] += 1
        if seen["examples"] >= 3:
            fault()

    return st.integers(0, 2**32), check


def crash() -> Parts:
    """Ends the process abruptly."""
    return _at_the_third(lambda: os.kill(os.getpid(), signal.SIGSEGV))


def hang() -> Parts:
    """Never ends."""
    return _at_the_third(lambda: time.sleep(3600))


def memory() -> Parts:
    """Allocates more memory than allowed."""
    return _at_the_third(lambda: bytearray(2**30))


def unclear() -> Parts:
    """Raises an error without information."""

    def fault() -> None:
        raise KeyError("x")

    return _at_the_third(fault)
