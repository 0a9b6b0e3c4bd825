# SPDX-License-Identifier: Apache-2.0
"""``check_op``: what every kernel of an op must satisfy.

A ``Case`` contains the call of the op's public function, the expected result in float64 (written independently), and
the result of a user's eager code in the same precision. The rule for floats: the error against float64 is at most 2x
(gradients 3x) that of the eager code in the same precision, or 4 eps of the largest magnitude (for sums eps sqrt(n) of
the sum of the terms' magnitudes), whichever is larger. Integers are equal.

``kernels_of`` gives each kernel with the device to test it on: without a GPU the CPU (GPU kernels are emulated), with a
GPU also that. Tests with a parameter ``kernel`` then create all their tensors there (``tests/conftest.py``).
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
    """All combinations as parameters of a test. Combinations that differ from the first value in more than one axis are
    slow tests, so the quick tests have each value once."""
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
    """The name of a kernel, with the type of device to test it on."""

    device: str

    def __new__(cls, name: str, device: str) -> On:
        self = super().__new__(cls, name)
        self.device = device
        return self


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


#: Kernels that take some calls of an op alone: its own tests make those.
PARTIAL = {("group_norm_silu", "cuda"), ("cross_attention", "cuda")}


def kernels_of(op: str, devices: Sequence[str] = DEVICES) -> list[str]:
    """The kernels of an op that can run here and support any call; on each device the reference comes first."""
    return [
        On(name, device)
        for device in devices
        for name in (REFERENCE, *_available(op, device))
        if (op, name) not in PARTIAL
    ]


def partial_kernels_of(op: str, devices: Sequence[str] = DEVICES) -> list[str]:
    """The kernels that can run here but support only some calls."""
    return [On(name, d) for d in devices for name in _available(op, d) if (op, name) in PARTIAL]


def _available(op: str, device: str) -> list[str]:
    return [k.name for k in OPS[op].kernels if k.device == device and k.available() is None]


def device_of(kernel: object) -> str:
    """The device on which a kernel is tested; a plain name means the CPU."""
    return getattr(kernel, "device", "cpu")


def generator(seed: int) -> torch.Generator:
    """A generator for the tensors of a test, on the device where the test creates them."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def emulated(kernel: str) -> bool:
    """Whether a GPU kernel is emulated here. A block takes some milliseconds, so its tests use small sizes."""
    return kernel in ("triton", "cuda") and device_of(kernel) == "cpu"


def large(kernels: Sequence[str]) -> list[Any]:
    """Kernels as parameters of a test with large sizes, which is slow if Triton kernels are interpreted."""
    return [
        pytest.param(kernel, marks=pytest.mark.slow if kernel == "triton" and emulated(kernel) else ())
        for kernel in kernels
    ]


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside, ``torch.empty`` and similar functions return NaN (the maximum for integers)."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def detached(tree: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy with its own leaves (requires_grad and strides are kept), optionally with floats in another dtype."""

    def leaf(t: Tensor) -> Tensor:
        room = 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        twin = torch.empty(room, dtype=t.dtype, device=t.device).as_strided(t.shape, t.stride())
        with torch.no_grad():
            twin.copy_(t)
        return (twin if dtype is None or not t.is_floating_point() else twin.to(dtype)).requires_grad_(t.requires_grad)

    return tree_map_only(Tensor, leaf, tree)


def on(device: str, tree: Any) -> Any:
    """A copy on a device, with its own leaves; strides are kept."""
    return detached(tree_map_only(Tensor, lambda t: t.detach().to(device).requires_grad_(t.requires_grad), tree))


def leaves(tree: Any) -> list[Tensor]:
    return [t for t in tree_flatten(tree)[0] if isinstance(t, Tensor) and t.requires_grad]


def evaluate(
    function: Callable[..., Any], inputs: tuple[Any, ...], cotangent: float
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and the gradients of ``cotangent`` times the sum of the differentiable outputs."""
    outputs = list(function(*inputs))
    wrt = leaves(inputs)
    differentiable = [o for o in outputs if o.requires_grad]
    if not (wrt and differentiable):
        return outputs, []
    gradients = torch.autograd.grad(differentiable, wrt, [torch.full_like(o, cotangent) for o in differentiable])
    return [o.detach() for o in outputs], list(gradients)


def nudged(value: Tensor, eps: float = EPS) -> Tensor:
    """The values changed randomly by up to 4 eps each, which a computation in this precision cannot distinguish. How
    far a result moves is its condition. Uses torch's generator."""
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
    """The rule of equality; see the top of this file. ``moved``: the truth for ``nudged`` inputs; its distance from
    ``truth`` is allowed in addition."""
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
    """The rule of equality for trees of tensors: ``got`` is as near to ``truth`` (float64) as ``factor`` times the
    distance of ``eager``, the same computation in the same precision by other code, or as near as ``moved``."""
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
    """Whether the tests compile an op with this kernel. A compiler sees only the op, not its kernel, so the reference
    is enough; on a real GPU also its kernels, because memory and streams matter there."""
    return kernel == REFERENCE or device_of(kernel) == "cuda"


class _Recorder(TorchDispatchMode):
    """Records the arguments of every call of this library's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastdistill":
            self.calls.append((func, tree_map_only(Tensor, lambda t: t.detach().clone(), args)))
        return func(*args, **(kwargs or {}))


def check_registration(case: Case, kernel: str) -> None:
    """torch.library.opcheck for every op that the call uses, forward and backward; for kernels other than the reference
    only the checks that depend on the kernel (what it writes)."""
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
    """Compiled as one graph: the bits of eager code under ``aot_eager``, the rule of equality under inductor."""
    with use(str(kernel)):  # torch 2.11 does not compare subclasses of str
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
    """Fake and meta tensors work without memory accesses, and have the shapes, dtypes and strides of the real
    outputs."""
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
    """All of the checks above for one kernel and one case; the inputs are moved to the kernel's device.

    Checks that do not depend on the kernel use the reference. Triton's interpreter always executes programs in one
    order, so calls are repeated only if the registration is checked.
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
    """The same values with other strides: contiguous, channels_last, permuted, and a slice with gaps."""

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
