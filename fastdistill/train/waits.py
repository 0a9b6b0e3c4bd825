# SPDX-License-Identifier: Apache-2.0
"""The seconds for which training is stalled, by cause."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Literal

import torch

from fastdistill.train import distributed

Cause = Literal["data", "checkpoint"]
WAITED = {"data": "waited_data", "checkpoint": "waited_checkpoint"}  # in a line of the metrics
_OPEN = 64  # spans that are kept before those that are over are added up


class Waits:
    """Use ``with waits("data"):`` around work for which the next step has to wait.

    On a GPU the seconds are measured on its stream, from the end of the launched work until more can be launched: a
    host that is ahead of the device and waits does not stall it. This class itself does not wait for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = dict.fromkeys(WAITED, 0.0)
        self._spans: deque[tuple[Cause, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def __call__(self, cause: Cause) -> Iterator[None]:
        if self._device.type == "cuda":
            before = self._event()
            yield
            self._spans.append((cause, before, self._event()))
            if len(self._spans) > _OPEN:
                self._add()
        else:
            start = time.perf_counter()
            yield
            self._seconds[cause] += time.perf_counter() - start

    def taken(self) -> dict[str, float]:
        """Seconds since the last call by the names of ``WAITED``, of the rank that waited longest; on a GPU of what the
        device has done by now."""
        self._add()
        own, self._seconds = list(self._seconds.values()), dict.fromkeys(WAITED, 0.0)
        if distributed.size() > 1:
            told = torch.tensor(own, dtype=torch.float64, device=self._device)
            own = distributed.rows(told).amax(0).tolist()
        return dict(zip(WAITED.values(), own, strict=True))

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _add(self) -> None:
        """Add up the spans that are over."""
        while self._spans and self._spans[0][-1].query():
            cause, before, after = self._spans.popleft()
            self._seconds[cause] += before.elapsed_time(after) / 1000
