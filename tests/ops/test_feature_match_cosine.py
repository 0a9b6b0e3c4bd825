# SPDX-License-Identifier: Apache-2.0
"""The cosine distance of feature_match: layout, size and number of samples, and samples of length zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastdistill.errors import InputError, KernelError
from fastdistill.ops import feature_match, use
from fastdistill.ops.feature_match import Distance, gradient_buffer
from tests.harness import EPS, Case, check_op, large, layouts
from tests.ops.test_feature_match import KERNELS, call, eager, make, truth

COSINE: Distance = "cosine"


def check(student: Tensor, teacher: Tensor, kernel: str) -> None:
    inputs = ([student.detach().requires_grad_()], [teacher], torch.tensor([0.7]), COSINE)
    sums = {0: (1, 1.4), 1: (1, 2.0)}
    check_op(Case("feature_match", inputs, call, truth, eager, sums), kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_samples_in_any_layout(kernel: str) -> None:
    """Also if a sample is not contiguous; it is copied then."""
    (student,), (teacher,), _, _ = make([(3, 8, 4, 6)], torch.float32, COSINE).inputs
    pairs = zip(layouts(student), layouts(teacher), strict=True)
    for s, t in [
        *((s, t) for (_, s), (_, t) in pairs),
        (student, teacher.contiguous(memory_format=torch.channels_last)),
    ]:
        check(s, t, kernel)


@pytest.mark.parametrize("kernel", large(KERNELS))
def test_many_samples_and_long_ones(kernel: str) -> None:
    """More samples than a block has warps; samples with several chunks, at addresses without alignment."""
    check_op(make([(70, 5), (1, 9000), (3, 9001)], torch.float32, COSINE), kernel, compiled=(), registration=False)
    check_op(make([(3, 4099)], torch.bfloat16, COSINE, torch.float32), kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_taps_without_samples_or_elements(kernel: str) -> None:
    shapes = [(0, 4), (2, 3), (3, 0), (2, 0, 5), (4, 3)]
    check_op(make(shapes, torch.float32, COSINE), kernel, compiled=(), registration=False)
    with use(kernel):
        assert feature_match([torch.ones(0, 4)], [torch.ones(0, 4)], distance=COSINE).loss == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_samples_of_no_length(kernel: str) -> None:
    """A zero sample, and one shorter than eps, whose gradient treats the length as a constant."""
    (student,), (teacher,), _, _ = make([(6, 4, 5)], torch.float32, COSINE).inputs
    with torch.no_grad():
        student[0], teacher[1], student[2], teacher[2] = 0, 0, 0, 0
        student[3] *= 1e-8  # eps is 1e-6
        teacher[4] *= 1e-8
    check(student, teacher, kernel)
    ordinary = student.detach().clone().requires_grad_()
    with use(kernel):
        (gradient,) = torch.autograd.grad(feature_match([ordinary], [teacher], distance=COSINE).loss, ordinary)
    assert gradient[1:3].count_nonzero() == 0  # the gradient of a zero sample has no direction
    assert torch.equal(gradient[0].sign(), -teacher[0].sign())


@pytest.mark.parametrize("kernel", KERNELS)
def test_samples_of_one_element(kernel: str) -> None:
    """A sample with one element has only a sign."""
    s = torch.tensor([[2.0], [-3.0], [0.5], [0.0]], requires_grad=True)
    t = torch.tensor([[5.0], [7.0], [-0.1], [1.0]])
    with use(kernel):
        loss, _ = feature_match([s], [t], distance=COSINE)
        (gradient,) = torch.autograd.grad(loss, s)
    assert loss.item() == pytest.approx((0 + 2 + 2 + 1) / 4, rel=4 * EPS)
    assert gradient[:3].abs().max() <= 4 * EPS / 4 / s[:3].abs().min()  # two parts of 1 / |s| / 4 each cancel
    assert gradient[3].item() == pytest.approx(-1e6 / 4, rel=4 * EPS)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tokens", [False, True])
def test_it_is_the_cosine_similarity_of_torch(kernel: str, tokens: bool) -> None:
    """Value and gradient equal autograd's in float64; for tokens as the documentation describes."""
    s, t = torch.randn(2, 5, 7, 9)
    s = s.requires_grad_()
    with torch.no_grad():
        s[1], t[2] = 0, 0
    double = (s.detach().double().requires_grad_(), t.double())
    wide = [x if tokens else x.flatten(1) for x in double]
    expected = 1 - F.cosine_similarity(*wide, dim=-1, eps=1e-6).mean()
    with use(kernel):
        loss = feature_match(*([x.flatten(0, 1) if tokens else x] for x in (s, t)), distance=COSINE).loss
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=4 * EPS)  # 1 - a mean of cosines
    (got,), (truth,) = torch.autograd.grad(loss, s), torch.autograd.grad(expected, double[0])
    for g, e in zip(got.double(), truth, strict=True):  # a zero sample's gradient is 10^6 times larger
        torch.testing.assert_close(g, e, rtol=0, atol=4 * EPS * e.abs().max().item())


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_gradient_is_rounded_once(kernel: str) -> None:
    """For parallel features the two parts cancel; if each were rounded to bfloat16, 1e-3 of them would remain."""
    t = torch.randn(2, 64).bfloat16()
    s = (2 * t).requires_grad_()
    with use(kernel):
        (gradient,) = torch.autograd.grad(feature_match([s], [t], distance=COSINE).loss, s)
    assert gradient.float().abs().max() <= 4 * EPS * t.abs().max() / t.float().norm(dim=1).min() ** 2


@pytest.mark.parametrize("kernel", KERNELS)
def test_float16_gradients_under_a_loss_scale(kernel: str) -> None:
    s = torch.randn(2, 2**12).half().requires_grad_()
    t, scale = torch.randn(2, 2**12).half(), torch.tensor(2.0**14)
    double = s.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(1 - F.cosine_similarity(double, t.double()).mean(), double)
    with use(kernel):
        loss = feature_match([s], [t], distance=COSINE, grad_scale=scale).loss
        (scaled,) = torch.autograd.grad(loss * scale, s)
    torch.testing.assert_close(scaled.double() / scale.double(), expected, rtol=2**-10, atol=2**-25 / float(scale))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced"])
def test_buffers_have_the_layout_that_is_written(layout: str) -> None:
    s = dict(layouts(torch.randn(3, 8, 4, 6, requires_grad=True)))[layout]
    buffer = gradient_buffer(s, COSINE)
    loss = feature_match([s], [torch.randn(3, 8, 4, 6)], distance=COSINE, grads=[buffer]).loss
    (gradient,) = torch.autograd.grad(loss, s)
    assert gradient.data_ptr() == buffer.data_ptr() and buffer[0].is_contiguous() == (layout != "channels_last")


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "reference"])
def test_kernels_refuse_samples_that_are_not_blocks(kernel: str) -> None:
    """The op itself refuses memory that ``feature_match`` would copy."""
    s, t, out = torch.randn(4, 3).T, torch.randn(4, 3).T, [torch.empty(()), torch.empty(1)]
    arguments = ([s], [t], torch.ones(1), torch.ones(()), 3, 1e-6, *out, [])
    with use(kernel), pytest.raises(KernelError, match=r"samples of student\[0\] are not each a block of memory"):
        torch.ops.fastdistill.feature_match(*arguments)
    torch.ops.fastdistill.feature_match(*arguments)  # the reference supports it
    assert torch.isclose(out[0], 1 - F.cosine_similarity(s, t).mean())


def test_bad_input() -> None:
    s = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(InputError, match=r"student\[0\]: expected samples of features, \[B, ...\], got \(2,\)"):
        feature_match([torch.ones(2)], [torch.ones(2)], distance=COSINE)
    with pytest.raises(InputError, match=r"eps: expected a number > 0, got 0\.0"):
        feature_match([s], [torch.ones(2, 3)], distance=COSINE, eps=0.0)
    permuted = torch.ones(3, 2, requires_grad=True).T
    with pytest.raises(InputError, match=r"teacher\[0\]: expected dense, sample after sample, with the strides"):
        feature_match([permuted], [torch.ones(3, 2).T], distance=COSINE, overwrite_teacher=True)
