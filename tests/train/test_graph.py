# SPDX-License-Identifier: Apache-2.0
"""Which steps are captured in a CUDA graph, and how the others are executed; with a simulated GPU."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.torch_version import TorchVersion

from fastdistill.distill.objective import has_streams
from fastdistill.errors import DeviceError, FastdistillError, KernelError
from fastdistill.train import distributed, graph
from fastdistill.train.graph import WARM_UP, runner
from tests.train.ranks import make
from tests.train.test_step import Sins, step_on

with FakeTensorMode():
    ON_GPU = torch.empty(1, device="cuda")


def test_where_there_can_be_no_graph() -> None:
    step = step_on("cpu")
    runner(step, nn.Module(), "auto")()  # eager
    assert step.counter.tolist() == [0, 1]
    assert (step.execution, step.why) == ("eager", "auto: nothing was measured")
    runner(step, nn.Module(), "eager")
    assert (step.execution, step.why) == ("eager", "as set")
    message = "execution 'graph': it runs on cpu: a CUDA graph needs a CUDA device; use 'compiled'"
    with pytest.raises(FastdistillError, match=message):
        runner(step, nn.Module(), "graph")
    with pytest.raises(FastdistillError, match=message.replace("graph'", "compiled_graph'", 1)):
        runner(step, nn.Module(), "compiled_graph")


def test_an_execution_that_cannot_be_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for execution in ("graph", "compiled_graph"):
        run = make(execution=execution)
        with pytest.raises(FastdistillError, match=f"execution '{execution}': it runs on cpu"):
            run.fit(tmp_path / "run")
    assert not (tmp_path / "run").exists()


class OnGPU:
    """The attributes of a step that the choice of execution reads."""

    counter = type("counter", (), {"device": torch.device("cuda")})
    objective = SimpleNamespace(trained=())
    compiled, shapes = 0, 1

    def compile(self) -> None:
        self.compiled += 1

    def __call__(self) -> None: ...


@pytest.mark.parametrize(("version", "way"), [("2.13.0", "compiled"), ("2.11.0", "eager")])
def test_a_sharded_model_is_not_captured_but_compiled(
    version: str, way: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If torch can compile it."""
    step: Any = OnGPU()
    assert graph.refuse_graph(step, nn.Linear(2, 2)) is None
    model = nn.Sequential(nn.Linear(2, 2))
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        fully_shard(model[0], mesh=init_device_mesh("cpu", (1,)))
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        with pytest.raises(FastdistillError, match=rf"0 is sharded by FSDPLinear, which .*; use '{way}'"):
            runner(step, model, "graph")
        assert not step.compiled
        if way == "eager":
            with pytest.raises(FastdistillError, match=r"'compiled': 0 is sharded .*torch 2.11.0 cannot .*'eager'"):
                runner(step, model, "compiled")
        told = "it is compiled" if way == "compiled" else "it runs eagerly"
        with pytest.warns(UserWarning, match=rf"CUDA graph.*, as 0 is sharded .*; {told}") as caught:
            advance = runner(step, model, "auto")
        assert len(caught) == 1
        if way == "compiled":
            advance()
        assert step.compiled == (way == "compiled") and step.execution == way
        assert step.why.startswith("0 is sharded by FSDPLinear")
    finally:
        torch.distributed.destroy_process_group()


def test_ddp_that_is_dropped_releases_its_group(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``close`` too: as the last owner of the group DDP's reducer could wait for gloo's thread forever."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    objective: Any = SimpleNamespace(trained=[])
    wrapped: Any = distributed.averaged(objective, nn.Linear(2, 2), None, lambda counter: (counter, []))
    torch.distributed.destroy_process_group()
    left: list[set[str]] = []
    release = distributed.release

    def watched(ddp: Any) -> None:
        release(ddp)
        left.append({"logger", "reducer", "process_group"} & ddp.__dict__.keys())

    monkeypatch.setattr(distributed, "release", watched)
    del wrapped
    gc.collect()
    assert left == [set()]


def test_what_torch_asks_of_ranks_for_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The conditions in its notes on CUDA: NCCL 2.9.6, no asynchronous error handling, eleven eager steps before."""
    step: Any = OnGPU()

    def refused() -> str | None:
        return graph.refuse_graph(step, nn.Linear(2, 2))

    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: "cpu:gloo,cuda:gloo")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 9, 5))
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    assert refused() == "gradients are reduced by gloo: a CUDA graph can hold NCCL's collectives"
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    assert refused() == "NCCL is 2.9.5: a CUDA graph can hold its collectives from 2.9.6 on"
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING=0 is needed before init_process_group" in str(refused())
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    assert refused() is not None
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    assert refused() is None


class Uncompilable(OnGPU):
    def compile(self) -> None:
        def broken(*_: object) -> Any:
            raise ValueError("no compiler\nand more")

        self.run = torch.compile(lambda x: x + 1, backend=broken)

    def __call__(self) -> None:
        self.run(torch.ones(2))


def test_what_cannot_be_compiled_is_named() -> None:
    step: Any = Uncompilable()
    with pytest.raises(FastdistillError, match=r"failed: no compiler; config.execution 'eager' does without it$"):
        runner(step, nn.Module(), "compiled")()


class FakeGraph:
    """A simulated CUDA graph: it captures nothing, and a replay runs the step."""

    fails: RuntimeError | None = None

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        FakeGraph.step()

    step: Callable[[], None]


class FakeStream:
    def __init__(self, device: object) -> None:
        self.device = device

    def wait_stream(self, other: object) -> None:
        assert isinstance(other, FakeStream)


class FakeCapture:
    """Skips the code inside a capture."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> None:
        FakeGraph.captured = True  # type: ignore[attr-defined]

    def __exit__(self, kind: object, *_: object) -> None:
        FakeGraph.captured = False  # type: ignore[attr-defined]
        if kind is not None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    current = FakeStream("cpu")
    FakeGraph.captured = False  # type: ignore[attr-defined]
    FakeGraph.fails = None
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: warnings.catch_warnings())
    monkeypatch.setattr(torch.cuda, "graph", FakeCapture)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: FakeGraph.captured)  # type: ignore[attr-defined]
    monkeypatch.setattr(graph, "refuse_graph", lambda *_: None)


class Counting:
    """A step that counts its executions, but not during a capture."""

    stream, shapes = None, 1
    compiled = False
    objective = SimpleNamespace(trained=())
    randomness = contextlib.nullcontext

    def __init__(self, sin: str | None = None) -> None:
        self.counter, self.done, self.sin, self.told = torch.zeros(2, dtype=torch.int64), 0, sin, 0
        self.on_streams: list[bool] = []
        self.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])

    def __call__(self) -> None:
        if FakeGraph.captured:  # type: ignore[attr-defined]
            if FakeGraph.fails is not None:
                raise FakeGraph.fails
            return
        self.on_streams.append(has_streams(ON_GPU))
        if self.sin:
            Sins(self.sin)(torch.ones(2))
        self.done += 1

    def compile(self) -> None:
        self.compiled = True

    def replayed(self) -> None:
        self.told += 1


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize(("ranks", "warm_up"), [(1, WARM_UP), (2, 11)])
def test_every_step_of_a_graphed_run_counts_once(ranks: int, warm_up: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "size", lambda: ranks)
    monkeypatch.setattr(distributed, "anywhere", lambda flag, _: flag)
    step: Any = Counting()
    FakeGraph.step = step
    advance: Any = runner(step, nn.Module(), "graph")
    for expected in range(1, warm_up + 5):
        advance()
        assert step.done == expected
    assert advance.graph.replays == step.told == 4
    # In the last step before the capture the teacher runs on its own stream, as in the graph.
    assert step.on_streams[:warm_up] == [False] * (warm_up - 1) + [True]


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("sin", [None, "item", "dropout"])
def test_every_step_of_a_compiled_graph_counts_once(sin: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the capture refuses operations that wait for the device."""
    drawn = sin == "dropout"
    step: Any = Counting(sin)
    FakeGraph.step = step
    advance: Any = runner(step, nn.Module(), "compiled_graph")
    assert step.compiled and (step.execution, step.why) == ("compiled CUDA graph", "as set")
    told = pytest.raises(KernelError, match="draws random numbers itself")
    with told if drawn else contextlib.nullcontext():
        for expected in range(1, WARM_UP + 5):
            advance()
            assert step.done == expected
    if not drawn:
        assert advance.graph.replays == 4 and step.on_streams[:WARM_UP] == [False] * WARM_UP
    monkeypatch.setattr(distributed, "size", lambda: 2)
    with pytest.raises(FastdistillError, match=r"'compiled_graph': there are 2 ranks, .*; use 'compiled'"):
        runner(step, nn.Module(), "compiled_graph")


@pytest.mark.usefixtures("fake_cuda")
def test_no_rank_replays_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [False, True, True, True]  # last first: failed on a rank; out of memory; again; success
    monkeypatch.setattr(distributed, "anywhere", lambda *_: answers.pop())
    step: Any = Counting()
    advance = runner(step, nn.Module(), "auto")
    for _ in range(WARM_UP):
        advance()
    with pytest.raises(FastdistillError, match=r"step: out of memory .* another rank could not"):
        advance()
    step = Counting()
    advance = runner(step, nn.Module(), "auto")
    with pytest.warns(UserWarning, match="in a CUDA graph: another rank could not; going on compiled"):
        for _ in range(WARM_UP + 1):
            advance()
    assert step.compiled and step.done == WARM_UP + 1


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("sin", ["dropout", "random"])  # noticed in the step and after it
def test_a_student_that_draws_random_numbers_runs_eagerly_and_every_step_counts_once(sin: str) -> None:
    step: Any = Counting(sin)
    advance = runner(step, nn.Module(), "auto")
    with pytest.warns(UserWarning, match=r"random.*; going on eagerly, without a graph"):
        for _ in range(WARM_UP + 4):
            advance()
    assert step.done == WARM_UP + 4 and not step.compiled


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("cause", ["sin", "capture"])
def test_what_cannot_be_captured_is_named_and_compiled(cause: str) -> None:
    def make() -> Any:
        return Counting("item" if cause == "sin" else None)

    FakeGraph.fails = RuntimeError("operation not permitted when stream is capturing\nand more")
    message = "got a value read on the host" if cause == "sin" else "CUDA graph: operation not permitted when stream is"
    step = make()
    advance = runner(step, nn.Module(), "graph")
    with pytest.raises(KernelError, match=message):
        for _ in range(WARM_UP + 1):
            advance()
    step = make()
    advance = runner(step, nn.Module(), "auto")
    with pytest.warns(UserWarning, match=f"{message}.*going on compiled, without a graph"):
        for _ in range(WARM_UP + 4):
            advance()
    assert step.done == WARM_UP + 4 and step.compiled


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("execution", ["graph", "auto"])
@pytest.mark.parametrize(
    ("cause", "kind", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            FastdistillError,
            "step: out of memory .* graph: CUDA out",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
            FastdistillError,
            "step: out of memory .* graph: CUDA",
        ),
        (
            DeviceError("x: CUDA error: an illegal memory access was encountered"),
            DeviceError,
            "x: CUDA error: an illegal",
        ),
    ],
    ids=["memory", "workspace", "device"],
)
def test_what_compiling_does_not_help_ends_the_run(
    cause: RuntimeError, kind: type[Exception], message: str, execution: Any
) -> None:
    FakeGraph.fails = cause
    step: Any = Counting()
    advance = runner(step, nn.Module(), execution)
    for _ in range(WARM_UP):
        advance()
    with pytest.raises(kind, match=message) as raised:
        advance()
    assert not isinstance(raised.value, KernelError) and not step.compiled
    assert cause in (raised.value, raised.value.__cause__)
