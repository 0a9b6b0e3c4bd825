# SPDX-License-Identifier: Apache-2.0
"""attention: the values of every backend, which backend is chosen, and when."""

from __future__ import annotations

import importlib
import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from fastdistill.errors import DeviceError, InputError, KernelError
from fastdistill.ops import attention, tune_attention, use
from fastdistill.ops._sdpa import sdpa
from fastdistill.train.guard import NoHostSync
from tests.harness import Case, assert_alike, check_values, device_of, generator, kernels_of
from tests.ops.test_cross_attention import terms

module = importlib.import_module("fastdistill.ops.attention")
table = importlib.import_module("fastdistill.ops.attention.table")
backends = importlib.import_module("fastdistill.ops.attention.backends")
KERNELS = kernels_of("attention")
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


pytestmark = pytest.mark.usefixtures("cache")


def eager(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    weights = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5).softmax(-1)
    return ((weights @ v.transpose(1, 2)).transpose(1, 2),)


def inputs(
    B: int = 2, N: int = 33, H: int = 2, D: int = 16, dtype: torch.dtype = torch.float32, gradient: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    g = generator(B * N * D)
    q, k, v = (torch.randn(B, N, H, D, generator=g).to(dtype).requires_grad_(gradient) for _ in range(3))
    return q, k, v


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("D", [8, 40])
def test_values(kernel: str, dtype: torch.dtype, D: int) -> None:
    if kernel in ("flash", "cudnn", "fa3") and device_of(kernel) == "cuda" and dtype == torch.float32:
        pytest.skip("for half precision")
    tensors, sums = inputs(D=D, dtype=dtype), {}
    if kernel in ("efficient", "xformers") and dtype == torch.float32:
        # On a GPU these backends compute a float32 product as three TF32 products. Their error is several roundings,
        # so the rounding error of eager code is no measure for it; the bound of a sum is used instead.
        sums = terms(*tensors, None, None, None)
    case = Case("attention", tensors, lambda *t: (attention(*t),), eager, eager, gradient_sums=sums)
    check_values(case, kernel)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_chosen_one_is_measured_once(dtype: torch.dtype, measured: list[Any], cache: Path) -> None:
    """The values are the same with the fastest backend; other processes read the choice; shape and direction are
    keys."""
    tensors = inputs(dtype=dtype)
    state = torch.get_rng_state()
    for _ in range(2):
        out = attention(*tensors)
    assert torch.equal(torch.get_rng_state(), state)
    assert_alike(out, eager(*tensors)[0], eager(*(t.double() for t in tensors))[0])
    assert measured == [((2, 33, 2, 16), True, backends.candidates("cpu"))]
    (call,) = json.loads(cache.read_text())["calls"].values()
    assert call["backend"] == min(call["ms"], key=call["ms"].get) and set(call["ms"]) == {"flash", "math"}
    table._read = None  # like a new process
    attention(*tensors)
    assert len(measured) == 1
    with torch.no_grad():
        attention(*tensors)
    attention(*inputs(N=34, dtype=dtype))
    assert [backward for _, backward, _ in measured] == [True, False, True]
    assert len(json.loads(cache.read_text())["calls"]) == 3


def test_a_wrong_backend_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that raises, nor one with a wrong gradient or NaN; if all are wrong, the reference is chosen."""

    def gradient(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return backends.default(q, k, v, scale) + 0.1 * (q - q.detach())

    def broken(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        raise RuntimeError("no such kernel\nand more")

    wrongs = {"flash": gradient, "math": broken}
    for name, run in wrongs.items():
        monkeypatch.setitem(backends.BACKENDS, name, backends.Backend(name, ("cpu",), run))
    result = tune_attention(1, 40, 1, 8, dtype=torch.float32, device="cpu")
    assert result["backend"] == "reference" and result["ms"] == {}
    assert result["refused"]["flash"].startswith("wrong: error") and "no such kernel" in result["refused"]["math"]
    assert tune_attention(1, 40, 1, 8, dtype=torch.float32, device="cpu", backward=False)["backend"] == "flash"
    nan = backends.Backend("flash", ("cpu",), lambda q, k, v, scale: q * torch.nan)
    monkeypatch.setitem(backends.BACKENDS, "flash", nan)
    result = tune_attention(1, 40, 1, 8, dtype=torch.float32, device="cpu", backward=False)
    assert result["refused"]["flash"].startswith("wrong: error nan")


def test_in_deterministic_mode(monkeypatch: pytest.MonkeyPatch, measured: list[Any]) -> None:
    """Backends with a nondeterministic backward are not candidates; a wrong claim of determinism is detected."""
    monkeypatch.setitem(
        backends.BACKENDS, "flash", backends.Backend("flash", ("cpu",), backends.default, deterministic=backends._never)
    )
    attention(*inputs())
    torch.use_deterministic_algorithms(True)
    try:
        attention(*inputs())
        assert [names for _, _, names in measured] == [["flash", "math"], ["math"]]
        calls = iter(range(10))

        def wavering(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(
                *(t.transpose(1, 2) for t in (q, k, v)), scale=scale
            ).transpose(1, 2) * (1 + next(calls) * 2**-22)

        monkeypatch.setitem(backends.BACKENDS, "math", backends.Backend("math", ("cpu",), wavering))
        refused = tune_attention(1, 20, 1, 8, dtype=torch.float32, device="cpu")["refused"]
        assert refused == {"math": "two runs differ, in deterministic mode"}
    finally:
        torch.use_deterministic_algorithms(False)


def test_on_a_gpu_in_deterministic_mode() -> None:
    """Torch's flash and efficient backwards are deterministic only in strict mode, cuDNN's and xformers' never."""

    def deterministic() -> list[str]:
        return [name for name, b in backends.BACKENDS.items() if "cuda" in b.devices and b.deterministic("cuda")]

    try:
        torch.use_deterministic_algorithms(True)
        assert deterministic() == ["flash", "efficient", "math", "fa3"]
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert deterministic() == ["math", "fa3"]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("library", "reason"),
    [
        ({"_cpp_library_load_exception": None, "_built_with_cuda": True}, None),
        ({}, None),  # from another version
        ({"_cpp_library_load_exception": None, "_built_with_cuda": False}, "xformers was built without CUDA"),
        (
            {"_cpp_library_load_exception": OSError("Cannot load. It was built for:\n    PyTorch 1\n  Reinstall")},
            "Cannot load. It was built for: PyTorch 1",
        ),
        (None, "xformers does not load: ModuleNotFoundError: import of xformers._cpp_lib halted; None in sys.modules"),
    ],
)
def test_an_xformers_without_its_kernels_is_no_candidate(
    library: dict[str, Any] | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "xformers._cpp_lib", None if library is None else SimpleNamespace(**library))
    monkeypatch.setattr(backends, "_installed", lambda module, device: None if module == "xformers" else "not here")
    backends._xformers_unbuilt.cache_clear()
    try:
        assert backends.BACKENDS["xformers"].available("cuda") == reason
        assert ("xformers" in backends.candidates("cuda")) == (reason is None)
    finally:
        backends._xformers_unbuilt.cache_clear()


@pytest.mark.parametrize("reentrant", [False, True])
def test_measured_inside_of_a_checkpoint(reentrant: bool, measured: list[Any]) -> None:
    """Tensors that the measurement saves for its own backward do not belong to the checkpoint's recomputation."""
    tensors = inputs()
    expected = torch.autograd.grad(attention(*tensors, backend="math").square().sum(), tensors)
    exact = tuple(t.detach().double().requires_grad_() for t in tensors)
    truth = torch.autograd.grad(eager(*exact)[0].square().sum(), exact)
    for _ in range(2):
        for t in tensors:
            t.grad = None
        checkpoint(attention, *tensors, use_reentrant=reentrant).square().sum().backward()
        assert_alike([t.grad for t in tensors], expected, truth, factor=3.0)
    assert [backward for _, backward, _ in measured] == ([False, True] if reentrant else [True])


def test_hooks_that_were_switched_off_stay_so(measured: list[Any]) -> None:
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        attention(*inputs())
        assert not torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    assert len(measured) == 1


def test_a_measured_backend_that_fails_later(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """The next fastest backend gets its calls, with one warning. Other errors are raised to the caller, and a dead
    device has its own error."""
    tensors = inputs()
    key = module._key(*module._kind(*tensors))
    table.remember(key, {"backend": "gone", "ms": {"gone": 1.0, "math": 2.0, "flash": 3.0}, "refused": {}})
    with pytest.warns(UserWarning, match="'gone' cannot run a call .* go to 'math': KernelError: .*no backend 'gone'"):
        out = attention(*tensors)
    assert_alike(out, eager(*tensors)[0], eager(*(t.double() for t in tensors))[0])
    assert json.loads(cache.read_text())["calls"][key]["backend"] == "math"
    for text, kind in (("some bug", RuntimeError), ("CUDA error: an illegal memory access", DeviceError)):

        def fails(*args: Any, text: str = text) -> Tensor:
            raise RuntimeError(text)

        monkeypatch.setitem(backends.BACKENDS, "math", backends.Backend("math", ("cpu",), fails))
        with pytest.raises(kind, match=text):
            attention(*tensors)
    with pytest.raises(DeviceError, match="'math', while it was measured: CUDA error"):
        attention(*inputs(N=7))


def test_never_measured_where_it_may_not_be(measured: list[Any]) -> None:
    tensors = inputs()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: attention(*t), fullgraph=True, backend="aot_eager")(*tensors)
    same = tensors, tuple(t.detach().double().requires_grad_() for t in tensors)
    outputs = [eager(*some)[0] for some in same]
    gradients = [torch.autograd.grad(out.sum(), some) for out, some in zip(outputs, same, strict=True)]
    assert_alike(torch.autograd.grad(compiled.sum(), tensors), *gradients, factor=3.0)
    assert_alike(compiled, *outputs)
    with FakeTensorMode():
        assert attention(*(torch.empty(2, 9, 2, 8) for _ in range(3))).shape == (2, 9, 2, 8)
    assert attention(*(t.detach().to("meta") for t in tensors)).shape == tensors[0].shape
    with NoHostSync():
        attention(*tensors)
    assert attention(*inputs(B=0)).shape == (0, 33, 2, 16)
    assert measured == []


def test_a_capture_takes_what_is_known(measured: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = module.OPS["attention"].calls
    monkeypatch.setattr(module, "_may_measure", lambda q, k: False)
    before = calls["default"]
    attention(*inputs())
    assert calls["default"] == before + 1
    backend = tune_attention(2, 33, 2, 16, dtype=torch.float32, device="cpu")["backend"]
    made, before = len(measured), calls[backend]
    attention(*inputs())
    assert calls[backend] == before + 1 and len(measured) == made


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_it_takes_what_is_known(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the shapes are fixed, among torch's backends; the table is read while the call is traced."""
    run, ran = module._run, []
    monkeypatch.setattr(module, "_run", lambda name, *rest: ran.append(name) or run(name, *rest))
    for ms, expected in (({"math": 1.0, "flash": 2.0}, "math"), ({"xformers": 1.0, "flash": 2.0}, "flash")):
        tensors = inputs()
        table.remember(module._key(*module._kind(*tensors)), {"backend": min(ms, key=ms.__getitem__), "ms": ms})
        torch._dynamo.reset()
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        assert_alike(compiled(*tensors), eager(*tensors)[0], eager(*(t.double() for t in tensors))[0])
        assert ran.pop() == ("default" if dynamic else expected)


def test_overrides(measured: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument has priority over ``ops.use``, and that over the environment; kernels of other ops have no
    effect."""
    calls = module.OPS["attention"].calls

    def by(expected: str, **options: Any) -> None:
        before = calls[expected]
        attention(*inputs(), **options)
        assert calls[expected] == before + 1

    by("math", backend="math")
    monkeypatch.setenv(module.VARIABLE, "math")
    by("math")
    with use("flash"):
        by("flash")
        by("reference", backend="reference")
    with use("triton"):
        by("math")
    monkeypatch.setenv(module.VARIABLE, "default")
    by("default")
    assert measured == []
    monkeypatch.setenv(module.VARIABLE, "fast")
    with pytest.raises(InputError, match=r"FASTDISTILL_ATTENTION: expected one of flash, .*, got 'fast'"):
        attention(*inputs())
    with pytest.raises(InputError, match="backend: expected one of"):
        attention(*inputs(), backend="fast")
    with pytest.raises(KernelError, match="backend 'cudnn' cannot run this call on cpu: it has none for cpu"):
        attention(*inputs(), backend="cudnn")


def test_the_switches_of_torch_are_as_before_when_two_threads_have_set_them() -> None:
    """The switches belong to the process: overlapping blocks would leave those of the second block set."""
    q, k, v = (t.transpose(1, 2) for t in inputs(gradient=False))
    inside, left = threading.Event(), threading.Event()
    order: list[str] = []

    def attend(name: str) -> None:
        class Slow(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func is torch.nn.functional.scaled_dot_product_attention:
                    order.append(f"{name} in")
                    if name == "first":
                        inside.set()
                        left.wait(0.3)  # waits in vain if calls take turns
                    order.append(f"{name} out")
                return func(*args, **(kwargs or {}))

        with Slow():
            sdpa(q, k, v, scale=1.0, backends=[SDPBackend.FLASH_ATTENTION])

    def second() -> None:
        inside.wait()
        attend("second")
        left.set()

    before = torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    threads = [threading.Thread(target=attend, args=("first",)), threading.Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order == ["first in", "first out", "second in", "second out"]
    assert (torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()) == before


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_operator_behind_the_math_backend(dtype: torch.dtype) -> None:
    """It is called without torch's switches; the same inputs and operator give the same bits."""
    tensors = [t.transpose(1, 2) for t in inputs(dtype=dtype)]
    ours = sdpa(*tensors, scale=0.3, backends=[SDPBackend.MATH])
    with sdpa_kernel(SDPBackend.MATH):
        theirs = torch.nn.functional.scaled_dot_product_attention(*tensors, scale=0.3)
    assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()
    for one, two in zip(*(torch.autograd.grad(out.sum(), tensors) for out in (ours, theirs)), strict=True):
        assert torch.equal(one, two)


def test_projections_as_they_come() -> None:
    q, k, v = inputs()
    got = attention(q.flatten(2), k.flatten(2), v.flatten(2), heads=2, backend="math")
    assert torch.equal(got, attention(q, k, v, backend="math").flatten(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 4)}, r"q: expected \[B, N, H, D\], got \(2, 4\)"),
        ({"q": torch.zeros(2, 9, 16)}, "heads: expected the number of heads"),
        ({"q": torch.zeros(2, 9, 15), "heads": 2}, r"q: expected \[B, tokens, a multiple of 2 heads\]"),
        ({"q": torch.zeros(2, 9, 2, 8).double()}, "q: expected dtype float32"),
        ({"heads": 3}, "heads: expected the 2 heads of q, or None, got 3"),
        ({"k": torch.zeros(1, 9, 2, 8)}, r"k: expected \[2, L, 2, 8\] beside q, got \(1, 9, 2, 8\)"),
        ({"v": torch.zeros(2, 8, 2, 8)}, "v: expected the shape of k"),
        ({"k": torch.zeros(2, 9, 2, 8).half()}, "k: expected dtype float32, got float16"),
        ({"v": torch.zeros(2, 9, 2, 8, device="meta")}, "v: expected the device of q"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        attention(**({name: torch.zeros(2, 9, 2, 8) for name in "qkv"} | changes))


@pytest.mark.filterwarnings("ignore")  # from the tracer, which is deprecated: shapes become constants
def test_a_tracer_measures_nothing() -> None:
    q = torch.linspace(-1, 1, 64).view(1, 4, 2, 8)
    traced = torch.jit.trace(lambda q: attention(q, q, q), q, check_trace=False)
    assert torch.equal(traced(2 * q), attention(2 * q, 2 * q, 2 * q, backend="default"))
