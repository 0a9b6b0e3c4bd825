# SPDX-License-Identifier: Apache-2.0
"""``pytest --benchmark``: the op benchmarks instead of the tests, with every option of pytest-benchmark beside it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="run the op benchmarks, not the tests")
    parser.addoption(
        "--tell", action="store_true", help="print each failure as it happens, for a run that may be stopped"
    )


class _Tell:
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            print(f"\n== {report.when} of {report.nodeid} failed\n{report.longreprtext[-3000:]}", flush=True)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """An error that leaves the GPU unusable costs one test: pytest-xdist goes on in a new process."""
    if not report.failed or _usable():
        return
    if "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)  # the report has been sent
    pytest.exit(f"{report.nodeid} left the GPU unusable", returncode=1)


def _usable() -> bool:
    """Whether this process can go on with its GPU, if it has used one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def pytest_configure(config: pytest.Config) -> None:
    if config.option.tell and not hasattr(config, "workerinput"):  # once, of all workers of pytest-xdist
        config.pluginmanager.register(_Tell())
    if not config.option.benchmark:
        return
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs pytest-benchmark (pip install pytest-benchmark)")
    if config.getoption("dist", "no") != "no" or config.getoption("tx", None):
        raise pytest.UsageError("--benchmark measures: it runs alone, without pytest-xdist's options")
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(BENCHMARKS)]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Whatever paths are asked for, no benchmark runs without ``--benchmark``."""
    return True if collection_path.is_relative_to(BENCHMARKS) and not config.option.benchmark else None
