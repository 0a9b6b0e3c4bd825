# SPDX-License-Identifier: Apache-2.0
"""Errors that only a launch on a real GPU can show: streams, graphs, devices.

Without a GPU the same steps run emulated, and a graph is the step itself.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.ops import OPS, _dispatch, _native, cross_attention, feature_match, grad_square_sum, noise_gather, use
from fastdistill.ops._dispatch import Kernel, Op
from tests.gpu.work import KERNELS, PAIRS, WORKS, Work, adamw_ema_work, banks, model_work, restore, steps_of
from tests.ops.test_philox import VECTORS

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
TWO = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two CUDA devices")]
here = "cuda" if torch.cuda.is_available() else "cpu"
kernels = pytest.mark.parametrize("kernel", KERNELS)
pairs = pytest.mark.parametrize(("kernel", "work"), PAIRS)


def on(*marks: Any) -> Callable[..., Any]:
    """Decorators for a test of every step with every kernel."""

    def decorate(test: Any) -> Any:
        for mark in (*marks, pairs):
            test = mark(test)
        return test

    return decorate


def assert_equal(got: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    for k, (one, two) in enumerate(zip(got, expected, strict=True)):
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            assert a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu()), f"step {k}, tensor {i}"


def captured(work: Work) -> tuple[Callable[[], None], list[Tensor]]:
    """A function that replays the step in a CUDA graph, and the memory that it writes; the state is unchanged."""
    before = [t.clone() for t in work.state]
    if here == "cpu":
        memory = [t.clone() for t in work.step()]
        restore(work, before)

        def replay() -> None:
            for t, value in zip(memory, work.step(), strict=True):
                t.copy_(value)

        return replay, memory
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work.step()  # the first launch loads kernels and compiles Triton's
    torch.cuda.current_stream().wait_stream(stream)
    restore(work, before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        memory = work.step()
    assert all(map(torch.equal, work.state, before))  # capturing does not execute the step
    return graph.replay, memory


@on()
def test_equal_bits_on_every_run(work: str, kernel: str) -> None:
    with use(kernel):
        first = steps_of(WORKS[work](here), 2)
        assert_equal(steps_of(WORKS[work](here), 2), first)
    assert not all(map(torch.equal, first[0], first[1]))


@pytest.mark.skipif("triton" not in KERNELS, reason="no Triton")
def test_cross_attention_has_equal_bits_where_a_gpu_is_full() -> None:
    """Thousands of blocks run at once, so a missing barrier or fence shows."""
    batch, queries, heads, runs = (16, 4096, 8, 5) if here == "cuda" else (1, 20, 1, 2)
    shapes = (batch, queries, heads, 40), *[(batch, 77, heads, 40)] * 2
    with use("triton"):
        made = model_work(here, cross_attention, *shapes, dtype=torch.bfloat16)
        first = steps_of(made)
        for _ in range(runs - 1):
            assert_equal(steps_of(made), first)


@on(*([pytest.mark.slow] if here == "cpu" else []))
def test_replays_of_a_graph_are_the_next_steps(work: str, kernel: str) -> None:
    """Each replay reads counters, weights and rates from device memory."""
    with use(kernel):
        made = WORKS[work](here)
        expected = steps_of(made)
        replay, memory = captured(made)
        got = []
        for _ in expected:
            replay()
            got.append([t.clone() for t in memory])
    assert_equal(got, expected)


def test_a_graph_of_a_whole_training_step() -> None:
    """Draw, teacher, student, losses, backward and optimizer; other libraries may round differently."""
    for name in ("diffusers", "pydantic", "safetensors", "yaml"):
        pytest.importorskip(name)
    from fastdistill.train import DistillTrainer
    from fastdistill.train.state import state_of
    from tests import small

    own = small.teacher()
    made = small.student("channel_base", own)
    parts = small.SCHEDULE, small.cache(), small.bank(), small.objective(made), small.config()
    trainer = DistillTrainer(own, made.model, *parts, device=here)
    trainer.step()  # creates the optimizer's state

    def step() -> list[Tensor]:
        trainer.step()
        return [trainer.step.counter.clone(), trainer.step.totals.clone(), trainer.step.optimizer.skipped.clone()]

    work = Work(list(state_of(trainer.step, trainer.student).values()), step)
    expected = steps_of(work)
    replay, memory = captured(work)
    for written in expected:
        replay()
        for got, value in zip(memory, written, strict=True):
            torch.testing.assert_close(got, value, rtol=1e-3, atol=1e-5)
    assert memory[0].tolist() == [0, 4] and memory[2] == 0


@pytest.mark.gpu
@pytest.mark.skipif(here == "cpu", reason="no CUDA device")
def test_a_graph_keeps_the_table_of_addresses_that_it_reads() -> None:
    """Triton's table is in device memory; it may be replaced by a newer one only if no graph uses it."""
    with use("triton"):
        made = adamw_ema_work(here)
        expected = steps_of(made)
        replay, memory = captured(made)
        held = [torch.ones(10 + i, device=here) for i in range(100)]
        for grad in held:
            grad_square_sum([grad])
        torch.cuda.synchronize()
        overwritten = [torch.full((n,), -1, device=here) for n in (16, 64, 256, 1024) for _ in range(100)]
        for written in expected:
            replay()
            assert_equal([memory], [written])
    del overwritten


@on(*GPU)
def test_a_stream_of_its_own(work: str, kernel: str) -> None:
    """A step waits for earlier work on the current stream, and for nothing else."""
    with use(kernel):
        made = WORKS[work](here)
        expected = steps_of(made)
        state = [t.clone() for t in made.state]
        for t in made.state:
            t.zero_()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # cycles; a launch on another stream would read the zeros
            restore(made, state)
            got = [[t.clone() for t in made.step()] for _ in expected]
        stream.synchronize()
    assert_equal(got, expected)


@on(*GPU)
def test_nothing_waits_for_the_gpu(work: str, kernel: str) -> None:
    with use(kernel):
        made = WORKS[work](here)
        made.step()  # Triton compiles, and copies its table of addresses
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.cuda._sleep(500_000_000)
            made.step()
            assert not torch.cuda.current_stream().query()  # the sleep has not ended
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on(*TWO)
def test_the_gpu_of_the_tensors_need_not_be_the_current_one(work: str, kernel: str) -> None:
    with use(kernel):
        expected = steps_of(WORKS[work]("cuda:0"))
        with torch.cuda.device(0):
            assert_equal(steps_of(WORKS[work]("cuda:1")), expected)
            assert torch.cuda.current_device() == 0


@kernels
def test_two_devices_draw_one_batch(kernel: str) -> None:
    """Each draws its half of the global batch with the same seed; another seed gives another draw."""
    devices = [f"cuda:{i % torch.cuda.device_count()}" for i in range(2)] if here == "cuda" else ["cpu"] * 2
    options = {"null_index": 8, "target": True, "global_batch": 12}
    with use(kernel):
        whole = noise_gather(*banks(here), batch=12, **options)
        halves = [noise_gather(*banks(d), batch=6, first_sample=6 * i, **options) for i, d in enumerate(devices)]
        *tables, counter = banks(here)
        other = noise_gather(*tables, counter + torch.tensor([1, 0]).to(here), batch=12, **options)
    for field, value in whole._asdict().items():
        assert torch.equal(torch.cat([getattr(half, field).cpu() for half in halves]), value.cpu()), field
    assert not torch.equal(other.timestep, whole.timestep) and not torch.equal(other.x_t, whole.x_t)


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_published_vectors_of_philox(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    if here == "cuda" and (reason := _native.cuda_reason()):
        pytest.skip(reason)
    numbers = [torch.tensor(t).to(torch.int32).to(here) for t in (counter, key)]
    words, normals = torch.zeros(4, dtype=torch.int32, device=here), torch.zeros(4, device=here)
    addresses = [t.data_ptr() for t in (*numbers, words, normals)]
    _native.cuda().philox4x32(*addresses, 1, _native.stream(words))
    assert tuple(int(w) % 2**32 for w in words) == expected and normals.abs().max() < 6


@kernels
def test_a_backward_in_another_thread_takes_the_forced_kernel(kernel: str) -> None:
    """On a GPU, autograd runs it in its own thread."""
    s, t = torch.ones(5, device=here, requires_grad=True), torch.zeros(5, device=here)
    calls = OPS["scale_gradients"].calls
    with use(kernel):
        loss = 3 * feature_match([s], [t]).loss
        before = calls[kernel]
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert calls[kernel] == before + 1 and torch.equal(s.grad, torch.full_like(s, 6 / 5))


class Elsewhere(Tensor):
    """Pretends to be on a GPU that need not exist; if there is a GPU, it is a fake tensor."""

    __torch_dispatch__ = None

    @staticmethod
    def __new__(cls, device: str) -> Elsewhere:
        return Tensor._make_wrapper_subclass(cls, (1,), device=device)


def test_the_guard_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """With several GPUs, the kernel's device is that of its tensors; with one GPU nothing is checked."""
    entered: list[int] = []

    @contextlib.contextmanager
    def device(number: int) -> Iterator[None]:
        entered.append(number)
        yield
        entered.append(-1)

    seen: list[list[int]] = []
    kernel = Kernel("fake", "cuda", lambda *args: seen.append(list(entered)), lambda: None)
    op = Op("fake", "", lambda *args: None, [kernel])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    host, first, second = torch.empty(1), Elsewhere("cuda:0"), Elsewhere("cuda:1")
    for count, args, during in [
        (1, (second,), []),
        (2, (first,), []),
        (2, (second,), [1]),
        (2, (3, [], [second, second], first), [1]),
        (2, (host, None, second), [1]),
        (2, (), []),
    ]:
        monkeypatch.setattr(_dispatch, "_several_gpus", lambda count=count: count > 1)
        entered.clear()
        op.run_on_gpu(*args)
        assert seen.pop() == during and entered == during + [-1] * len(during)
