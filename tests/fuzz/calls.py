# SPDX-License-Identifier: Apache-2.0
"""A call of an op with its kernels, and its checks: the rule of equality of ``tests/harness.py`` against float64, or an
error that names argument, rule and value; and the op writes only what it may write."""

from __future__ import annotations

import contextvars
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch
from torch import Tensor

from fastdistill.errors import FastdistillError, InputError, KernelError
from fastdistill.ops import use
from fastdistill.ops._dispatch import REFERENCE
from tests.fuzz.tensors import VALUES, Spec, described, leaves, line_of, mapped, seeds
from tests.harness import EPS, assert_close, nudged

NAMED = re.compile(r"^[\w.\[\]']+: expected .+, got .*", re.DOTALL)
GPU = ("triton", "cuda")
LEAST = 1e-27  # smaller errors are ignored: an exponential that should be 0 is 1.6e-38, before products
AUTOMATIC = "automatic"  # the kernel that the op chooses
REPEATS = len(VALUES)  # with different values
Outputs = tuple[Tensor, ...]


class _Rounded(torch.autograd.Function):
    """The value and its gradient, each changed by the error of a computation in a precision."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        return nudged(value, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return nudged(grad, ctx.eps), None


_near = contextvars.ContextVar("near", default=0.0)


def rounded(value: Tensor, terms: int = 1, least: float = 0.0) -> Tensor:
    """Marks a value that the truth computes in ``Call.eps`` as a sum of ``terms`` terms with one sign. Normally returns
    the value itself; to find out how far results move by rounding, a value near it, with a gradient near its gradient.
    ``least``: the precision in which it is stored, if that is lower."""
    eps = _near.get()
    return _Rounded.apply(value, max(least / 4, eps * max(1.0, terms**0.5 / 4))) if eps else value


class Fault(AssertionError):
    """Something that must not happen."""


@dataclass(frozen=True)
class Call:
    """``function`` and ``truth`` take ``arguments`` (with tensors in place of each ``Spec``) and return tensors.
    ``truth`` computes in the precision of its arguments; None: the kernels are only compared with the reference."""

    op: str
    function: Callable[..., Outputs]
    arguments: dict[str, Any]
    truth: Callable[..., Outputs] | None
    eager: Callable[..., Outputs] | None = None  # the code of a user, if it uses another formula
    kernels: tuple[str, ...] = (REFERENCE, "cpp")
    written: frozenset[str] = frozenset()  # arguments that the op overwrites
    exact: bool = False  # whether the kernels must give equal bits (integers always must)
    close: float = 0.0  # absolute differences up to this are ignored
    eps: float = EPS  # eps of the precision of the computation
    hidden: bool = False  # whether the written arguments are scratch memory
    wrong: tuple[str, str] | None = None  # the name of an argument, and its invalid value

    def made(self, seed: int, values: str) -> dict[str, Any]:
        """The arguments, with tensors of these values."""
        g = torch.Generator().manual_seed(seed)
        made = mapped(lambda one: one.made(g, values) if isinstance(one, Spec) else one, self.arguments)
        if self.wrong is not None:
            name, kind = self.wrong
            value = made[name]
            inside = isinstance(value, list) and value and seed % 2
            made[name] = [WRONG[kind](value[0]), *value[1:]] if inside else WRONG[kind](value)
        return made


def _tensor(value: Any) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.ones(2, 4)


WRONG: dict[str, Callable[[Any], Any]] = {
    "None": lambda _: None,
    "a text": lambda _: "\x00é" * 50,
    "0": lambda _: 0,
    "-1": lambda _: -1,
    "a number": lambda _: 2.5,
    "1e308": lambda _: 1e308,
    "nan": lambda _: float("nan"),
    "inf": lambda _: float("inf"),
    "2**63": lambda _: 2**63,
    "10**400": lambda _: 10**400,
    "True": lambda _: True,
    "an object": lambda _: object(),
    "a class": lambda _: Tensor,
    "a list": lambda value: [value, value],
    "no list": lambda _: [],
    "a dict": lambda value: {"x": value},
    "an array": lambda _: np.ones((2, 4), np.float32),
    "a numpy number": lambda _: np.float32(0.5),
    "complex": lambda value: _tensor(value).to(torch.complex64),
    "int8": lambda value: _tensor(value).to(torch.int8),
    "int64": lambda value: torch.nan_to_num(_tensor(value).float()).clamp(-9, 9).long(),
    "float64": lambda value: _tensor(value).double(),
    "float16": lambda value: _tensor(value).half(),
    "float8": lambda value: _tensor(value).float().to(torch.float8_e4m3fn),
    "bool": lambda value: _tensor(value) != 0,
    "sparse": lambda value: torch.ones(2, 4).to_sparse(),
    "meta": lambda value: _tensor(value).to("meta"),
    "0-dim": lambda value: torch.ones(()),
    "empty": lambda value: _tensor(value)[:0] if _tensor(value).dim() else torch.empty(0),
    "one more": lambda value: torch.cat([_tensor(value)] * 2) if _tensor(value).dim() else torch.ones(2),
    "one axis more": lambda value: _tensor(value)[None],
    "flat": lambda value: _tensor(value).reshape(-1),
    "grad": lambda value: _tensor(value).float().requires_grad_(),
}

ODD = ("nan", "inf", "huge")
HUGE = ("1e308", "inf", "nan", "2**63", "10**400")


def calls(one: Callable[[Any], Call], wrongs: bool = True) -> st.SearchStrategy[tuple[Call, int]]:
    """Calls that ``one`` creates with a draw function, some with one invalid argument, each with a seed."""

    @st.composite
    def strategy(draw: Any) -> tuple[Call, int]:
        call = one(draw)
        wrong = None
        if wrongs and draw(st.integers(0, 3)) == 3:
            wrong = draw(st.sampled_from(sorted(call.arguments))), draw(st.sampled_from(list(WRONG)))
        return Call(**{**vars(call), "wrong": wrong}), draw(seeds)

    return strategy()


@dataclass
class Result:
    """The outcome of a call with one kernel."""

    kernel: str
    outputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)
    error: Exception | None = None


def check(example: tuple[Call, int], counts: Counter[str], repeats: int = REPEATS) -> None:
    """Check the call with its kernels and several kinds of values."""
    call, seed = example
    for at in range(1 if call.wrong else repeats):
        values = VALUES[(seed // 7 + 3 * at) % len(VALUES)]
        try:
            _check(call, seed + at, values, counts)
        except AssertionError as error:
            given = f"{call.op}, values {values}, seed {seed + at}, wrong {call.wrong}: {described(call.arguments)}"
            raise Fault(f"{error}\n  {given}") from None


def _check(call: Call, seed: int, values: str, counts: Counter[str]) -> None:
    results = []
    made = call.made(seed, values)
    before = [(t, line_of(t).clone()) for t in _plain(made, call.written)]
    for kernel in call.kernels:
        given = call.made(seed, values) if call.written and results else made
        result = _result(call, kernel, given, seed)
        if call.written and not call.hidden and result.error is None:
            result.outputs += [t.detach() for name in sorted(call.written) for t in leaves(given[name])]
        results.append(result)
        by_kernel = isinstance(result.error, KernelError)
        outcome = "accepted" if result.error is None else "passed" if by_kernel else "refused"
        counts[f"{call.op} {kernel} {outcome}"] += 1
        if any(g is not None for g in result.gradients):
            counts[f"{call.op} {kernel} differentiated"] += 1
    for tensor, line in before:
        assert torch.equal(line_of(tensor), line), f"an input was written to: {described(tensor)}"
    first, *rest = results
    for other in rest:
        if isinstance(other.error, KernelError):
            continue
        if other.kernel in GPU and other.error is None and "expected a row of" in str(first.error):
            continue  # no value is read back from a GPU: the result is NaN
        if (first.error is None) != (other.error is None) or str(first.error) != str(other.error):
            raise Fault(f"{first.kernel}: {first.error or 'accepts'}; {other.kernel}: {other.error or 'accepts'}")
    accepted = [r for r in results if r.error is None]
    if first.error is None and not any(t.is_meta for t in _all(accepted[0])):
        _compare(call, accepted, call.made(seed, values) if call.written else made, seed, values)


def _plain(made: Any, written: frozenset[str]) -> Iterator[Tensor]:
    for name, value in made.items():
        for leaf in leaves(value):
            if name not in written and isinstance(leaf, Tensor) and leaf.layout is torch.strided and not leaf.is_meta:
                yield leaf


def _all(result: Result) -> list[Tensor]:
    return [*result.outputs, *(g for g in result.gradients if g is not None)]


def _result(call: Call, kernel: str, made: dict[str, Any], seed: int) -> Result:
    try:
        with use(None if kernel == AUTOMATIC else kernel):
            outputs, gradients = _evaluate(call.function, made, seed)
    except FastdistillError as error:
        if isinstance(error, InputError) and not NAMED.match(str(error)):
            raise Fault(f"{kernel}: a message without argument, rule and value: {error}") from error
        return Result(kernel, error=error)
    except Exception as error:
        raise Fault(f"{kernel}: {type(error).__name__}: {str(error)[:300]}") from error
    return Result(kernel, outputs, gradients)


def _evaluate(
    function: Callable[..., Outputs], made: dict[str, Any], seed: int
) -> tuple[list[Tensor], list[Tensor | None]]:
    outputs = list(function(**made))
    wrt = [t for t in leaves(made) if isinstance(t, Tensor) and t.requires_grad]
    of = [o for o in outputs if o.requires_grad]
    if not (wrt and of) or any(o.is_meta for o in of):
        return [o.detach() for o in outputs], []
    g = torch.Generator().manual_seed(seed)
    # In the dtype of the output (float64 for the truth). Not 0, because a stored gradient may have overflowed and is
    # multiplied by it.
    along = [torch.randint(-8, 8, o.shape, generator=g).to(o.dtype).add(0.5) / 4 for o in of]
    gradients = torch.autograd.grad(of, wrt, along, allow_unused=True)
    return [o.detach() for o in outputs], list(gradients)


def _compare(call: Call, accepted: list[Result], made: dict[str, Any], seed: int, values: str) -> None:
    truth, first = None, accepted[0]
    if call.truth is not None:
        try:
            truth = _Truth(call, made, seed, values in ODD or (call.wrong is not None and call.wrong[1] in HUGE))
        except Exception:
            if call.wrong is None:
                raise
    alike = values == "nan" and made.get("eps") != 0 and made.get("rows") is None  # whose reference adds 0 times NaN
    for result in accepted:
        for at, got in enumerate(_all(result)):
            name = f"{call.op}[{result.kernel}] " + (
                f"output {at}" if at < len(result.outputs) else f"gradient {at - len(result.outputs)}"
            )
            known = _all(first)[at]
            assert got.shape == known.shape and got.dtype == known.dtype, f"{name}: {described(got)}"
            if (alike and result.kernel != AUTOMATIC) or not got.is_floating_point() or call.exact:
                _alike(name, got, known, call.exact)
            if truth is not None and got.is_floating_point():
                truth.check(name, at, got, 2.0 if at < len(result.outputs) else 3.0)
            elif got.is_floating_point() and not call.exact and (at < len(result.outputs) or not call.wrong):
                _as_near(name, got, known, call.close)


def _alike(name: str, got: Tensor, known: Tensor, exact: bool) -> None:
    if exact or not got.is_floating_point():
        same = torch.equal(got.view(torch.uint8), known.view(torch.uint8)) if got.dim() else torch.equal(got, known)
        assert same or torch.equal(torch.nan_to_num(got), torch.nan_to_num(known)), f"{name}: not the reference's"
        return
    apart = got.isfinite() != known.isfinite()
    assert not apart.any(), f"{name}: finite where the reference is not, or not where it is, at {apart.nonzero()[0]}"


def _as_near(name: str, got: Tensor, known: Tensor, close: float) -> None:
    """Compare two results for the same arguments without a known truth: they may differ by two roundings."""
    both = got.isfinite() & known.isfinite()
    if both.any():
        eps = max(torch.finfo(got.dtype).eps, EPS)
        got, known = got[both].double(), known[both].double()
        bound = close + 16 * eps * known.abs().max()
        error = (got - known).abs().max()
        assert error <= bound, f"{name}: {error:.3e} from the reference, allowed {bound:.3e}"


class _Truth:
    """The call in float64; if that is not enough, also in the precision of its tensors, and near its arguments."""

    def __init__(self, call: Call, made: dict[str, Any], seed: int, huge: bool) -> None:
        self._call, self._made, self._seed, self._huge = call, made, seed, huge
        # e^-87 is the smallest exponential of the kernels; its product with huge factors is not small.
        largest = [t.abs().max().item() for t in leaves(made) if _is_float(t) and huge and t.numel()]
        largest = [one for one in largest if math.isfinite(one)]
        self._floor = max([LEAST, *(4 * EPS * one for one in largest)])
        self._exact = self._values(call.truth, mapped(_doubled, made))
        self._other: tuple[list[Tensor], list[Tensor]] | None = None

    def _values(self, function: Any, made: dict[str, Any]) -> list[Tensor]:
        outputs, gradients = _evaluate(function, made, self._seed)
        return [*outputs, *(g for g in gradients if g is not None)]

    def check(self, name: str, at: int, got: Tensor, factor: float) -> None:
        exact = self._exact[at]
        assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, should be {tuple(exact.shape)}"
        limit = torch.finfo(got.dtype).max / 64  # a stored gradient includes the loss scale
        known = exact.isfinite() & (exact.abs() < limit)
        if self._huge:  # whether intermediate results overflow depends on the order of operations
            known &= got.isfinite()
        if not known.any():
            return
        eps = torch.finfo(got.dtype).eps
        error = (got.double() - exact)[known].abs().max()
        if error <= max(4 * eps * exact[known].abs().max(), torch.finfo(got.dtype).smallest_normal * eps, self._floor):
            return
        eager, moved = self._others()
        known &= eager[at].isfinite() & moved[at].isfinite()
        if known.any():
            exact = exact[known]
            assert_close(
                name, got[known], exact, eager[at][known], factor, moved=exact + factor * moved[at][known] + self._floor
            )

    def _others(self) -> tuple[list[Tensor], list[Tensor]]:
        if self._other is None:
            eager = self._values(self._call.eager or self._call.truth, mapped(_leaf, self._made))
            torch.manual_seed(self._seed)
            apart = [torch.zeros_like(t) for t in self._exact]
            token = _near.set(self._call.eps)
            for _ in range(4):
                near = self._values(self._call.truth, mapped(lambda t: _doubled(t, self._call.eps), self._made))
                apart = [torch.maximum(a, (n - t).abs()) for a, n, t in zip(apart, near, self._exact, strict=True)]
            _near.reset(token)
            self._other = eager, apart
        return self._other


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _leaf(value: Any) -> Any:
    """A separate tensor, with requires_grad if the original has it."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def _doubled(value: Any, nudge: float = 0.0) -> Any:
    if not _is_float(value):
        return value
    wide = value.detach().double().contiguous()
    return (nudged(wide, nudge) if nudge else wide).requires_grad_(value.requires_grad)
