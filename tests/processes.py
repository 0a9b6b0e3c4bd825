# SPDX-License-Identifier: Apache-2.0
"""Processes for tests. They are forked from a server process that has only imported torch and this package (which takes
seconds). The server starts with the first of them."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

METHOD = "forkserver"
_context = multiprocessing.get_context(METHOD)
_context.set_forkserver_preload(["tests.train.scenarios"])  # a module that imports the most


def begin(function: Callable[..., object], *arguments: Any) -> ForkServerProcess:
    """Start a process that calls a module-level function."""
    process = _context.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the function in a new process; returns its result or raises its error."""
    with _context.Pool(1) as pool:
        return pool.apply(function, arguments)


def as_ranks(function: Callable[..., object], *arguments: Any, count: int = 2) -> None:
    """Run ``function(rank, *arguments)`` in ``count`` processes at once, and wait for all."""
    torch.multiprocessing.start_processes(function, arguments, nprocs=count, start_method=METHOD)


def shared(factory: pytest.TempPathFactory) -> Path:
    """A directory that all processes of a parallel test run share."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The directory ``name``, filled by ``make(directory)`` once for all processes of a parallel test run. Tests that
    change it must copy it."""
    place = shared(factory) / name
    place.parent.mkdir(parents=True, exist_ok=True)
    made = Path(f"{place}.made")
    with FileLock(f"{place}.lock"):
        if not made.exists():
            shutil.rmtree(place, ignore_errors=True)  # left by a failed call in another process
            make(place)
            made.touch()
    return place
