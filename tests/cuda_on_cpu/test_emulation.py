# SPDX-License-Identifier: Apache-2.0
"""The emulation of CUDA finds what it is there to find: one planted bug of each kind."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.cuda_on_cpu import HERE, kernels
from tests.cuda_on_cpu.guard import Guarded, guarded

N = 256


BUGS = "none missing_barrier uninitialized past_the_end before_the_start divergent exited wrong_mask".split()
Planted = Callable[..., bytes | None]


@pytest.fixture(scope="module")
def planted() -> Planted:
    function = ctypes.CDLL(str(kernels([HERE / "planted.cu"]))).planted
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = ctypes.c_char_p
    return function


def results(planted: Planted, bug: str, launches: int = 6) -> list[Tensor]:
    """What several launches give, each in another order of threads, with another poison in shared memory."""
    x = torch.arange(N, dtype=torch.float32)
    found = []

    def launch(a: Tensor, b: Tensor) -> None:
        error = planted(BUGS.index(bug), a.data_ptr(), b.data_ptr(), N)
        if error is not None:
            raise RuntimeError(error.decode())

    for _ in range(launches):
        y = torch.zeros(N)
        guarded(launch)(x, y)
        found.append(y)
    return found


def test_a_correct_kernel(planted: Planted) -> None:
    blocks = torch.arange(N, dtype=torch.float32).view(-1, 64)
    expected = (blocks.flip(1) + blocks.sum(1, keepdim=True)).flatten()
    assert all(torch.equal(y, expected) for y in results(planted, "none"))


@pytest.mark.parametrize("bug", ["missing_barrier", "uninitialized"])
def test_results_that_change_with_the_order_or_the_poison(planted: Planted, bug: str) -> None:
    first, *others = results(planted, bug)
    assert any(not torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        ("past_the_end", r"kernel, block \(3, 0, 0\), thread \(63, 0, 0\) accesses 0x\w+, which is out of bounds"),
        ("divergent", r"block \(\d, 0, 0\), thread \(\d+, 0, 0\) waits at .* in line \d+, where not all .* arrive"),
        ("exited", r"waits at __syncthreads in line \d+, where not all that it waits for arrive"),
        ("wrong_mask", r"waits at .* in line \d+, where not all that it waits for arrive"),
    ],
)
def test_errors_name_the_thread(planted: Planted, bug: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        results(planted, bug)
    test_a_correct_kernel(planted)  # the next launch starts clean


def test_a_write_just_before_the_start(planted: Planted) -> None:
    with pytest.raises(AssertionError, match=r"wrote beside a tensor of shape \(256,\)"):
        results(planted, "before_the_start")


@pytest.mark.parametrize("size", [0, 1, 5, 1024, 4096, 5000])
@pytest.mark.parametrize("past", [0, 4])
def test_guarded_tensors_hold_their_content(size: int, past: int) -> None:
    original = torch.randn(size + past // 4)[past // 4 :]
    before = original.clone()
    guard = Guarded(original)
    assert torch.equal(guard.tensor, before)
    assert size == 0 or guard.tensor.data_ptr() % 16 == original.data_ptr() % 16
    guard.tensor.add_(1)
    guard.release()
    assert torch.equal(original, before + 1)
