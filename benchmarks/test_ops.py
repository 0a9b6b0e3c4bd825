# SPDX-License-Identifier: Apache-2.0
"""``pytest --benchmark``: every op and its rivals with pytest-benchmark, to find regressions and check equivalence.

Published ratios are those of ``python -m benchmarks.run``, which interleaves both sides. On a CPU torch.compile is
timed only at the smallest shapes.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.registry import COMPILED, Case, Contestant, Workload, cases, compiles, forget_compiled

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _contestants() -> Iterator[Any]:
    dtypes = ["bf16"] if DEVICE.type == "cuda" else ["fp32"]
    for case in cases(DEVICE.type, dtype=dtypes):
        for name in ("ours", *case.rivals):
            if not name.startswith(COMPILED) or compiles(case):
                words = f"{case} {name}".replace("B=", "B")
                yield pytest.param(case, name, id=re.sub(r"[^\w.]+", "-", words))  # an id that works with -k


class _Built:
    """The workload of one case at a time; it is built and checked once for all contestants."""

    case: Case | None = None
    workload: Workload | Exception | None = None

    def of(self, case: Case) -> Workload:
        if self.case is not case:
            self.workload = None
            forget_compiled()
            gc.collect()
            self.case = case
            try:
                self.workload = case.build(DEVICE)
                self.workload.check()
            except Exception as error:
                self.workload = error
        if isinstance(self.workload, ModuleNotFoundError):
            pytest.skip(f"{self.workload.name} is not installed")
        if isinstance(self.workload, Exception):
            raise self.workload
        assert self.workload is not None
        return self.workload


@pytest.fixture(scope="session")
def built() -> _Built:
    torch.set_num_threads(1)
    return _Built()


@pytest.mark.parametrize(("case", "contestant"), list(_contestants()))
def test_op(benchmark: Any, built: _Built, case: Case, contestant: str) -> None:
    workload = built.of(case)
    run = workload.ours if contestant == "ours" else workload.rivals[contestant]
    if isinstance(run, str):
        pytest.skip(run)
    benchmark.group = str(case)
    benchmark.extra_info.update(op=case.op, shape=case.shape, dtype=case.dtype, bytes=workload.bytes)

    def timed() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        timed()
    benchmark(timed)
    if isinstance(run, Contestant):
        run.close()
