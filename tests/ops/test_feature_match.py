# SPDX-License-Identifier: Apache-2.0
"""feature_match under ``check_op``: every kernel, dtype, layout and shape, against float64."""

from __future__ import annotations

import importlib
import itertools
import math

import pytest
import torch
from torch import Tensor

from fastdistill.errors import InputError, KernelError
from fastdistill.ops import OPS, feature_match, use, used
from fastdistill.ops.feature_match.reference import COSINE, HUBER, MSE, NORMALIZED_MSE, distance_and_gradient
from tests.harness import (
    EPS,
    Case,
    check_fake,
    check_op,
    crossed,
    detached,
    emulated,
    evaluate,
    generator,
    kernels_of,
    large,
    layouts,
)

SHAPES = {
    "conv": [(2, 8, 4, 4), (2, 16, 2, 2)],
    "odd": [(3, 5, 7), (1,), (13,), (2, 3, 1, 5, 3)],
    "one": [(1, 1, 1, 1)],
    "empty": [(0, 4), (3, 4)],
    "large": [(3, 33, 37, 41)],  # more than one chunk, not a multiple of a vector
}
DELTA = 0.75
DISTANCES = ["mse", "normalized_mse", "huber", "cosine"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def truth(student: list[Tensor], teacher: list[Tensor], weights: Tensor, distance: str) -> tuple[Tensor, Tensor]:
    """The definition in autograd; it does not use the op's handwritten gradient."""
    taps = []
    for s, t in zip(student, teacher, strict=True):
        if s.numel() == 0:
            taps.append((s * 0).sum())
            continue
        if distance == "huber":
            taps.append(torch.nn.functional.huber_loss(s, t, delta=DELTA))
            continue
        if distance == "cosine":
            s, t = s.flatten(1), t.flatten(1)
            norms = s.norm(dim=1).clamp(min=1e-6) * t.norm(dim=1).clamp(min=1e-6)
            taps.append((1 - (s * t).sum(1) / norms).mean())
            continue
        value = (s - t).pow(2).mean()
        taps.append(value if distance == "mse" else value / (t.pow(2).mean() + 1e-6))
    stacked = torch.stack(taps)
    return (weights.to(stacked.dtype) * stacked).sum(), stacked.detach()


def eager(student: list[Tensor], teacher: list[Tensor], weights: Tensor, distance: str) -> tuple[Tensor, Tensor]:
    """The code of a user: the same in float32 with ``.float()``."""
    return truth([s.float() for s in student], [t.float() for t in teacher], weights, distance)


def call(student: list[Tensor], teacher: list[Tensor], weights: Tensor, distance: str) -> tuple[Tensor, Tensor]:
    return feature_match(student, teacher, weights=weights, distance=distance, delta=DELTA)


def make(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, distance: str, teacher_dtype: torch.dtype | None = None
) -> Case:
    g = generator(sum(map(len, shapes)) + len(distance))
    if distance == "cosine":  # with several elements per sample: with one, the gradient is a difference that vanishes
        shapes = [s if math.prod(s[1:]) != 1 else (*s, 3) for s in shapes]
    student = [torch.randn(s, generator=g).to(dtype).requires_grad_() for s in shapes]
    teacher = [(1.5 * torch.randn(s, generator=g) + 0.5).to(teacher_dtype or dtype) for s in shapes]
    weights = torch.rand(len(shapes), generator=g) + 0.5
    sums = {}
    if distance in ("mse", "huber"):  # all terms are positive, so the sum of magnitudes is the value itself
        with torch.no_grad():
            loss = truth([s.double() for s in student], [t.double() for t in teacher], weights, distance)[0].item()
        sums = {0: (max(sum(s.numel() for s in student), 1), loss)}
    elif distance == "cosine":  # 1 and a number of at most 1
        sums = {0: (1, 2.0 * weights.sum().item()), 1: (1, 2.0)}
    return Case("feature_match", (student, teacher, weights, distance), call, truth, eager, sums)


KERNELS = kernels_of("feature_match")


@pytest.mark.parametrize("kernel", KERNELS)
@crossed("shapes, dtype, distance", SHAPES, FLOATS, DISTANCES)
def test_values_and_contract(kernel: str, distance: str, dtype: torch.dtype, shapes: str) -> None:
    thorough = dtype == torch.float32 and shapes in ("conv", "odd")
    check_op(
        make(SHAPES[shapes], dtype, distance),
        kernel,
        compiled=("aot_eager", "inductor") if thorough and shapes == "conv" else ("aot_eager",) if thorough else (),
        registration=thorough,
    )


@pytest.mark.parametrize("kernel", KERNELS)
@crossed("dtypes, distance", itertools.permutations(FLOATS, 2), DISTANCES)
def test_student_and_teacher_of_different_dtypes(
    kernel: str, dtypes: tuple[torch.dtype, torch.dtype], distance: str
) -> None:
    check_op(make(SHAPES["conv"], dtypes[0], distance, dtypes[1]), kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_layouts(kernel: str) -> None:
    """Any mix of layouts gives the same values; the gradient has the student's layout if that is dense."""
    case = make([(2, 8, 4, 6)], torch.float32, "mse")
    (student,), (teacher,), weights, distance = case.inputs
    for (sn, s), (_, t) in itertools.product(layouts(student), layouts(teacher)):
        moved = Case(case.op, ([s], [t], weights, distance), call, truth, eager, case.sums)
        check_op(moved, kernel, compiled=("aot_eager",) if sn == "permuted" else (), registration=False)
        if sn != "sliced":
            with use(kernel):
                (gradient,) = evaluate(call, detached(moved.inputs), 1.0)[1]
            assert gradient.stride() == s.stride()


@pytest.mark.parametrize("kernel", large(KERNELS))
@pytest.mark.parametrize("distance", DISTANCES)
def test_more_taps_than_a_launch_takes(kernel: str, distance: str) -> None:
    """Forty taps, some of them empty, with different dtypes."""
    shapes = [(1 + i % 3, 7 * (i % 5)) for i in range(40)]
    case = make(shapes, torch.float32, distance)
    student, teacher, weights, _ = case.inputs
    student = [s.detach().to(FLOATS[i // 15]).requires_grad_() for i, s in enumerate(student)]
    inputs = (student, teacher, weights, distance)
    check_op(Case(case.op, inputs, call, truth, eager, case.sums), kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_weights_of_any_strides(kernel: str) -> None:
    """Also after a call with the same shapes and contiguous weights."""
    student, teacher, weights, distance = make([(2, 8), (3, 5), (7,)], torch.float32, "mse").inputs
    spread, alike = torch.stack([weights, weights + 9], 1)[:, 0], torch.full((1,), 2.0).expand(3)
    with use(kernel):
        for given, same in ((weights, weights), (spread, weights), (alike, alike.clone())):
            assert torch.equal(call(student, teacher, given, distance)[0], call(student, teacher, same, distance)[0])


@pytest.mark.parametrize("kernel", KERNELS)
def test_memory_that_does_not_start_at_a_vector(kernel: str) -> None:
    case = make([(4099,)], torch.float32, "mse")
    (student,), (teacher,), weights, distance = case.inputs
    moved = torch.empty(2, 4100)
    s, t = moved[0, 1:].copy_(student.detach()).requires_grad_(), moved[1, 1:].copy_(teacher)
    inputs = ([s], [t], weights, distance)
    check_op(Case(case.op, inputs, call, truth, eager, case.sums), kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k == "triton"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_long_chunks_of_the_triton_kernel(kernel: str, distance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("fastdistill.ops.feature_match.triton")
    monkeypatch.setattr(module, "CHUNKS", 1)
    check_op(make([(3, 40_000), (5,)], torch.float32, distance), kernel, compiled=(), registration=False)


@pytest.mark.parametrize("distance", [MSE, NORMALIZED_MSE, HUBER, COSINE])
def test_gradient_of_the_reference(distance: int) -> None:
    """The handwritten gradient of the reference equals autograd's, in float64."""
    s = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    t = torch.randn(3, 4, dtype=torch.float64)
    value, gradient = distance_and_gradient(s, t, distance, 0.5)
    (expected,) = torch.autograd.grad(value, s)
    bound = 12 * 4 * torch.finfo(torch.float64).eps * float(expected.abs().max())  # sums of 12 terms
    torch.testing.assert_close(gradient, expected, rtol=0, atol=bound)
    torch.autograd.gradcheck(lambda x: distance_and_gradient(x, t, distance, 0.5)[0], s)


@pytest.mark.parametrize("kernel", KERNELS)
def test_float16_gradients_survive_under_a_loss_scale(kernel: str) -> None:
    """2 (s - t) / n underflows in float16 for n = 2^16 and small differences; scaled before rounding it does not."""
    t = torch.zeros(2**16, dtype=torch.float16)
    s = torch.full_like(t, 2.0**-10).requires_grad_()
    scale = torch.tensor(2.0**12)
    with use(kernel):
        (plain,) = torch.autograd.grad(feature_match([s], [t]).loss, s)
        (scaled,) = torch.autograd.grad(feature_match([s], [t], grad_scale=scale).loss * scale, s)
    assert plain.abs().max() == 0  # 2^-25 is below half the smallest subnormal
    assert torch.equal(scaled, torch.full_like(scaled, 2.0**-13))


@pytest.mark.parametrize("kernel", KERNELS)
def test_backward_again(kernel: str) -> None:
    s, t = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    with use(kernel):
        loss = feature_match([s], [t]).loss * 3
        (first,) = torch.autograd.grad(loss, s, retain_graph=True)
        (second,) = torch.autograd.grad(loss, s)
        assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()
        with pytest.raises(RuntimeError, match="retain_graph=True"):
            torch.autograd.grad(loss, s)


@pytest.mark.parametrize("kernel", KERNELS)
def test_buffers_are_reused(kernel: str) -> None:
    s, t = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    buffer = torch.empty(4, 5)
    with use(kernel):
        (expected,) = torch.autograd.grad(feature_match([s], [t]).loss, s)
        (got,) = torch.autograd.grad(feature_match([s], [t], grads=[buffer]).loss, s)
    assert torch.equal(got, expected) and got.data_ptr() == buffer.data_ptr()


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "reference" and not emulated(k)])
@pytest.mark.parametrize("distance", DISTANCES)
def test_same_bits_for_any_number_of_threads(kernel: str, distance: str) -> None:
    case = make([(5, 33, 37, 41), (3, 7)], torch.float32, distance)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            with use(kernel):
                results.append(evaluate(call, detached(case.inputs), 1.0))
    finally:
        torch.set_num_threads(before)
    for outputs, gradients in results[1:]:
        for one, two in zip([*outputs, *gradients], [*results[0][0], *results[0][1]], strict=True):
            assert torch.equal(one, two)


def test_fake_cuda_tensors() -> None:
    check_fake(make(SHAPES["conv"], torch.bfloat16, "mse"), "cuda")


def test_without_gradient_no_buffer_is_written() -> None:
    t = torch.randn(4, 5)
    with torch.no_grad():
        loss, taps = feature_match([torch.zeros(4, 5, requires_grad=True)], [t])
    assert not loss.requires_grad and torch.isclose(loss, t.square().mean()) and taps.shape == (1,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "student: expected at least one tap, got none"),
        (([torch.ones(2)], []), r"teacher: expected as many taps as student \(1\), got 0"),
        (
            ([torch.ones(8, 64)], [torch.ones(8, 32)]),
            r"teacher\[0\]: expected the shape of student\[0\] \(8, 64\), got \(8, 32\)",
        ),
        (
            ([torch.ones(2).double()], [torch.ones(2)]),
            r"student\[0\]: expected dtype float32 or bfloat16 or float16, got float64",
        ),
        (
            ([torch.ones(2)], [torch.ones(2, device="meta")]),
            r"teacher\[0\]: expected the device of student\[0\] \(cpu\), got meta",
        ),
        ((torch.ones(2, 3), torch.ones(2, 3)), "student: expected a list of tensors, one a tap, got Tensor"),
        (([torch.ones(2)], {"mid": torch.ones(2)}), r"teacher: expected a list of tensors, one a tap, got dict"),
        (([torch.ones(2)], [torch.ones(2, requires_grad=True)]), r"teacher\[0\]: expected a tensor without gradient"),
    ],
)
def test_bad_input(arguments: tuple[list[Tensor], list[Tensor]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        feature_match(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": "l1"}, "distance: expected one of mse, normalized_mse, huber, cosine, got 'l1'"),
        ({"weights": [1.0, 2.0]}, r"weights: expected one weight a tap \(1,\), got \(2,\)"),
        ({"weights": 1.0}, "weights: expected a list of 1 floats, one a tap, got 1.0"),
        ({"weights": torch.ones(1).double()}, "weights: expected dtype float32, got float64"),
        ({"grad_scale": torch.ones(1)}, r"grad_scale: expected a 0-dim tensor, got \(1,\)"),
        ({"grads": []}, r"grads: expected as many buffers as student \(1\), got 0"),
        ({"grads": [torch.ones(3)]}, r"grads\[0\]: expected a buffer like student\[0\]"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        feature_match([torch.ones(2, requires_grad=True)], [torch.ones(2)], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_the_gradient_over_the_teacher(kernel: str, distance: str) -> None:
    """The same values, in the teacher's memory; autograd returns that memory itself."""
    student, teacher, weights, _ = make([(2, 8, 4, 4), (3, 5)], torch.float32, distance).inputs
    options = {"weights": weights, "distance": distance, "delta": DELTA}
    with use(kernel):
        expected = torch.autograd.grad(feature_match(student, teacher, **options).loss, student)
        loss = feature_match(student, teacher, **options, overwrite_teacher=True).loss
        got = torch.autograd.grad(loss, student)
    for g, e, t in zip(got, expected, teacher, strict=True):
        assert torch.equal(g, e) and g.data_ptr() == t.data_ptr()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, student)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "reference" and not emulated(k)])
def test_more_than_2_to_the_31_elements(kernel: str) -> None:
    """Offsets are 64-bit: the last elements count and get their gradient. Needs 9 GB."""
    n = 2**31 + 70
    student, teacher = (torch.zeros(n, dtype=torch.bfloat16) for _ in range(2))
    student[-3:] = 2.0
    student.requires_grad_()
    with use(kernel):
        loss, _ = feature_match([student], [teacher], grad_scale=torch.tensor(float(n)), overwrite_teacher=True)
    assert loss.item() == pytest.approx(3 * 4.0 / n, rel=4 * EPS)
    assert teacher[-3:].tolist() == [4.0, 4.0, 4.0] and teacher[:-3].count_nonzero() == 0


def test_teachers_that_cannot_be_overwritten() -> None:
    def refused(student: list[Tensor], teacher: list[Tensor], message: str, **options: object) -> None:
        with pytest.raises(InputError, match=message):
            feature_match([s.requires_grad_() for s in student], teacher, overwrite_teacher=True, **options)

    one, two = torch.ones(2, 3), torch.ones(2, 3)
    refused(
        [one, two], [torch.ones(2, 3)] * 2, r"teacher\[1\]: expected memory of its own .*, got that of teacher\[0\]"
    )
    refused(
        [one], [one.detach()], r"teacher\[0\]: expected memory of its own to be overwritten, got that of student\[0\]"
    )
    refused([one], [torch.ones(2, 3).half()], r"teacher\[0\]: expected the dtype of student\[0\]")
    refused([one], [torch.ones(3, 2).T], r"teacher\[0\]: expected dense, with the strides of student\[0\]")
    refused([one], [torch.ones(2, 3)], "grads: expected None beside overwrite_teacher", grads=[torch.ones(2, 3)])
    refused([one], [torch.ones(2, 3)], "delta: expected a number > 0, got 0.0", distance="huber", delta=0.0)


def test_forcing_a_kernel_that_is_not_there_says_why() -> None:
    with pytest.raises(InputError, match=r"kernel: expected one of .*, got 'rocm'"), use("rocm"):
        pass
    op = OPS["feature_match"]
    with use("reference"):
        feature_match([torch.ones(2)], [torch.ones(2)])
    assert "reference" in used()["feature_match"]
    if "cpp" in KERNELS:
        with (
            use("cpp"),
            pytest.raises(
                KernelError, match="feature_match: kernel 'cpp' cannot run this call on cuda: it has none for cuda"
            ),
        ):
            op.run("cuda")
