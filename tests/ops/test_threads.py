# SPDX-License-Identifier: Apache-2.0
"""``use`` belongs to a thread or task, a backward uses its forward's kernel, and shared state is thread-safe."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdistill.ops import OPS, cross_attention, geglu, use
from fastdistill.ops._dispatch import forced
from fastdistill.ops.adamw_ema import table
from fastdistill.train.profiling import profile_steps
from tests.ops.test_dispatch import BACKWARD, CALLS, X


def in_a_thread(call: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def counted(op: str, call: Callable[[], object]) -> Counter[str]:
    """How often each kernel of an op ran."""
    before = OPS[op].calls.copy()
    call()
    return OPS[op].calls - before


def test_blocks_of_two_threads_that_overlap() -> None:
    entered, both, left = threading.Event(), threading.Event(), threading.Event()
    seen: dict[str, str | None] = {}

    def first() -> None:
        with use("reference"):
            entered.set()
            both.wait()
            seen["first"] = forced()
        left.set()

    def second() -> None:
        entered.wait()
        seen["before"] = forced()
        with use("cpp"):
            both.set()
            left.wait()
            seen["second"] = forced()

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"before": None, "first": "reference", "second": "cpp"} and forced() is None


def test_blocks_of_two_tasks_that_overlap() -> None:
    async def inside(kernel: str) -> str | None:
        with use(kernel):
            await asyncio.sleep(0)
            return forced()

    async def both() -> list[str | None]:
        return await asyncio.gather(inside("reference"), inside("cpp"))

    assert asyncio.run(both()) == ["reference", "cpp"] and forced() is None


def test_calls_of_one_kind_by_threads_that_ask_for_different_kernels() -> None:
    x, calls = X.clone(), 300
    automatic = next(iter(counted("geglu", lambda: geglu(x))))
    assert in_a_thread(lambda: counted("geglu", lambda: geglu(x))) == {automatic: 1}

    def run(kernel: str | None) -> None:
        with use(kernel):
            for _ in range(calls):
                geglu(x)

    def together() -> None:
        threads = [threading.Thread(target=run, args=(kernel,)) for kernel in ("reference", None)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert counted("geglu", together) == Counter({"reference": calls}) + Counter({automatic: calls})


def attend(x: Tensor) -> Tensor:
    return cross_attention(x[:, :, None], x[:, :2, None], x[:, :2, None])


@pytest.mark.parametrize("name", [*CALLS, "cross_attention"])
def test_a_backward_uses_the_kernel_of_its_forward(name: str) -> None:
    """After the block, in another thread, and inside another block of that thread."""
    call = CALLS.get(name, attend)
    kernel = "triton" if name == "cross_attention" else "reference"  # a kernel that is not the default
    backward = BACKWARD.get(name, f"{name}_backward")

    def differentiate(y: Tensor, inside: str | None) -> Counter[str]:
        with use(inside):
            return counted(backward, lambda: torch.autograd.grad(3 * y.sum(), x))

    x = X.clone().requires_grad_()
    with use(kernel):
        chosen = [call(x) for _ in range(2)]
    assert in_a_thread(lambda: differentiate(chosen[0], None)) == {kernel: 1}
    assert differentiate(chosen[1], "cpp" if name != "cross_attention" else "reference") == {kernel: 1}
    automatic = counted(backward, lambda: torch.autograd.grad(3 * call(x).sum(), x))
    y = call(x)
    assert in_a_thread(lambda: differentiate(y, kernel)) == automatic


def test_the_threads_of_autograd_see_the_block_around_backward() -> None:
    """For code that runs in a backward without a forward of its own, such as the second forward of a checkpoint."""

    def seen_from(context: contextvars.Context) -> str | None:
        torch._C._stash_obj_in_tls("context", context)  # torch does this around a backward
        try:
            return forced()
        finally:
            torch._C._stash_obj_in_tls("context", None)

    with use("reference"):
        inside = contextvars.copy_context()
    assert in_a_thread(lambda: seen_from(inside)) == "reference"
    assert in_a_thread(lambda: seen_from(contextvars.copy_context())) is None
    assert in_a_thread(forced) is None


def test_a_thread_of_autograd_sees_the_block_around_backward() -> None:
    """A GPU's backward runs in such a thread; on a CPU, a backward nested in 60 others does."""
    here, seen = threading.get_ident(), []

    class Within(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, depth: int) -> Tensor:
            ctx.depth = depth
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            if threading.get_ident() != here:
                seen.append(forced())
            elif ctx.depth:
                differentiate(ctx.depth - 1)
            return grad, None

    def differentiate(depth: int) -> None:
        with torch.enable_grad():
            x = torch.ones(1, requires_grad=True)
            torch.autograd.grad(Within.apply(x, depth), x)

    for kernel in ("reference", None):
        with use(kernel):
            differentiate(100)
    differentiate(100)
    assert seen == ["reference", None, None]


def test_a_compiled_function_uses_the_kernel_that_is_asked_for_when_it_runs() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: geglu(x).square().sum(), fullgraph=True, backend="aot_eager")
    x = X.clone().requires_grad_()

    def both() -> Tensor:
        (gradient,) = torch.autograd.grad(compiled(x), x)
        return gradient

    both()
    with use("reference"):
        assert counted("geglu", both) == counted("geglu_backward", both) == {"reference": 1}


def test_tables_of_two_optimizers_in_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """If there is room for only one copy, each optimizer drops the other's."""

    class Slow(OrderedDict[Any, Any]):
        def move_to_end(self, key: Any, last: bool = True) -> None:
            time.sleep(0.002)
            super().move_to_end(key, last)

    monkeypatch.setattr(table, "_MOST_COPIES", 1)
    monkeypatch.setattr(table, "_copies", Slow())

    def copy(number: int) -> list[bool]:
        rows = np.full((1, 16), number, np.int64)
        expected = torch.from_numpy(rows.reshape(-1))
        return [torch.equal(table.on_device(rows, torch.device("cpu"))[0], expected) for _ in range(5)]

    with ThreadPoolExecutor(2) as pool:
        assert all(all(equal) for equal in pool.map(copy, (1, 2)))


def test_profiles_of_two_threads_leave_nothing_behind(tmp_path: Path) -> None:
    before = {name: (op.kernels, op.reference) for name, op in OPS.items()}
    first_inside, second_inside, first_done = (threading.Event() for _ in range(3))

    def first() -> None:
        first_inside.set()
        second_inside.wait(0.1)  # waits in vain if profiles take turns

    def second() -> None:
        second_inside.set()
        first_done.wait(5)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(profile_steps, first, tmp_path / "first", steps=1, warm_up=0)
        first_inside.wait()
        two = pool.submit(profile_steps, second, tmp_path / "second", steps=1, warm_up=0)
        one.result()
        first_done.set()
        two.result()
    assert {name: (op.kernels, op.reference) for name, op in OPS.items()} == before
