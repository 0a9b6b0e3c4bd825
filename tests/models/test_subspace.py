# SPDX-License-Identifier: Apache-2.0
"""Top subspaces of Jacobians."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from fastdistill.errors import InputError
from fastdistill.models.jacobian import TapFunctions, jvp
from fastdistill.models.subspace import Method, project, top_subspace, top_subspaces
from tests.harness import EPS64
from tests.models.test_jacobian import of_net, rows

METHODS = get_args(Method)


def spectrum(values: Tensor, m: int, n: int) -> Tensor:
    """A matrix [m, n] with these singular values."""
    U, V = (torch.linalg.qr(rows(size, len(values), seed=size))[0] for size in (m, n))
    W: Tensor = (U * values) @ V.T
    return W


def sine(V: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.matrix_norm(exact - V @ (V.mT @ exact), ord=2).max())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("m", "n", "k"), [(30, 40, 5), (40, 30, 1), (6, 6, 6), (6, 9, 6)])
def test_a_linear_map(method: Any, m: int, n: int, k: int) -> None:
    """The right singular vectors; P = I - V V^T is a projector, and W P has the norm sigma_(k+1)."""
    W = spectrum(0.7 ** torch.arange(min(m, n), dtype=torch.float64), m, n)
    x = rows(2, n)
    found = top_subspace(lambda x: x @ W.T, x, k, method=method, tolerance=1e-7)
    _, values, Vh = torch.linalg.svd(W)
    assert found.settled.all() and found.residual.max() <= 1e-7
    V = found.vectors
    assert sine(V, Vh[:k].mT) <= 1e-6
    assert (found.values - values[:k]).abs().max() <= 1e-9 * values[0]
    P = torch.eye(n) - V @ V.mT
    assert (P @ P - P).abs().max() <= 64 * EPS64 and (P - P.mT).abs().max() <= 64 * EPS64
    left = torch.linalg.matrix_norm(W @ P, ord=2)
    assert (left - (values[k] if k < len(values) else 0)).abs().max() <= 1e-6 * values[0]
    y = project(x, V)
    assert (V.mT @ y[:, :, None]).abs().max() <= 64 * EPS64 * x.abs().max()
    assert torch.equal(project(x, V[:, :, :0]), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", ["krylov", "subspace", "dense"])
def test_a_model(method: Any, dtype: torch.dtype) -> None:
    f, x = of_net(model=of_net().model.to(dtype)), rows(2, 4, 5, 3).to(dtype)
    f._prompt = f._prompt.to(dtype)  # type: ignore[union-attr]
    J = jvp(f, x, torch.eye(60, dtype=dtype).expand(2, 60, 60)).double()
    found = top_subspace(f, x, 3, method=method, tolerance=1e-4, max_products=4000)
    exact = torch.linalg.svd(J)[2][:, :3].mT
    assert found.settled.all()
    assert sine(found.vectors.double(), exact) < 1e-3


@pytest.mark.parametrize("method", ["dense", "krylov"])
def test_several_taps_at_once(method: Any) -> None:
    """One forward gives each tap the same as alone, and each its own directions (with one Jacobian if it is dense). The
    forward ends at the last tap, unless the output is a tap; no hook stays."""
    model, x = of_net().model, rows(2, 4, 5, 3)
    level = {"level": (0.6, 0.8), "model": model}
    taps = [of_net(name, **level) for name in ("mid", "first")]
    ran: list[str] = []
    model.last.register_forward_hook(lambda *_: ran.append("last"))
    assert all(map(torch.equal, TapFunctions(taps).features(x), [f.feature(x) for f in taps])) and not ran
    taps.append(of_net("x0", **level))
    together = TapFunctions(taps)
    assert torch.equal(together(x), torch.cat([f(x) for f in taps], 1)) and len(ran) == 2
    assert len(model.mid._forward_hooks) == 0 and len(model.last._forward_hooks) == 1
    whole = together(x)
    one = together.of_rows(torch.tensor([1]))(x[1:])
    assert (one - whole[1:]).abs().max() <= 64 * EPS64 * float(whole.abs().max())
    for f, found in zip(taps, top_subspaces(taps, x, 3, method=method, tolerance=1e-6, seed=2), strict=True):
        alone = top_subspace(f, x, 3, method=method, tolerance=1e-6, seed=2)
        assert (found.values - alone.values).abs().max() <= 1e-9 * float(alone.values.max())
        assert torch.equal(found.products.jvp, alone.products.jvp) and found.products.share == alone.products.share
    with pytest.raises(InputError, match="taps: expected at least one TapFunction"):
        top_subspaces([], x, 3)


def test_any_split_of_the_batch() -> None:
    """The start vectors depend on (seed, row); a settled sample needs no more products."""
    W = torch.stack([spectrum(q ** torch.arange(40, dtype=torch.float64), 40, 40) for q in (0.3, 0.5, 0.9)])

    class Each:
        """Another map for each row, selected by the row's last element."""

        def __call__(self, x: Tensor) -> Tensor:
            return (W[x.detach()[:, -1].round().long() % 3] @ x[:, :, None])[:, :, 0]

    x = torch.cat([rows(3, 39), torch.arange(3.0, dtype=torch.float64)[:, None]], 1)
    whole = top_subspace(Each(), x, 4, method="krylov", seed=5)
    parts = [top_subspace(Each(), x[[i]], 4, method="krylov", seed=5, rows=torch.tensor([i])) for i in range(3)]
    for i, part in enumerate(parts):
        assert sine(whole.vectors[i], part.vectors[0]) <= 1e-9
        assert whole.products.jvp[i] == part.products.jvp[0]
    assert whole.products.jvp[0] < whole.products.jvp[2] and (whole.products.jvp == whole.products.vjp).all()
    other = top_subspace(Each(), x, 4, method="krylov", seed=6)
    assert not torch.equal(other.vectors, whole.vectors)


def test_flat_spectra_and_singular_ones() -> None:
    """``settled`` is false, and gap is sigma_(k+1) / sigma_k; a Jacobian of low rank, or 0, works too."""
    flat = spectrum(1 - 1e-5 * torch.arange(50, dtype=torch.float64), 50, 50)
    for method in ("krylov", "subspace"):
        found = top_subspace(lambda x: x @ flat.T, rows(2, 50), 3, method=method, max_products=40)  # type: ignore[arg-type]
        assert not found.settled.any() and (found.gap > 0.9).all()
        assert (found.products.jvp + found.products.vjp <= 40).all()
    for W in (spectrum(torch.tensor([2.0, 1.0], dtype=torch.float64), 20, 30), torch.zeros(9, 30).double()):
        for method in METHODS:
            found = top_subspace(lambda x, W=W: x @ W.T, rows(2, 30), 4, method=method)  # type: ignore[misc]
            assert (found.vectors.mT @ found.vectors - torch.eye(4)).abs().max() <= 64 * EPS64
            assert (found.values - torch.linalg.svdvals(W)[:4]).abs().max() <= 64 * EPS64
            assert found.settled.all() or method == "subspace"


def test_wrong_arguments() -> None:
    W = rows(6, 9)

    def f(x: Tensor) -> Tensor:
        return x @ W.T

    x = rows(2, 9)
    for given, message in (
        ({"k": 0}, "k: expected a whole number from 1"),
        ({"k": 10}, "k: expected at most 9, the elements of a sample, got 10"),
        ({"k": 7}, "k: expected at most 6, the elements of the feature, got 7"),
        ({"method": "lanczos"}, "method: expected one of auto, dense, krylov, subspace"),
        ({"tolerance": 0}, "tolerance: expected a sine between 0 and 1"),
        ({"oversample": -1}, "oversample: expected a whole number from 0"),
        ({"max_products": 0}, "max_products: expected a whole number from 1"),
        ({"rows": torch.arange(3)}, r"rows: expected row numbers \[2\]"),
    ):
        with pytest.raises(InputError, match=message):
            top_subspace(f, x, **({"k": 2} | given))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"x: expected torch\.float32 or"):
        top_subspace(f, x.half(), 2)
