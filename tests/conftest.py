# SPDX-License-Identifier: Apache-2.0
"""Loaded before any test module, because Triton decides at its first import whether it interprets."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tests.gpu_on_cpu  # noqa: F401
from tests.harness import On, device_of

signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
os.environ["FASTDISTILL_ATTENTION"] = "default"  # nothing is measured, and nothing written to the user's cache


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    return f"{val}@{val.device}" if isinstance(val, On) and val.device != "cpu" else None


@pytest.fixture(autouse=True)
def _made_on_the_device_of_the_kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    device = device_of(getattr(request.node, "callspec", None) and request.node.callspec.params.get("kernel"))
    if device == "cpu":
        yield
        return
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.fixture
def counter() -> Any:
    """A backend that counts compiled graphs. Torch limits how often a function is compiled again in a process, and
    other tests have compiled the same one."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    return CompileCounter()
