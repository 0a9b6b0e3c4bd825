# SPDX-License-Identifier: Apache-2.0
"""How many products each method needs for the top directions of a Jacobian: ``python -m benchmarks.products``.

Each method runs until the sine of the largest angle to the exact directions is at most 0.01. The Jacobians are those of
the digits teacher and of a U-Net with random weights; they are formed once, so that products are cheap.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdistill.models.jacobian import jvp, share, vjp
from fastdistill.models.subspace import Subspace, block, top_subspace

SINE = 1e-2


def deflation(f: Any, x: Tensor, k: int, tolerance: float, most: int = 500) -> tuple[Tensor, Tensor]:
    """One right singular vector after another, by power iteration on J^T J orthogonal to the previous ones, each until
    it changes by less than the tolerance. Returns the vectors [B, n, k] and the numbers of products [B]."""
    found = x.new_zeros(len(x), x[0].numel(), 0)
    products = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for number in range(k):
        v = torch.randn(found.shape[:2], generator=torch.Generator().manual_seed(number)).to(x)[:, :, None]
        for _ in range(most):
            v = v - found @ (found.mT @ v)
            v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
            after = vjp(f, x, jvp(f, x, v))
            products += 2
            after = after - found @ (found.mT @ after)
            after = after / torch.linalg.vector_norm(after, dim=1, keepdim=True)
            moved = torch.linalg.vector_norm(after - v * (v.mT @ after), dim=1).max()
            v = after
            if moved <= tolerance:
                break
        found = torch.cat([found, v], 2)
    return found, products


def least(find: Callable[[int], Subspace], exact: Tensor, step: int, most: int = 1024) -> tuple[int, float]:
    """The minimum number of products (in iterations of ``step``) for which the largest angle is small enough, and its
    sine; ``most`` iterations if that is not reached."""

    def error(iterations: int) -> float:
        return sine(find(iterations * step).vectors, exact)

    high = 1
    while high < most and error(high) > SINE:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if error(middle) <= SINE else (middle, high)
    found = find(high * step)
    return int((found.products.jvp + found.products.vjp).max()), sine(found.vectors, exact)


def sine(V: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.matrix_norm(exact - V @ (V.mT @ exact), ord=2).max())


def report(name: str, tap: str, k: int) -> None:
    from benchmarks.ops.jacobian import setup

    f, _, x = setup(name, 1, torch.device("cpu"), tap)
    n = x[0].numel()
    J = jvp(f, x, torch.eye(n)[None])[0]
    flat = x.flatten(1)

    def g(z: Tensor) -> Tensor:
        return z @ J.T

    best = top_subspace(g, flat, k, method="krylov", tolerance=1e-5,
                        max_products=40_000)  # fmt: skip
    exact = best.vectors
    head = f"{name} {tap}, k = {k}, n = {n}, m = {len(J)}, share {share(f, x):.2f}"
    print(f"{head}, sigma_(k+1) / sigma_k = {float(best.gap):.3f}, sigma_k / sigma_1 = "
          f"{float(best.values[0, -1] / best.values[0, 0]):.3f}")  # fmt: skip
    counts = {}
    for method, step in (("krylov", 2 * block(k)), ("subspace", 2 * (k + 4))):
        find = lambda most, method=method: top_subspace(g, flat, k, method=method, max_products=most)  # noqa: E731
        counts[method], error = least(find, exact, step)
        settled = top_subspace(g, flat, k, method=method, max_products=4000)  # type: ignore[arg-type]
        took = int((settled.products.jvp + settled.products.vjp).max())
        print(f"  {method}: {counts[method]} products to sine {error:.4f}; settles after {took}, at sine "
              f"{sine(settled.vectors, exact):.4f}")  # fmt: skip
    for tolerance in (1e-2, 3e-3, 1e-3, 3e-4, 1e-4):
        vectors, products = deflation(g, flat, k, tolerance)
        if (error := sine(vectors, exact)) <= SINE:
            break
    counts["one vector at a time"] = int(products.max())
    print(f"  one vector at a time: {int(products.max())} products, sine {error:.4f}, each moving < {tolerance:g}")
    for method in ("subspace", "one vector at a time"):
        print(f"  {method} / krylov: {counts[method] / counts['krylov']:.2f}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", nargs="+", default=["digits 3x8x8", "U-Net 4x32x32"])
    p.add_argument("--tap", nargs="+", default=["mid_block", "up_blocks.0"])
    p.add_argument("--k", nargs="+", type=int, default=[4, 10])
    options = p.parse_args()
    for name in options.model:
        for tap in options.tap:
            for k in options.k:
                report(name, tap, k)


if __name__ == "__main__":
    main()
