# SPDX-License-Identifier: Apache-2.0
"""Centered kernel alignment: its two forms, its invariances, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastdistill.distill.cadistill import cka
from fastdistill.errors import InputError
from tests.harness import EPS, EPS64

FORMS = pytest.mark.parametrize("debiased", [True, False])


def features(rows: int, *sizes: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, size, generator=g, dtype=dtype) for size in sizes]


def rotation(size: int) -> Tensor:
    return torch.linalg.qr(features(size, size, seed=5)[0])[0]


@FORMS
def test_equal_features_are_aligned_whatever_their_rotation_scale_and_shift(debiased: bool) -> None:
    x, y = features(20, 6, 9)
    near = {"rel": 0, "abs": 100 * EPS64}  # sums of 20 x 20 products
    assert float(cka(x, 3e4 * x @ rotation(6) + 7, debiased=debiased)) == pytest.approx(1, **near)
    wanted = float(cka(x, y, debiased=debiased))
    assert float(cka(1e-6 * x @ rotation(6), y - 3, debiased=debiased)) == pytest.approx(wanted, rel=0, abs=1e-8)
    assert 0 < abs(wanted) < 0.9


def test_both_forms_are_those_of_the_papers() -> None:
    x, y = features(12, 3, 4)
    centered = [f - f.mean(0) for f in (x, y)]
    norm = [float((f.T @ f).norm()) for f in centered]
    wanted = float((centered[1].T @ centered[0]).norm()) ** 2 / math.prod(norm)
    assert float(cka(x, y, debiased=False)) == pytest.approx(wanted, rel=1e-12)

    def hsic(one: Tensor, two: Tensor) -> Tensor:  # Song et al. 2012, eq. 5
        n = len(one)
        k, m = (f @ f.T - torch.diag((f @ f.T).diagonal()) for f in (one, two))
        rest = k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ m).sum()
        return ((k @ m).trace() + rest) / (n * (n - 3))

    wanted = float(hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt())
    assert float(cka(x, y)) == pytest.approx(wanted, rel=1e-11)


def test_independent_features_are_not_aligned_by_the_debiased_form_alone() -> None:
    found = torch.tensor(
        [[float(cka(*features(64, 512, 256, seed=s), debiased=form)) for form in (True, False)] for s in range(40)]
    )
    assert abs(float(found[:, 0].mean())) < 0.02 and float(found[:, 1].mean()) == pytest.approx(0.85, abs=0.02)


@FORMS
def test_gradients_of_the_alignment(debiased: bool) -> None:
    x, y = (f.requires_grad_() for f in features(6, 3, 2))
    assert torch.autograd.gradcheck(lambda a, b: cka(a, b, debiased=debiased), (x, y))


@FORMS
def test_features_without_variance_have_no_alignment_and_no_gradient(debiased: bool) -> None:
    x, (y,) = torch.ones(8, 3, requires_grad=True), features(8, 2, dtype=torch.float32)
    found = cka(x, y, debiased=debiased)
    found.backward()
    assert float(found.detach()) == 0 and x.grad is not None and bool((x.grad == 0).all())


def test_the_alignment_is_float32_under_autocast() -> None:
    x, y = features(16, 5, 7, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cka(x, y), cka(x, y)) and cka(x, y).dtype == torch.float32
        found = float(cka(x.bfloat16(), y))
    assert found == pytest.approx(float(cka(x.bfloat16().double(), y.double())), abs=16 * 16 * EPS)


@pytest.mark.parametrize(("x", "y"), [((3, 2), (3, 2)), ((8, 2), (7, 2)), ((8,), (8, 2))])
def test_features_that_cannot_be_aligned(x: tuple[int, ...], y: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"x: expected|y: expected"):
        cka(torch.zeros(x), torch.zeros(y))
