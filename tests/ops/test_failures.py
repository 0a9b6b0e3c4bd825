# SPDX-License-Identifier: Apache-2.0
"""A kernel that cannot be compiled, loaded or launched: which kernel gets the call, the warning, and what raises."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from fastdistill.errors import DeviceError, FastdistillError, InputError, KernelError
from fastdistill.ops import OPS, _failures, _native, _triton, cross_attention, geglu, trials, use
from fastdistill.ops._dispatch import Kernel, Op, later
from fastdistill.ops.adamw_ema import triton as adamw
from tests.gpu.work import adamw_ema_work

UNCOMPILABLE = CompilationError(
    "def k(x):\n    x + nothing\n", ast.parse("\nx + nothing").body[0], "nothing is not defined"
)
REASON = "CompilationError: at 2:0: nothing is not defined"


class Planted:
    """An op y = 2 x with a kernel that raises and counts its calls."""

    def __init__(self, error: Exception, device: str = "cpu") -> None:
        self.tried, self.error = 0, error
        kernels = [Kernel("triton", device, self.launch, lambda: None), Kernel("cpp", device, double, lambda: None)]
        self.op = Op("planted", "", double, kernels)

    def launch(self, x: Tensor, y: Tensor) -> None:
        self.tried += 1
        raise self.error

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        x = torch.ones(shape, dtype=dtype)
        y = torch.zeros_like(x)
        self.op.run(device, x, y)
        assert torch.equal(y, 2 * x)


def double(x: Tensor, y: Tensor) -> None:
    y.copy_(2 * x)


@pytest.mark.parametrize(
    "error",
    [
        UNCOMPILABLE,
        OutOfResources(300_000, 232_448, "shared memory"),
        PTXASError("Internal Triton PTX codegen error"),
        RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
        RuntimeError("Triton Error [CUDA]: too many resources requested for launch"),
        RuntimeError("planted: CUDA error: no kernel image is available for execution on the device"),
        ImportError("fastdistill.ops.planted.triton does not load"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_was_not_executed_goes_to_the_next_kernel(error: Exception) -> None:
    planted = Planted(error)
    with pytest.warns(UserWarning, match=r"planted: kernel 'triton' cannot run on cpu; .* go to 'cpp'") as told:
        for _ in range(3):
            planted(2, 3)
    assert str(error).splitlines()[0] in str(told[0].message)
    assert len(told) == planted.tried == 1 and planted.op.calls == {"cpp": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # there is one warning per kernel
        planted(4, 3)
        planted(4, 3, dtype=torch.float16)
        planted(4, 3)
    assert planted.tried == 3 and len(planted.op.failures) == 3


def test_a_kernel_that_is_asked_for_raises_its_reason() -> None:
    planted = Planted(UNCOMPILABLE)
    message = f"planted: kernel 'triton' cannot run this call on cpu: {REASON}$"
    with use("triton"), pytest.raises(KernelError, match=message) as raised:
        planted(2)
    assert raised.value.__cause__ is UNCOMPILABLE and not planted.op.failures
    with pytest.warns(UserWarning, match=REASON):
        planted(2)
    with use("triton"), pytest.raises(KernelError, match=message):
        planted(2)
    assert planted.tried == 2


@pytest.mark.parametrize(
    "error",
    [
        ValueError("of the launch itself"),
        InputError("x: expected a rule, got a value"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("planted: CUDA error: invalid configuration argument"),  # possibly after other launches
        RuntimeError("planted: CUDA error: operation failed due to a previous error during capture"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_are_raised_as_they_are(error: Exception) -> None:
    planted = Planted(error)
    for kernel in (None, "triton"):
        with use(kernel), pytest.raises(type(error)) as raised:
            planted(2)
        assert raised.value is error
    assert not planted.op.failures and planted.tried == 2


@pytest.mark.parametrize(
    "text", ["Triton Error [CUDA]: an illegal memory access was encountered", "CUDA error: misaligned address"]
)
def test_an_error_of_the_device_names_the_op_and_goes_nowhere(text: str) -> None:
    planted = Planted(RuntimeError(text))
    with pytest.raises(DeviceError, match=r"planted: kernel 'triton' met an error of this call or an earlier one"):
        planted(2)
    assert not planted.op.calls and not planted.op.failures


def test_nothing_changes_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    planted, capturing = Planted(UNCOMPILABLE, "cuda"), True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    with pytest.raises(CompilationError) as raised:
        planted(2, device="cuda")
    assert raised.value is UNCOMPILABLE and not planted.op.failures
    capturing = False
    with pytest.warns(UserWarning, match=REASON):
        planted(2, device="cuda")
    capturing = True
    planted(2, device="cuda")
    assert planted.tried == 2


def test_a_compile_error_of_triton_itself() -> None:
    """Errors of any type, raised in a frame of Triton or in one that its compiler has called."""

    def compiler() -> None:
        raise OSError("cc: not found")

    scope: dict[str, Any] = {"__name__": "triton.runtime.build", "compiler": compiler}
    exec("def build(*args):\n    compiler()\n", scope)
    for launch, expected in ((scope["build"], "OSError: cc: not found"), (compiler, None)):
        with pytest.raises(OSError, match="cc: not found") as raised:
            launch()
        assert _failures.reason(raised.value) == expected


def test_a_module_that_does_not_load() -> None:
    planted = Planted(UNCOMPILABLE)
    absent = later("fastdistill.ops.absent", "launch")
    planted.op.kernels = [Kernel("triton", "cpu", absent, lambda: None, absent)]
    planted(2)
    with use("triton"), pytest.raises(KernelError, match=r"fastdistill.ops.absent does not load: No module named"):
        planted(2)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Add a kernel that cannot be compiled before the other kernels of an op."""

    def plant(op: str, device: str) -> None:
        def launch(*args: Any) -> None:
            raise UNCOMPILABLE

        monkeypatch.setattr(OPS[op], "kernels", [Kernel("triton", device, launch, lambda: None), *OPS[op].kernels])
        monkeypatch.setattr(OPS[op], "failures", {})

    return plant


def test_calls_past_the_dispatcher(broken: Callable[[str, str], None]) -> None:
    x = torch.linspace(-1, 1, 16).view(2, 8).requires_grad_()
    expected = torch.autograd.grad(geglu(x).sum(), x)[0]
    broken("geglu", "cpu")
    broken("geglu_backward", "cpu")
    with pytest.warns(UserWarning, match=REASON) as told:
        found = [torch.autograd.grad(geglu(x).sum(), x)[0] for _ in range(3)]
    assert all(torch.equal(gradient, expected) for gradient in found)
    assert [str(w.message).split(":")[0] for w in told] == ["geglu", "geglu_backward"]


def test_what_writes_over_its_inputs_is_compiled_whole_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, if a second kernel cannot be compiled, the first one has already done half of a step."""
    work = adamw_ema_work("cpu")
    with use("reference"):
        before = [t.clone() for t in work.state]
        expected = work.step()
    for t, value in zip(work.state, before, strict=True):
        t.copy_(value)

    class Uncompilable:
        def warmup(self, *args: Any, **kwargs: Any) -> None:
            raise UNCOMPILABLE

        def __getitem__(self, grid: Any) -> None:
            raise UNCOMPILABLE

    monkeypatch.setattr(adamw, "_adamw_ema_update", Uncompilable())
    monkeypatch.setattr(OPS["grad_square_sum"], "kernels", [])
    monkeypatch.setattr(OPS["adamw_ema"], "kernels", [Kernel("triton", "cpu", adamw.adamw_ema, lambda: None)])
    monkeypatch.setattr(OPS["adamw_ema"], "failures", {})
    with pytest.warns(UserWarning, match=f"adamw_ema: kernel 'triton' .* go to 'reference': {REASON}"):
        found = work.step()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_launches_are_compiled_first_where_they_write_over_their_inputs() -> None:
    done: list[str] = []

    class Fake:
        def __init__(self, name: str) -> None:
            self.name = name

        def warmup(self, *args: Any, grid: Any, **options: Any) -> Fake:
            done.append(f"compile {self.name}")
            return self

        @property
        def run(self) -> None:
            done.append(f"load {self.name}")

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **options: done.append(f"launch {self.name}")

    launches: list[_triton.Launch] = [(Fake(name), (1,), (), {}) for name in "ab"]
    _triton.launch_all(launches, in_place=True)
    assert done == ["compile a", "load a", "compile b", "load b", "launch a", "launch b"]
    done.clear()
    _triton.launch_all(launches, in_place=False)
    _triton.launch_all(launches[:1], in_place=True)  # it either runs completely or raises
    assert done == ["launch a", "launch b", "launch a"]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_launch_that_fails_after_others_is_told_apart_where_they_wrote_over_inputs(in_place: bool) -> None:
    class Fake:
        def __init__(self, error: Exception | None) -> None:
            self.error = error

        def warmup(self, *args: Any, **options: Any) -> None: ...

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def run(*args: Any, **options: Any) -> None:
                if self.error is not None:
                    raise self.error

            return run

    error = RuntimeError("Triton Error [CUDA]: invalid argument")
    with pytest.raises(FastdistillError if in_place else RuntimeError, match="invalid argument") as raised:
        _triton.launch_all([(Fake(None), (1,), (), {}), (Fake(error), (1,), (), {})], in_place=in_place)
    assert (_failures.reason(raised.value) is None) == in_place


def test_cross_attention_goes_to_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """For head dims and numbers of keys for which a forward or backward kernel cannot be compiled."""
    monkeypatch.setattr(_native, "triton_reason", lambda: None)
    q, k = torch.empty(2, 9, 1, 16), torch.empty(2, 3, 1, 16)
    monkeypatch.setattr(OPS["cross_attention"], "failures", {})
    monkeypatch.setattr(OPS["cross_attention_backward"], "failures", {("triton", _failures.kind([q, k, k])): REASON})
    calls = OPS["cross_attention"].calls
    with FakeTensorMode():
        for dim, expected in ((16, 1), (24, 0)):
            q, k = torch.empty(4, 5, 1, dim, device="cuda"), torch.empty(4, 3, 1, dim, device="cuda")
            before = calls["reference"]
            cross_attention(q, k, k)
            assert calls["reference"] - before == expected


def test_the_doctor_names_what_does_not_run(
    broken: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor = pytest.importorskip("fastdistill.doctor")  # it prints by rich
    for op in OPS.values():  # without the emulated ones
        own = [kernel for kernel in op.kernels if kernel.device != "cpu" or kernel.name not in ("triton", "cuda")]
        monkeypatch.setattr(op, "kernels", own)
    broken("geglu_backward", "cpu")
    counted = OPS["geglu"].calls.copy()
    found = trials.failures("cpu")
    message = f"geglu_backward: kernel 'triton' cannot run this call on cpu: {REASON}"
    assert found == {("geglu_backward", "triton"): message}
    assert OPS["geglu"].calls == counted and not OPS["geglu_backward"].failures
    rows = doctor.examine(try_kernels=True)["kernels"]
    assert next(row["reason"] for row in rows if row["op"] == "geglu_backward") == message
    with pytest.warns(UserWarning, match=REASON):
        geglu(torch.ones(2, 4, requires_grad=True)).sum().backward()
    (failure,) = doctor.examine()["failures"]
    call = "float32[2, 2], float32[2, 4], float32[2, 4], ()"
    assert failure == {"op": "geglu_backward", "kernel": "triton", "call": call, "reason": REASON}
    doctor.doctor(doctor.Console())
    assert f"geglu_backward, triton, {call}: {REASON}" in capsys.readouterr().out


def test_the_doctor_stops_where_the_device_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*args: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    for op in OPS.values():
        monkeypatch.setattr(op, "kernels", [Kernel("cuda", "cpu", launch, lambda: None)])
    assert len(trials.failures("cpu")) == 1

    def calls() -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    monkeypatch.setattr(trials, "_calls", calls)
    assert trials.failures("cpu").keys() == {(name, "cuda") for name in OPS}
