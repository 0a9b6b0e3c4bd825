# SPDX-License-Identifier: Apache-2.0
"""attention: values by every backend, which one is chosen and when, and the file that keeps what was measured."""

from __future__ import annotations

import importlib
import json
import os
import pwd
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
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

module = importlib.import_module("fastdistill.ops.attention")
table = importlib.import_module("fastdistill.ops.attention.table")
backends = importlib.import_module("fastdistill.ops.attention.backends")
KERNELS = kernels_of("attention")
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FASTDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(module.VARIABLE, raising=False)
    yield tmp_path / "cache" / "attention.json"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The measurements that were made: (shape, backward, candidates)."""
    made: list[tuple[Any, ...]] = []
    measure = module.measure

    def counted(q: Tensor, k: Tensor, v: Tensor, scale: float, backward: bool, names: list[str]) -> dict[str, Any]:
        made.append((tuple(q.shape), backward, names))
        result: dict[str, Any] = measure(q, k, v, scale, backward, names)
        return result

    monkeypatch.setattr(module, "measure", counted)
    return made


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
    check_values(Case("attention", inputs(D=D, dtype=dtype), lambda *t: (attention(*t),), eager, eager), kernel)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_chosen_one_is_measured_once(dtype: torch.dtype, measured: list[Any], cache: Path) -> None:
    """The same values, by whichever is ahead; kept for other processes, told apart by shape and direction."""
    tensors = inputs(dtype=dtype)
    state = torch.get_rng_state()
    for _ in range(2):
        out = attention(*tensors)
    assert torch.equal(torch.get_rng_state(), state)
    assert_alike(out, eager(*tensors)[0], eager(*(t.double() for t in tensors))[0])
    assert measured == [((2, 33, 2, 16), True, backends.candidates("cpu"))]
    (call,) = json.loads(cache.read_text())["calls"].values()
    assert call["backend"] == min(call["ms"], key=call["ms"].get) and set(call["ms"]) == {"flash", "math"}
    table._read = None  # as in a new process
    attention(*tensors)
    assert len(measured) == 1
    with torch.no_grad():
        attention(*tensors)
    attention(*inputs(N=34, dtype=dtype))
    assert [backward for _, backward, _ in measured] == [True, False, True]
    assert len(json.loads(cache.read_text())["calls"]) == 3


def test_a_wrong_backend_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that raises, nor one whose gradient alone is wrong, nor one that is NaN; if all are, the reference."""

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
    """Backwards that are not deterministic are no candidates; a claim that does not hold is found."""
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
    """Torch's flash and efficient backwards are deterministic in its strict mode alone, cuDNN's and xformers' never."""

    def deterministic() -> list[str]:
        return [name for name, b in backends.BACKENDS.items() if "cuda" in b.devices and b.deterministic("cuda")]

    try:
        torch.use_deterministic_algorithms(True)
        assert deterministic() == ["flash", "efficient", "math", "fa3"]
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert deterministic() == ["math", "fa3"]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("reentrant", [False, True])
def test_measured_inside_of_a_checkpoint(reentrant: bool, measured: list[Any]) -> None:
    """What the measurement saves for its own backwards is nothing that a recomputation would have to save again."""
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
    """The next fastest takes its calls, with one warning; other errors are the caller's, and a dead device has its
    own."""
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
    """Where the shapes are fixed, among torch's own; the table is read while the call is traced."""
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
    """Argument before ``ops.use`` before the environment; kernels of other ops leave the choice alone."""
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


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 1}', '{"schema": 1, "calls": {"x": {}}}', "\x00\xff"])
def test_a_damaged_file_is_named_once_and_written_again(content: str, cache: Path, measured: list[Any]) -> None:
    cache.parent.mkdir()
    cache.write_bytes(content.encode("latin-1"))
    table._read = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attention(*inputs())
        attention(*inputs(N=5))
    named = [str(w.message) for w in caught if "attention.json" in str(w.message)]
    assert len(named) == 1 and "not a table of attention backends" in named[0]
    assert len(measured) == 2 and len(json.loads(cache.read_text())["calls"]) == 2


def test_another_process_is_not_forgotten(cache: Path) -> None:
    attention(*inputs())
    held = json.loads(cache.read_text())
    held["calls"]["another"] = {"backend": "math", "ms": {"math": 1.0}, "refused": {}}
    cache.write_text(json.dumps(held))
    attention(*inputs(N=7))
    assert set(json.loads(cache.read_text())["calls"]) > set(held["calls"]) and len(held["calls"]) == 2
    assert [p.name for p in cache.parent.iterdir()] == ["attention.json"]


@pytest.mark.parametrize("place", ["file", "read-only", "no home", "no entry"])
def test_a_cache_that_cannot_be_written_has_a_stand_in(
    place: str, cache: Path, tmp_path: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in its place; a disk that can only be read, as in a container; a user that is only a number."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(table, "_warned", set())
    if place == "file":
        cache.parent.write_text("")
    elif place == "read-only":
        kept = {"schema": 1, "calls": {"of the image": {"backend": "math", "ms": {}}}}
        cache.parent.mkdir()
        cache.write_text(json.dumps(kept))
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: path != cache.parent and access(path, mode))
    else:
        monkeypatch.delenv("FASTDISTILL_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", "/proc/no/home")
        if place == "no entry":
            monkeypatch.delenv("HOME")
            monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    table._read = None
    with pytest.warns(UserWarning, match=rf"the measured attention backends are kept in {tmp_path}/temporary") as told:
        for n in (5, 6, 5):
            attention(*inputs(N=n))
    assert len(measured) == 2 and len(told) == 1
    held = json.loads(table.path().read_text())["calls"]
    assert table.path().parent.stat().st_mode & 0o777 == 0o700
    assert ("of the image" in held) == (place == "read-only") and len(held) == 2 + (place == "read-only")
    table._read = None  # as in a new process
    attention(*inputs(N=5))
    assert len(measured) == 2


def test_no_place_at_all(cache: Path, tmp_path: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor among the temporary files, where the folder is another user's: what was measured is kept in memory."""
    cache.parent.write_text("")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(table, "_warned", set())
    owner = os.getuid()
    monkeypatch.setattr(table.os, "getuid", lambda: owner + 1)
    with pytest.warns(UserWarning, match="backends are not kept: .*expected a directory of this user's") as told:
        for _ in range(2):
            attention(*inputs())
            attention(*inputs(N=6))
    assert len(measured) == 2 and len(told) == 1
    table._read = None
    assert table.found("of another user") is None


def test_threads_measure_one_after_the_other(measured: list[Any], cache: Path) -> None:
    """Together they would disturb each other's times; and what one has measured the others take."""
    tensors = inputs()
    threads = [threading.Thread(target=lambda: attention(*tensors)) for _ in range(4)]
    filters = list(warnings.filters)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(measured) == 1 and len(json.loads(cache.read_text())["calls"]) == 1
    assert warnings.filters == filters


def test_the_switches_of_torch_are_as_before_when_two_threads_have_set_them() -> None:
    """They belong to the process: blocks that overlap would leave those of the second for good."""
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
                        left.wait(0.3)  # for nothing where calls take turns
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
    """It is called without torch's switches; same inputs, same operator, same bits."""
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


@pytest.mark.filterwarnings("ignore")  # of the tracer: shapes become constants, and it is no longer developed
def test_a_tracer_measures_nothing() -> None:
    q = torch.linspace(-1, 1, 64).view(1, 4, 2, 8)
    traced = torch.jit.trace(lambda q: attention(q, q, q), q, check_trace=False)
    assert torch.equal(traced(2 * q), attention(2 * q, 2 * q, 2 * q, backend="default"))
