# SPDX-License-Identifier: Apache-2.0
"""The counts of products, for a map with known directions."""

from __future__ import annotations

import pytest
import torch

from benchmarks.ops import jacobian
from benchmarks.products import deflation, least, sine
from fastdistill.models.subspace import top_subspace


def test_counts() -> None:
    """Products are counted by iterations; block Golub-Kahan needs the fewest."""
    values = 0.8 ** torch.arange(40.0)
    U, V = (torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(i)))[0] for i in (0, 1))
    W, x, exact = (U * values) @ V.T, torch.zeros(1, 40), V[None, :, :4]
    counts = {}
    for method, step in (("krylov", 4), ("subspace", 16)):
        counts[method], error = least(
            lambda most, method=method: top_subspace(lambda z: z @ W.T, x, 4, method=method, max_products=most),  # type: ignore[misc]
            exact, step,
        )  # fmt: skip
        assert error <= 1e-2
    vectors, products = deflation(lambda z: z @ W.T, x, 4, 1e-3)
    assert sine(vectors, exact) <= 1e-2 and 0 < counts["krylov"] < counts["subspace"] < int(products)


@pytest.mark.parametrize("product", jacobian.PRODUCTS)
def test_rivals_of_the_products_agree(product: str) -> None:
    jacobian._product("digits 3x8x8", 2, product, torch.device("cpu")).check()


def test_the_methods_agree() -> None:
    jacobian._top("digits 3x8x8", 1, ("subspace", "dense"), torch.device("cpu")).check()
