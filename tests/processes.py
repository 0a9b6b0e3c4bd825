# SPDX-License-Identifier: Apache-2.0
"""Processes of tests. They are forked from one that has imported torch and this package, which takes seconds, and has
done nothing else; it is started when the first of them is."""

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
    """A process that calls a function of a module."""
    process = _context.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns in a process of its own, or the error that it raises there."""
    with _context.Pool(1) as pool:
        return pool.apply(function, arguments)


def as_ranks(function: Callable[..., object], *arguments: Any, count: int = 2) -> None:
    """``function(rank, *arguments)`` in two processes or more at once, until all have ended."""
    torch.multiprocessing.start_processes(function, arguments, nprocs=count, start_method=METHOD)


def shared(factory: pytest.TempPathFactory) -> Path:
    """A directory that all processes of a parallel test run share."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The directory ``name`` that ``make(directory)`` makes, once for all processes of a parallel test run: tests that
    change it change a copy."""
    place = shared(factory) / name
    place.parent.mkdir(parents=True, exist_ok=True)
    made = Path(f"{place}.made")
    with FileLock(f"{place}.lock"):
        if not made.exists():
            shutil.rmtree(place, ignore_errors=True)  # of one that failed in another process
            make(place)
            made.touch()
    return place
