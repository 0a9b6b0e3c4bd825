# SPDX-License-Identifier: Apache-2.0
"""``check_op``: everything an op's kernel must satisfy, for any kernel that the op registers.

A ``Case`` says how to call the op's public function, what it should return in float64 (written independently), and what
a user's eager code of the same precision returns. The rule for floats: error against float64 at most 2x (gradients 3x)
that of the same-precision eager code, or 4 eps of the largest magnitude (for sums eps sqrt(n) of the sum of the terms'
magnitudes), whichever is larger. Integers are equal.

``kernels_of`` names each kernel with the device to test it on: on a CPU emulated where it is for a GPU, and where there
is a GPU on that. Tests of a parameter ``kernel`` then make all their tensors there (``tests/conftest.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from fastdistill.ops import OPS, use
from fastdistill.ops._dispatch import REFERENCE

#: What depends on the clock in a line of metrics.
TIMED = ("seconds", "waited_data", "waited_checkpoint")
EPS, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps


def untimed(history: Iterable[dict[str, float]]) -> list[dict[str, float]]:
    """Lines of metrics, without what depends on the clock."""
    return [{name: value for name, value in line.items() if name not in TIMED} for line in history]


@dataclass(frozen=True)
class Case:
    """One call of one op.

    ``call``, ``truth`` and ``eager`` take ``inputs`` and return a tuple of tensors of the same shapes; inputs that
    require gradient are differentiated. ``sums`` and ``gradient_sums`` give, for outputs and gradients that are sums,
    (number of terms, sum of the terms' magnitudes).
    """

    op: str
    inputs: tuple[Any, ...]
    call: Callable[..., tuple[Tensor, ...]]
    truth: Callable[..., tuple[Tensor, ...]]
    eager: Callable[..., tuple[Tensor, ...]]
    sums: dict[int, tuple[int, float]] = field(default_factory=dict)
    gradient_sums: dict[int, tuple[int, float]] = field(default_factory=dict)
    cotangent: float = 1.75


def crossed(names: str, *axes: Iterable[Any]) -> pytest.MarkDecorator:
    """All combinations as parameters of a test. Those that differ from the first of every axis in more than one place
    are slow: the quick tests have each value once."""
    values = [list(axis) for axis in axes]
    return pytest.mark.parametrize(
        names,
        [
            pytest.param(
                *(axis[i] for axis, i in zip(values, at, strict=True)),
                id="-".join(str(axis[i]) for axis, i in zip(values, at, strict=True)),
                marks=pytest.mark.slow if sum(i > 0 for i in at) > 1 else (),
            )
            for at in itertools.product(*(range(len(axis)) for axis in values))
        ],
    )


class On(str):
    """The name of a kernel, with the type of device on which it is tested."""

    device: str

    def __new__(cls, name: str, device: str) -> On:
        self = super().__new__(cls, name)
        self.device = device
        return self


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


#: Kernels that take some calls of an op alone: its own tests make those.
PARTIAL = {("group_norm_silu", "cuda"), ("cross_attention", "cuda")}


def kernels_of(op: str, devices: Sequence[str] = DEVICES) -> list[str]:
    """The kernels of an op that can run here and take any of its calls, the reference first on each device."""
    return [
        On(name, device)
        for device in devices
        for name in (REFERENCE, *_available(op, device))
        if (op, name) not in PARTIAL
    ]


def partial_kernels_of(op: str, devices: Sequence[str] = DEVICES) -> list[str]:
    """Those that can run here and take some calls alone."""
    return [On(name, d) for d in devices for name in _available(op, d) if (op, name) in PARTIAL]


def _available(op: str, device: str) -> list[str]:
    return [k.name for k in OPS[op].kernels if k.device == device and k.available() is None]


def device_of(kernel: object) -> str:
    """Where a kernel is tested: a name alone means the CPU."""
    return getattr(kernel, "device", "cpu")


def generator(seed: int) -> torch.Generator:
    """Random numbers for the tensors of a test, on the device where it makes them."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def emulated(kernel: str) -> bool:
    """Whether a kernel for a GPU is emulated here, a few milliseconds a block: its tests take small sizes."""
    return kernel in ("triton", "cuda") and device_of(kernel) == "cpu"


def large(kernels: Sequence[str]) -> list[Any]:
    """Kernels as parameters of a test of large sizes, which is slow where Triton's are interpreted."""
    return [
        pytest.param(kernel, marks=pytest.mark.slow if kernel == "triton" and emulated(kernel) else ())
        for kernel in kernels
    ]


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside, ``torch.empty`` and its kin come filled with NaN (integers with their maximum)."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def detached(tree: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy with leaves of their own (requires_grad kept), floats optionally in another dtype, strides kept."""

    def leaf(t: Tensor) -> Tensor:
        room = 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        twin = torch.empty(room, dtype=t.dtype, device=t.device).as_strided(t.shape, t.stride())
        with torch.no_grad():
            twin.copy_(t)
        return (twin if dtype is None or not t.is_floating_point() else twin.to(dtype)).requires_grad_(t.requires_grad)

    return tree_map_only(Tensor, leaf, tree)


def on(device: str, tree: Any) -> Any:
    """A copy on a device, with leaves of their own; strides kept."""
    return detached(tree_map_only(Tensor, lambda t: t.detach().to(device).requires_grad_(t.requires_grad), tree))


def leaves(tree: Any) -> list[Tensor]:
    return [t for t in tree_flatten(tree)[0] if isinstance(t, Tensor) and t.requires_grad]


def evaluate(
    function: Callable[..., Any], inputs: tuple[Any, ...], cotangent: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of ``cotangent`` times the sum of the differentiable ones."""
    outputs = list(function(*inputs))
    wrt = leaves(inputs)
    differentiable = [o for o in outputs if o.requires_grad]
    if not (wrt and differentiable):
        return outputs, []
    gradients = torch.autograd.grad(differentiable, wrt, [torch.full_like(o, cotangent) for o in differentiable])
    return [o.detach() for o in outputs], list(gradients)


def nudged(value: Tensor, eps: float = EPS) -> Tensor:
    """The same where each element differs by up to 4 eps of itself, by torch's generator: what float numbers of a
    computation cannot tell. How far a result moves by it is its condition."""
    return value * (1 + 4 * eps * (2 * torch.rand_like(value) - 1))


def assert_close(
    name: str,
    got: Tensor,
    truth: Tensor,
    eager: Tensor,
    factor: float,
    terms: tuple[int, float] | None = None,
    moved: Tensor | None = None,
) -> None:
    """The rule of equality; see the head of this file. ``moved``: the truth of inputs that are ``nudged``; what it is
    off by is allowed too."""
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, should be {tuple(truth.shape)}"
    if not got.is_floating_point():
        assert torch.equal(got, truth), f"{name}: integers differ at {(got != truth).nonzero()[:4].tolist()}"
        return
    if got.numel() == 0:
        return
    assert got.isfinite().all(), f"{name}: {(~got.isfinite()).sum()} of {got.numel()} not finite"
    eps = torch.finfo(got.dtype).eps
    error = (got.double() - truth).abs().max().item()
    eager_error = (eager.double() - truth).abs().max().item()
    floor = 4 * eps * truth.abs().max().item()
    if terms is not None:
        floor = max(floor, eps * math.sqrt(terms[0]) * terms[1])
    if moved is not None:
        floor = max(floor, (moved - truth).abs().max().item())
    bound = max(factor * eager_error, floor)
    assert error <= bound, f"{name}: error {error:.3e} against float64, allowed {bound:.3e} (eager {eager_error:.3e})"


def assert_alike(
    got: Any, eager: Any, truth: Any, factor: float = 2.0, name: str = "result", moved: Any = None
) -> None:
    """The rule of equality for trees of tensors: ``got`` is as near to ``truth`` (float64) as ``eager``, the same
    computation in the same precision by other means, times ``factor``, or as ``moved`` (see ``assert_close``)."""
    leaves_of = [tree_flatten(tree)[0] for tree in (got, truth, eager, truth if moved is None else moved)]
    assert len({len(some) for some in leaves_of}) == 1, f"{name}: {[len(some) for some in leaves_of]} tensors"
    for i, leaves in enumerate(zip(*leaves_of, strict=True)):
        one, exact, other, near = (leaf.detach() for leaf in leaves)
        assert_close(f"{name} {i}", one, exact, other, factor, moved=near)


def check_values(case: Case, kernel: str, repeat: bool = True) -> None:
    with use(kernel), poisoned_empty():
        outputs, gradients = evaluate(case.call, detached(case.inputs), case.cotangent)
        again, gradients_again = outputs, gradients
        if repeat:
            again, gradients_again = evaluate(case.call, detached(case.inputs), case.cotangent)
    with torch.device("cpu"):
        exact = detached(on("cpu", case.inputs), torch.float64)
        truth, true_gradients = evaluate(case.truth, exact, case.cotangent)
        eager, eager_gradients = evaluate(case.eager, on("cpu", case.inputs), case.cotangent)
    assert all(t.device.type == device_of(kernel) for t in [*outputs, *gradients])
    assert len(outputs) == len(truth) == len(eager)
    for i, triple in enumerate(zip(outputs, truth, eager, strict=True)):
        assert_close(f"{case.op}[{kernel}] output {i}", *map(Tensor.cpu, triple), factor=2.0, terms=case.sums.get(i))
    for i, triple in enumerate(zip(gradients, true_gradients, eager_gradients, strict=True)):
        terms = case.gradient_sums.get(i)
        assert_close(f"{case.op}[{kernel}] gradient {i}", *map(Tensor.cpu, triple), factor=3.0, terms=terms)
    for one, two in zip([*outputs, *gradients], [*again, *gradients_again], strict=True):
        assert torch.equal(one, two), f"{case.op}[{kernel}]: two runs differ"


def compiles(kernel: str) -> bool:
    """Whether an op is compiled with a kernel in the tests: a compiler sees the op and never its kernel, so the
    reference will do, and those of a real GPU, where memory and streams matter."""
    return kernel == REFERENCE or device_of(kernel) == "cuda"


class _Recorder(TorchDispatchMode):
    """Keeps the arguments of every call of this library's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastdistill":
            self.calls.append((func, tree_map_only(Tensor, lambda t: t.detach().clone(), args)))
        return func(*args, **(kwargs or {}))


def check_registration(case: Case, kernel: str) -> None:
    """torch.library.opcheck on every op that the call reaches, forward and backward; for other kernels than the
    reference the part that depends on them, what they write."""
    options = {} if compiles(kernel) else {"test_utils": "test_schema"}
    with use(str(kernel)):
        with _Recorder() as recorder:
            evaluate(case.call, detached(case.inputs), case.cotangent)
        assert recorder.calls, "the call reached no op"
        for func, args in recorder.calls:
            results = torch.library.opcheck(func, args, raise_exception=False, **options)
            failed = {test: result for test, result in results.items() if result != "SUCCESS"}
            assert not failed, f"{func}: {failed}"


def check_compiled(case: Case, kernel: str, backend: str = "aot_eager") -> None:
    """Compiled as one graph: the same bits as eager under ``aot_eager``, the rule of equality under inductor."""
    with use(str(kernel)):  # torch 2.11 compares no subclasses of str
        expected, gradients = evaluate(case.call, detached(case.inputs), case.cotangent)
        torch._dynamo.reset()
        compiled = torch.compile(case.call, fullgraph=True, backend=backend)
        got, got_gradients = evaluate(compiled, detached(case.inputs), case.cotangent)
    for one, two in zip([*got, *got_gradients], [*expected, *gradients], strict=True):
        if backend == "aot_eager":
            assert torch.equal(one, two), f"{case.op}[{kernel}]: compiled differs from eager"
        else:
            eps = torch.finfo(two.dtype).eps if two.is_floating_point() else 0.0
            torch.testing.assert_close(one, two, rtol=2 * eps, atol=2 * eps)


def check_fake(case: Case, device: str = "cpu") -> None:
    """Fake and meta tensors go through without touching memory, and give shapes, dtypes and strides as the real
    ones."""
    real, real_gradients = evaluate(case.call, detached(case.inputs), case.cotangent)
    meta = tree_map_only(Tensor, lambda t: t.detach().to("meta").requires_grad_(t.requires_grad), case.inputs)
    with FakeTensorMode():
        fake_inputs = tree_map_only(
            Tensor,
            lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device),
            case.inputs,
        )  # without gradient: fake CUDA tensors that carry one end a process that has no CUDA
        fake = list(case.call(*fake_inputs))
    outputs, gradients = evaluate(case.call, meta, case.cotangent)
    for r, m in zip([*real, *real_gradients], [*outputs, *gradients], strict=True):
        assert (r.shape, r.dtype, r.stride()) == (m.shape, m.dtype, m.stride())
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype) == (f.shape, f.dtype) and f.device.type == device


def check_op(case: Case, kernel: str, *, compiled: Sequence[str] = ("aot_eager",), registration: bool = True) -> None:
    """All of the above for one kernel on one case, whose inputs are brought to the kernel's device.

    What does not depend on the kernel is checked with the reference. Triton's interpreter runs programs in one order,
    so it repeats only where registration is checked.
    """
    if any(t.device.type != device_of(kernel) for t in tree_flatten(case.inputs)[0] if isinstance(t, Tensor)):
        case = dataclasses.replace(case, inputs=on(device_of(kernel), case.inputs))
    check_values(case, kernel, registration or not (kernel == "triton" and emulated(kernel)))
    if kernel == REFERENCE:
        check_fake(case, device_of(kernel))
    if registration:
        check_registration(case, kernel)
    for backend in compiled:
        if compiles(kernel) and (kernel == REFERENCE or backend != "inductor"):
            check_compiled(case, kernel, backend)


def layouts(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values in other memory: contiguous, channels_last, permuted, and a slice with gaps."""

    def like(view: Tensor) -> Tensor:
        return view.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)

    yield "contiguous", tensor
    if tensor.dim() == 4:
        yield "channels_last", like(torch.empty_like(tensor, memory_format=torch.channels_last).detach())
    if tensor.dim() >= 2:
        order = list(reversed(range(tensor.dim())))
        yield "permuted", like(torch.empty([tensor.shape[d] for d in order], dtype=tensor.dtype).permute(order))
        gaps = torch.empty((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), dtype=tensor.dtype)
        yield "sliced", like(gaps[..., : 2 * tensor.shape[-1] : 2])
