# SPDX-License-Identifier: Apache-2.0
"""Top right singular vectors of a model's Jacobian, computed from products with it for many samples at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastdistill.errors import InputError, described
from fastdistill.models.jacobian import Function, TapFunction, TapFunctions, at, check_input, jvp, share, vjp
from fastdistill.ops import _check
from fastdistill.ops.philox import START, normal

Method = Literal["auto", "dense", "krylov", "subspace"]
_BASIS = 6  # times (k + oversample): the widest basis, and the largest input for which the dense Jacobian is cheaper
_TOGETHER = 256  # columns of dense Jacobians at once, unless a single one has more
_ROUNDING = 64  # times eps: smaller residuals count as 0
_PATIENCE = 64  # times (k + oversample): the number of products after which a spectrum counts as flat


class Products(NamedTuple):
    """The number of products for each sample, [B] int64, and the share of the model's FLOPs that its function
    evaluates."""

    jvp: Tensor
    vjp: Tensor
    share: float


@dataclass(frozen=True, eq=False)
class Subspace:
    """The top k right singular vectors of each sample's Jacobian.

    Attributes:
        vectors: [B, n, k], orthonormal. Their signs are arbitrary. values: [B, k], descending.
        residual: [B], the largest ||J^T J v - sigma^2 v|| / sigma_1^2.
        settled: [B] bool. If it is false, the other fields have the best result that was found.
        gap: [B], sigma_(k+1) / sigma_k: if it is near 1, the subspace is ill-defined and does not settle.
    """

    vectors: Tensor
    values: Tensor
    residual: Tensor
    settled: Tensor
    gap: Tensor
    products: Products


def top_subspace(
    f: Function,
    x: Tensor,
    k: int,
    *,
    method: Method = "auto",
    oversample: int = 4,
    tolerance: float = 1e-2,
    max_products: int | None = None,
    seed: int = 0,
    rows: Tensor | None = None,
    chunk: int | None = None,
) -> Subspace:
    """The k directions of x that change f(x) most, for each sample of x [B, *S] (n elements).

    A sample has settled, and leaves the batch, if the sine of the largest angle is at most ``tolerance`` by two
    measures: the change in one iteration, ||(I - V V^T) V_before||_2, and the bound of Davis and Kahan, which is the
    residual divided by (sigma_k^2 - sigma_(k+1)^2) / sigma_1^2.

    Args:
        f: a ``TapFunction``, or any function [b, *S] -> [b, m] that treats all rows equally and independently.
        k: 1 to min(n, m).
        method: ``krylov``: block Golub-Kahan bidiagonalization with full reorthogonalization and thick restart (Golub,
            Luk, Overton 1981; Baglama and Reichel 2006). ``subspace``: iteration with k + oversample vectors (Halko,
            Martinsson, Tropp 2011, 0909.4061, algorithm 4.4). ``dense``: n JVPs and a decomposition. ``auto``: dense if
            n <= 6 (k + oversample), else krylov.
        oversample: vectors in addition to k: for ``subspace`` in each iteration, for ``krylov`` at a restart.
        max_products: limit of JVPs and VJPs for a sample, which is then not settled; None: 64 (k + oversample).
        seed, rows: the start vectors are random by (seed, row); rows [B] int64, None: 0..B-1.
        chunk: as for ``jvp``.

    Raises:
        InputError: arguments out of range or with other shapes, and the errors of ``jvp``.
    """
    return _found(
        [f], x, k, method=method, oversample=oversample, tolerance=tolerance, max_products=max_products, seed=seed,
        rows=rows, chunk=chunk,
    )[0]  # fmt: skip


def top_subspaces(taps: Sequence[TapFunction], x: Tensor, k: int, **options: Any) -> list[Subspace]:
    """``top_subspace`` for several taps of a model. If it is dense, all of them share one Jacobian from one forward.

    Args:
        taps: functions of the same model, time, prompt and level.
        options: as for ``top_subspace``.
    """
    if not taps:
        raise InputError.of("taps", "at least one TapFunction", "none")
    return _found(taps, x, k, **options)


def _found(
    functions: Sequence[Function],
    x: Tensor,
    k: int,
    *,
    method: Method = "auto",
    oversample: int = 4,
    tolerance: float = 1e-2,
    max_products: int | None = None,
    seed: int = 0,
    rows: Tensor | None = None,
    chunk: int | None = None,
) -> list[Subspace]:
    for f in functions:
        check_input(f, x)
    n = x[0].numel()
    if method not in get_args(Method):
        raise InputError.of("method", f"one of {', '.join(get_args(Method))}", described(method))
    _check.whole(k, "k", "a whole number from 1")
    _check.require(k <= n, "k", f"at most {n}, the elements of a sample", k)
    is_count = isinstance(oversample, int) and not isinstance(oversample, bool) and oversample >= 0
    _check.require(is_count, "oversample", "a whole number from 0", described(oversample))
    _check.require(0 < _check.real(tolerance, "tolerance") < 1, "tolerance", "a sine between 0 and 1", tolerance)
    if max_products is not None:
        _check.whole(max_products, "max_products", "a whole number from 1")
    rows = torch.arange(len(x), device=x.device) if rows is None else rows
    _check.dtype(rows, "rows", torch.int64)
    _check.shape(rows, "rows", (len(x),), f"row numbers [{len(x)}]")
    x = x.detach()
    if method == "auto":
        method = "dense" if n <= _BASIS * (k + oversample) else "krylov"
    searches = []
    one = torch.zeros(1, dtype=torch.int64, device=x.device)
    for f in functions:
        with torch.no_grad():
            m = at(f, one)(x[:1]).shape[1]
        _check.require(k <= m, "k", f"at most {m}, the elements of the feature", k)
        searches.append(_Search(f, x, int(k), m, tolerance, _check.seed(seed), rows, chunk))
        searches[-1].most = _PATIENCE * (k + oversample) if max_products is None else int(max_products)
    with torch.no_grad():
        if method == "dense":
            taps = [f for f in functions if isinstance(f, TapFunction)]
            _dense(searches, TapFunctions(taps) if len(taps) > 1 else functions[0])
        for search in searches:
            if method == "krylov":
                _krylov(search, oversample)
            elif method == "subspace":
                _iterate(search, min(k + oversample, n, search.m))
    return [search.found(share(search.f, x)) for search in searches]


def project(x: Tensor, vectors: Tensor) -> Tensor:
    """(I - V V^T) x for x [B, *S] and orthonormal vectors [B, n, k]; if k = 0, x itself with the same bits."""
    if vectors.shape[2] == 0:
        return x
    flat = x.flatten(1)[:, :, None]
    return (flat - vectors @ (vectors.mT @ flat)).reshape(x.shape)


class _Search:
    """The samples that have not settled, and the results of the others."""

    def __init__(
        self, f: Function, x: Tensor, k: int, m: int, tolerance: float, seed: int, rows: Tensor, chunk: int | None
    ) -> None:
        self.f, self.x, self.k, self.m, self.tolerance, self.chunk = f, x, k, m, tolerance, chunk
        self.most = 0
        self.n = x[0].numel()
        self._all = k == min(self.n, m)
        self._key, self._rows, self._draws = torch.tensor(seed, dtype=torch.int64, device=x.device), rows, 0
        B = len(x)
        self.active = torch.arange(B, device=x.device)
        self.spent = 0  # products of each active sample
        self._vectors, self._values = x.new_zeros(B, self.n, k), x.new_zeros(B, k)
        self._residual, self._gap = x.new_zeros(B), x.new_zeros(B)
        self._settled = torch.zeros(B, dtype=torch.bool, device=x.device)
        self._jvp, self._vjp = (torch.zeros(B, dtype=torch.int64, device=x.device) for _ in range(2))

    def begin(self, rows: Tensor, products: int) -> None:
        """Make these samples the active ones, for which this number of products J v was computed."""
        self.active = rows
        self._jvp[rows] += products

    def forward(self, V: Tensor) -> Tensor:
        """J V of the active samples."""
        return self._product(jvp, self._jvp, V)

    def backward(self, U: Tensor) -> Tensor:
        """J^T U."""
        return self._product(vjp, self._vjp, U)

    def _product(self, product: Callable[..., Tensor], count: Tensor, vectors: Tensor) -> Tensor:
        count[self.active] += vectors.shape[2]
        self.spent += vectors.shape[2]
        made: Tensor = product(at(self.f, self.active), self.x[self.active], vectors, chunk=self.chunk)
        return made

    def random(self, size: int, width: int) -> Tensor:
        """Normal vectors [active, size, width] by (seed, row, draw)."""
        step = torch.full_like(self._key, self._draws)
        self._draws += 1
        drawn: Tensor = normal(self._key, step, self._rows[self.active], (width, size), stream=START)
        return drawn.to(self.x.dtype).mT

    def first(self, width: int) -> Tensor:
        """Orthonormal start vectors."""
        Q: Tensor = torch.linalg.qr(self.random(self.n, width))[0]
        return Q

    def settle(self, vectors: Tensor, values: Tensor, residual: Tensor, change: Tensor | None) -> Tensor:
        """Store results; returns the positions, among the active samples, of those that continue.

        vectors [active, n, k], values [active, k or more], residual [active]; change [active]: of the subspace, None if
        there was no earlier one.
        """
        k, at = self.k, self.active
        top, last = values[:, 0], values[:, k - 1]
        following = values[:, k] if values.shape[1] > k else torch.zeros_like(last) if self._all else last
        apart = torch.where(top > 0, (last**2 - following**2) / top**2, 0)
        bound = (self.tolerance * apart).clamp(min=_ROUNDING * torch.finfo(values.dtype).eps)
        done = residual <= bound.clamp(max=self.tolerance)
        done &= torch.zeros_like(done) if change is None else change <= self.tolerance
        self._vectors[at], self._values[at], self._residual[at] = vectors, values[:, :k], residual
        self._gap[at] = torch.where(last > 0, following / last, 0)
        self._settled[at] = done
        left = (~done).nonzero().flatten()
        self.active = at[left]
        return left

    def found(self, evaluated: float) -> Subspace:
        products = Products(self._jvp, self._vjp, evaluated)
        return Subspace(self._vectors, self._values, self._residual, self._settled, self._gap, products)


def _dense(searches: Sequence[_Search], f: Function) -> None:
    """Processes the samples in groups, so that memory holds few Jacobians at a time; ``f`` returns the results of all
    searches' functions, concatenated."""
    x, k, n = searches[0].x, searches[0].k, searches[0].n
    every = searches[0].active
    identity = torch.eye(n, dtype=x.dtype, device=x.device)
    group = max(1, _TOGETHER // n)
    for start in range(0, len(every), group):
        rows = every[start : start + group]
        whole = jvp(at(f, rows), x[rows], identity.expand(len(rows), -1, -1), chunk=searches[0].chunk)
        for search, J in zip(searches, torch.split(whole, [search.m for search in searches], 1), strict=True):
            search.begin(rows, n)
            R = torch.linalg.qr(J, mode="r")[1].double()  # J^T J = R^T R
            _, values, Vh = torch.linalg.svd(R, full_matrices=False)
            V = Vh[:, :k].mT
            error = R.mT @ (R @ V) - V * values[:, None, :k] ** 2
            residual = _relative(torch.linalg.vector_norm(error, dim=1), values)
            search.settle(V.to(x.dtype), values.to(x.dtype), residual.to(x.dtype), torch.zeros_like(residual).to(x))


def _iterate(search: _Search, width: int) -> None:
    """V <- the right singular vectors of U^T J with U = orth(J V)."""
    k = search.k
    V = search.first(width)
    while len(V):
        U, R = torch.linalg.qr(search.forward(V))
        W = search.backward(U)  # J^T U; J^T J V = W R
        X, sigma, Yh = torch.linalg.svd(R)
        Y = Yh[:, :k].mT
        error = W @ (X[:, :, :k] * sigma[:, None, :k]) - V @ (Y * sigma[:, None, :k] ** 2)
        residual = _relative(torch.linalg.vector_norm(error, dim=1), sigma)
        after, values, _ = torch.linalg.svd(W, full_matrices=False)
        before = V @ Y
        change = _sine(after[:, :, :k], before)
        V = after[search.settle(after[:, :, :k], values, residual, change)]
        if search.spent + 2 * width > search.most:
            break


def _krylov(search: _Search, oversample: int) -> None:
    """J V = U H and J^T U = V H^T + (rest S in the last columns), V and U orthonormal, wider by a block each time."""
    k, n, m = search.k, search.n, search.m
    widest = _BASIS * (k + oversample)
    rest = search.first(min(block(k), n, m))
    V, U = rest[:, :, :0], search.x.new_zeros(len(rest), m, 0)
    H = search.x.new_zeros(len(rest), 0, 0)
    before: Tensor | None = None  # the last k right vectors, in the basis V
    while len(rest):
        C, new, R = _extended(search, U, search.forward(rest), min(rest.shape[2], m - U.shape[2]))
        V, U = torch.cat([V, rest], 2), torch.cat([U, new], 2)
        H = torch.cat([torch.nn.functional.pad(H, (0, 0, 0, new.shape[2])), torch.cat([C, R], 1)], 2)
        w = new.shape[2]
        if w:
            _, rest, S = _extended(search, V, search.backward(new), min(w, n - V.shape[2]))
        else:  # U spans the whole space, and so V has the whole row space
            rest, S = V[:, :, :0], V.new_zeros(len(V), 0, 0)
        X, sigma, Yh = torch.linalg.svd(H)
        if sigma.shape[1] < k:
            continue
        Y = Yh[:, :k].mT
        left = sigma[:, None, :k] * (S @ X[:, X.shape[1] - w :, :k])
        residual = _relative(torch.linalg.vector_norm(left, dim=1), sigma)
        change = None
        if before is not None:
            change = _sine(Y, torch.nn.functional.pad(before, (0, 0, 0, Y.shape[1] - before.shape[1])))
        if rest.shape[2] == 0:
            change = torch.zeros_like(residual)
        keep = search.settle(V @ Y, sigma, residual, change)
        if search.spent + 2 * rest.shape[2] > search.most:
            break
        V, U, H, rest, before, X, sigma, Yh = (t[keep] for t in (V, U, H, rest, Y, X, sigma, Yh))
        if V.shape[2] + rest.shape[2] > widest and rest.shape[2]:
            p = min(k + oversample, sigma.shape[1])
            V, U, H = V @ Yh[:, :p].mT, U @ X[:, :, :p], torch.diag_embed(sigma[:, :p])
            before = torch.eye(p, k, dtype=V.dtype, device=V.device).expand(len(V), p, k)


def block(k: int) -> int:
    """Vectors per block of ``krylov``: narrow blocks need fewer products, wide ones find equal singular values."""
    return min(k, max(2, -(-k // 4)))


def _extended(search: _Search, basis: Tensor, P: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(C, new, R) with P = basis C + new R and [basis, new] orthonormal, ``width`` more columns.

    Directions in which P has no remainder are random; R is 0 there.
    """
    C = basis.mT @ P
    Q, R = torch.linalg.qr(P - basis @ C)
    A, S, Bh = torch.linalg.svd(R)
    new, R = Q @ A[:, :, :width], S[:, :width, None] * Bh[:, :width]
    scale = torch.linalg.vector_norm(P, dim=(1, 2))[:, None]
    dead = S[:, :width] <= torch.finfo(P.dtype).eps * scale
    if bool(dead.any()):
        drawn = search.random(P.shape[1], width) / math.sqrt(P.shape[1])
        new, R = torch.where(dead[:, None], drawn, new), torch.where(dead[:, :, None], 0, R)
    for _ in range(2):
        more = basis.mT @ new
        new, T = torch.linalg.qr(new - basis @ more)
        C, R = C + more @ R, T @ R
    return C, new, R


def _sine(V: Tensor, W: Tensor) -> Tensor:
    """Sine of the largest angle between the spans of orthonormal [B, n, k], by residuals: exact for small angles."""
    value: Tensor = torch.linalg.matrix_norm(W - V @ (V.mT @ W), ord=2)
    return value


def _relative(errors: Tensor, values: Tensor) -> Tensor:
    """The largest of the errors [B, k] divided by sigma_1^2."""
    top = values[:, 0] ** 2
    value: Tensor = torch.where(top > 0, errors.amax(1) / top, 0)
    return value
