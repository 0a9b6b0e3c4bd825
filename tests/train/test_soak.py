# SPDX-License-Identifier: Apache-2.0
"""The short form of ``make soak``: some kills of a run of some steps, in processes that are forked of one."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import pytest
import torch

from fastdistill.cli import main
from fastdistill.train import distributed
from tests import processes, soak


def distill(rank: int, ranks: int, port: int, file: Path) -> None:
    """What ``torchrun`` starts, or a single command."""
    torch.set_num_threads(1)
    distributed.ANSWER = 1.0
    if ranks > 1:
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "soak"} | {k: str(v) for k, v in own.items()}
    sys.exit(main(["distill", str(file)]))


class Forked:
    """A sitting without torchrun, whose processes have imported everything. Where one has died the others are ended, as
    torchrun does: by SIGTERM, and by SIGKILL where that is not enough."""

    def __init__(self, file: Path, ranks: int) -> None:
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        self._processes = [processes.begin(distill, rank, ranks, port, file) for rank in range(ranks)]
        self._told: float | None = None

    def ranks(self) -> list[int]:
        return [process.pid or 0 for process in self._processes]

    def others(self) -> list[int]:
        return []

    def status(self) -> int | None:
        codes = [process.exitcode for process in self._processes]
        if None not in codes:
            return max(map(abs, codes))
        if any(codes) and self._told is None:
            self._told = time.monotonic()
            for process in self._processes:
                process.terminate()
        elif self._told is not None and time.monotonic() - self._told > 3.0:
            for process in self._processes:
                process.kill()
        return None


@pytest.mark.parametrize(("ranks", "kills"), [(1, 3), (2, 2)])
def test_killed_at_random_a_run_ends_with_the_same_bits(tmp_path: Path, ranks: int, kills: int) -> None:
    outcome = soak.soak(tmp_path, ranks, 24, kills, 0, Forked, early=1.0, log_every=3, checkpoint_every=2)
    assert not outcome.unlike and len(outcome.kills) == kills
    assert [kill.begun <= kill.reached < 24 for kill in outcome.kills] == [True] * kills


def test_a_run_that_ends_otherwise_is_seen(tmp_path: Path) -> None:
    """A single bit of the weights, of a value, of the metrics; a file that is left."""
