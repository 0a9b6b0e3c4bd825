# SPDX-License-Identifier: Apache-2.0
"""The emulation of CUDA detects one planted bug of each kind."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.cuda_on_cpu import HERE, kernels
from tests.cuda_on_cpu.guard import Guarded, guarded

N = 256
BUGS = re.findall(r"\w+", re.search(r"enum Bug \{(.*?)\}", (HERE / "planted.cu").read_text(), re.S)[1])  # type: ignore[index]
FOUND = {
    "missing_barrier": r"reads (shared memory that its block has not written|without a barrier what was wr)",
    "reused_too_early": r"(writes|reads) without a barrier what was (read|written) by thread \d+",
    "ordered_by_a_shuffle": r"reads without a barrier what was written by thread \d+",
    "uninitialized": r"reads shared memory that its block has not written",
    "past_the_end": r"block \(3, 0, 0\), thread \(63, 0, 0\) accesses (memory|0x\w+, which is) out of bounds",
    "before_the_start": r"block \(0, 0, 0\), thread \(0, 0, 0\) accesses memory out of bounds",
    "past_an_array": r"thread \(0, 0, 0\) indexes past an array or breaks an alignment",
    "past_dynamic": r"thread \(63, 0, 0\) accesses shared memory past the end",
    "misaligned": r"indexes past an array or breaks an alignment",
    "divergent": r"waits at .* in line \d+, where not all that it waits for arrive",
    "exited": r"waits at __syncthreads in line \d+, where not all that it waits for arrive",
    "wrong_mask": r"waits at .* in line \d+, where not all that it waits for arrive",
    "missing_fence": r"reads without a barrier what was written by thread 0 of block \d",
    "plain_counter": r"reads without a barrier what was written by thread 0 of block \d",
    "missing_cluster_barrier": r"reads (shared memory that its block has not written|without a barrier what was wr)",
    "left_too_early": r"accesses shared memory of a block that has ended",
    "not_all_arrive": r"waits at the cluster's barrier in line \d+, where not all that it waits for arrive",
}
Planted = Callable[..., bytes | None]


@pytest.fixture(scope="module")
def planted() -> Planted:
    function = ctypes.CDLL(str(kernels((HERE / "planted.cu",)))).planted
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 3, ctypes.c_int64]
    function.restype = ctypes.c_char_p
    return function


def launch(planted: Planted, bug: str) -> Tensor:
    def run(x: Tensor, y: Tensor, counter: Tensor) -> None:
        error = planted(BUGS.index(bug), x.data_ptr(), y.data_ptr(), counter.data_ptr(), N)
        if error is not None:
            raise RuntimeError(error.decode())

    y = torch.zeros(N)
    guarded(run)(torch.arange(N, dtype=torch.float32), y, torch.zeros(1, dtype=torch.int32))
    return y


def test_a_correct_kernel(planted: Planted) -> None:
    blocks = torch.arange(N, dtype=torch.float32).view(-1, 64)
    expected = (blocks.flip(1) + blocks.sum(1, keepdim=True)).flatten()
    for _ in range(6):
        assert torch.equal(launch(planted, "none"), expected)


@pytest.mark.parametrize("bug", BUGS[1:])
def test_planted_bugs(planted: Planted, bug: str) -> None:
    """In any order of the threads; the message names kernel, block, thread and line."""
    for _ in range(6):
        with pytest.raises(RuntimeError, match=FOUND[bug]) as error:
            launch(planted, bug)
        assert re.search(
            r"^\w+, block \(\d, 0, 0\), thread \(\d+, 0, 0\) .* (in line \d+|\(\w+\.cuh?:\d+\))", str(error.value)
        )
    test_a_correct_kernel(planted)  # the next launch is clean


def test_a_write_that_is_not_watched(planted: Planted) -> None:
    def memset(x: Tensor) -> None:
        ctypes.memset(x.data_ptr() - 1, 0, 1)

    with pytest.raises(AssertionError, match=r"wrote beside a tensor of shape \(5,\)"):
        guarded(memset)(torch.ones(5))


@pytest.mark.parametrize("size", [0, 1, 5, 1024, 4096, 5000])
@pytest.mark.parametrize("past", [0, 4])
def test_guarded_tensors_hold_their_content(size: int, past: int) -> None:
    original = torch.randn(size + past // 4)[past // 4 :]
    before = original.clone()
    guard = Guarded(original)
    assert torch.equal(guard.tensor, before)
    assert size == 0 or guard.tensor.data_ptr() % 16 == original.data_ptr() % 16
    guard.tensor.add_(1)
    guard.open()
    guard.release()
    assert torch.equal(original, before + 1)
